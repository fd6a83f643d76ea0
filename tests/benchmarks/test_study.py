"""docs/what_makes_it_work.md has the results of the runs."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.study import RESULTS, VARIANTS, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "what_makes_it_work.md"


@pytest.mark.parametrize("setting", VARIANTS)
def test_the_tables_are_those_of_the_results(setting):
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    runs = [(r["variant"], r["seed"]) for r in results if r["setting"] == setting]
    assert len(set(runs)) == len(runs)
    assert {name for name, _ in runs} <= VARIANTS[setting].keys()
    assert "\n".join(table(results, setting)) in DOCUMENT.read_text()

"""The benchmark command runs; its measurements are not tested."""

import json
import subprocess
import sys


def test_the_benchmark_prints_a_table_and_writes_it(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--seconds", "0.01", "--json", str(output)]
    done = subprocess.run(
        [*command, "--only", "operations", "inactive_hooks"], check=True, capture_output=True, text=True
    )
    figures = json.loads(output.read_text())
    assert {row["part"] for row in figures["rows"]} == {"operations", "inactive_hooks"}
    assert all(row["figure"] > 0 for row in figures["rows"])
    assert done.stdout.count("| ") >= len(figures["rows"])
    missed = sum(row["met"] is False for row in figures["rows"])
    assert f"{missed} of {sum(row['met'] is not None for row in figures['rows'])} targets missed" in done.stdout

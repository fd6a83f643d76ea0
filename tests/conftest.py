"""One thread per process: tests run in parallel on few cores, and results do not depend on the machine's size."""

import gc
import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
import transformers

from tests.shapes import check_shapes

torch.set_num_threads(1)
check_shapes()

# Only now: what a fixture imports of the package is checked, too.
from tests.memory.fused.interpreter import interpret  # noqa: E402
from tests.stores.fixtures import make_store, server, short_path  # noqa: E402, F401

interpret()

# CI draws the same examples each time, so that a result depends on the change alone; elsewhere examples are new.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_collection_finish() -> None:
    """Objects made by imports stay to the end. Frozen, they are skipped by the hundreds of later garbage collections,
    including those in tests of what is freed."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report how many families and conventions passed all tests of tests/hosts."""
    from tests.hosts.builders import ADDITIVE_HOSTS, HOSTS
    from tests.hosts.remote import REMOTE_HOSTS

    def names(outcome: str) -> set[str]:
        reports = [r for r in terminalreporter.stats.get(outcome, []) if r.nodeid.startswith("tests/hosts/")]
        return {part for r in reports for part in re.split(r"[\[\]\- ]", r.nodeid.partition("::")[2])}

    passed = names("passed") - names("failed") - names("error")
    families = passed & (HOSTS.keys() | ADDITIVE_HOSTS.keys())
    remote = passed & {host.name for host in REMOTE_HOSTS.values()}
    if families or remote:
        terminalreporter.write_line(
            f"hosts: {len(families)} families of transformers {transformers.__version__} and {len(remote)} conventions "
            f"of remote code passed every test that ran"
        )

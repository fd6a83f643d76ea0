"""The tables of docs/hosts.md are right, and every trap has a test that is named after it."""

import pytest
import transformers

from tests.hosts import support
from tests.hosts.builders import ADDITIVE_HOSTS, FAMILIES, HOSTS
from tests.hosts.remote import REMOTE_HOSTS

FAMILY_COUNT, REMOTE_COUNT, TRAP_COUNT = 24, 5, 14


def test_all_families_and_conventions_are_under_test():
    assert len(FAMILIES) == FAMILY_COUNT
    assert len(REMOTE_HOSTS) == REMOTE_COUNT
    here = HOSTS.keys() | ADDITIVE_HOSTS.keys()
    assert here == (support.OLDEST if transformers.__version__ < "5" else FAMILIES.keys())


def test_every_trap_has_a_test_with_its_number():
    assert {int(line.partition(".")[0]) for line in support.traps()} == set(range(1, TRAP_COUNT + 1))


@pytest.mark.skipif(transformers.__version__ < "5", reason="the page describes the newest version")
def test_the_page_of_hosts_is_up_to_date():
    text = support.PAGE.read_text()
    assert text == support.page(text), "run python -m tests.hosts.support"

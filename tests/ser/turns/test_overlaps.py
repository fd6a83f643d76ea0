"""Overlapping turns are found by a sweep; here by comparing all pairs."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import TurnError
from mal_adapter.ser.turns.overlaps import mark_overlaps, turns_within
from mal_adapter.ser.turns.turn import Turn

turns = st.builds(
    lambda start, length, speaker: Turn(float(start), float(start + length), speaker),
    st.integers(0, 12), st.integers(1, 6), st.sampled_from(["A", "B", "C", "?"]),
)  # fmt: skip


@given(st.lists(turns, max_size=12))
def test_a_turn_overlaps_if_another_speaker_speaks_during_a_part_of_it(given_turns: list[Turn]):
    marked = mark_overlaps(given_turns)
    assert [turn.start_s for turn in marked] == sorted(turn.start_s for turn in given_turns)
    for number, turn in enumerate(marked):
        others = [
            other
            for place, other in enumerate(marked)
            if place != number and (other.speaker != turn.speaker or turn.speaker == "?")
        ]
        assert turn.overlaps == any(o.start_s < turn.end_s and o.end_s > turn.start_s for o in others)


def test_old_marks_are_cleared():
    assert not mark_overlaps([Turn(0, 1, "A", overlaps=True)])[0].overlaps


def test_many_nested_turns_take_no_quadratic_time():
    many = [Turn(float(n), 200_000.0 - n, "AB"[n % 2]) for n in range(50_000)]
    started = time.process_time()
    assert all(turn.overlaps for turn in mark_overlaps(many))
    assert time.process_time() - started < 5  # all pairs would take minutes


def test_turns_fit_their_recording():
    assert turns_within([Turn(1, 7.9, "A"), Turn(1, 8.5, "A")], 8.0) == [Turn(1, 7.9, "A"), Turn(1, 8.0, "A")]
    for beyond in (Turn(1, 8.6, "A"), Turn(8.0, 8.1, "A")):
        with pytest.raises(TurnError, match="ends after the recording"):
            turns_within([beyond], 8.0)

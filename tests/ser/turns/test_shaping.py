"""From speech to turns: padding, order and overlaps."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.ser.turns.shaping import TurnShaper
from mal_adapter.ser.turns.speech import Speech
from mal_adapter.ser.turns.turn import Turn, TurnSettings

#: (channel, pause before, length) in tenths of a second.
Drawn = list[tuple[int, int, int]]


def speech_of(drawn: Drawn) -> list[Speech]:
    found, position = [], [0.0, 0.0]
    for channel, pause, length in drawn:
        start_s = position[channel] + pause / 10 + 0.003 * channel  # no exact ties
        position[channel] = start_s + length / 10
        found.append(Speech(start_s, position[channel], channel))
    return found


def shape(speech: list[Speech], how: TurnSettings, step_s: float) -> list[Turn]:
    """As a stream: speech is known when it has ended."""
    shaper = TurnShaper(["A", "B"], how)
    turns, now = [], 0.0
    duration_s = max((one.end_s for one in speech), default=0.0) + 0.25
    while now < duration_s:
        before, now = now, min(now + step_s, duration_s)
        ended = [one for one in speech if before < one.end_s <= now]
        open_s = min((one.start_s for one in speech if one.end_s > now), default=math.inf)
        turns += shaper.add(ended, min(open_s, now))
    return turns + shaper.finish(duration_s)


@settings(deadline=None)
@given(
    drawn=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12), st.integers(3, 30)), max_size=12),
    pad_s=st.sampled_from([0.0, 0.13, 0.5]),
    step_s=st.sampled_from([0.1, 0.7, 5.0]),
)
def test_turns_are_the_speech_with_padding(drawn: Drawn, pad_s: float, step_s: float):
    speech = speech_of(drawn)
    how = TurnSettings(pad_s=pad_s)
    turns = shape(speech, how, step_s)
    assert turns == shape(speech, how, 1_000.0)  # when it is known changes nothing
    assert [t.start_s for t in turns] == sorted(t.start_s for t in turns)
    for one, turn in zip(sorted(speech, key=lambda s: (s.start_s, s.channel)), turns, strict=True):
        assert (turn.channel, turn.speaker) == (one.channel, "AB"[one.channel])
        assert one.start_s - pad_s - 1e-9 <= turn.start_s <= one.start_s
        assert one.end_s <= turn.end_s <= one.end_s + pad_s + 1e-9
        assert turn.start_s >= 0
        for other in speech:
            if other is not one:  # padding never has another's speech in it
                assert not turn.start_s < other.end_s <= one.start_s
                assert not one.end_s <= other.start_s < turn.end_s
        common = [min(o.end_s, one.end_s) - max(o.start_s, one.start_s) for o in speech if o.channel != one.channel]
        assert turn.overlaps == any(seconds >= 0.1 for seconds in common)


def test_a_pause_is_divided():
    turns = shape([Speech(1.0, 2.0, 0), Speech(2.1, 3.0, 1)], TurnSettings(pad_s=0.2), 10.0)
    assert [(round(turn.start_s, 3), round(turn.end_s, 3)) for turn in turns] == [(0.8, 2.05), (2.05, 3.2)]


def test_padding_leaves_the_longest_turn_as_it_is():
    (turn,) = shape([Speech(1.0, 1.5, 0)], TurnSettings(max_s=1.0, pad_s=0.6), 10.0)
    assert turn.duration_s == pytest.approx(1.0)  # a quarter of it on either side


def test_a_mixed_recording_names_no_channel():
    shaper = TurnShaper(["?"], mixed=True)
    assert shaper.add([Speech(1.0, 2.0)], 2.1) == []
    (turn,) = shaper.finish(2.05)
    assert (turn.speaker, turn.channel, turn.end_s) == ("?", None, 2.05)

"""A timeline as a value and as records."""

import json

import pytest
from hypothesis import given

from mal_adapter.errors import AudioTooLongError, LabelError, TurnError
from mal_adapter.ser.timeline import Timeline, TimelineEntry
from mal_adapter.ser.turns.turn import Turn
from tests.ser.timeline.made import entry_of, made_timeline, same, timelines


@given(timelines())
def test_records_give_the_same_timeline(timeline: Timeline):
    records = [json.loads(json.dumps(record)) for record in timeline.to_records()]
    assert same(Timeline.from_records(records), timeline)


def test_every_record_of_a_turn_has_the_same_keys():
    _, answered, failed = made_timeline(Turn(0, 1, "a"), Turn(1, 2, "b"), failed=(1,)).to_records()
    assert list(answered) == list(failed)
    assert list(answered["without_memory"]) == list(failed["without_memory"])


def test_keys_of_later_versions_are_ignored():
    timeline = made_timeline(Turn(0, 1, "a"))
    whole, turn = timeline.to_records()
    later = {**whole, "valence": 0.5, "settings": {**whole["settings"], "breath_s": 0.1}}
    assert same(Timeline.from_records([later, {**turn, "valence": 0.5}]), timeline)


def test_a_failure_keeps_its_type_and_message():
    entry = entry_of(0, Turn(0, 1, "a"), error=AudioTooLongError("31 s are too long"))
    again = TimelineEntry.from_record(entry.to_record())
    assert type(again.result.error) is AudioTooLongError
    assert (again.emotion, again.error) == (None, "31 s are too long")


def test_speakers_come_in_the_order_of_their_first_turns():
    assert made_timeline(Turn(0, 1, "b"), Turn(1, 2, "a"), Turn(2, 3, "b")).speakers == ("b", "a")


@pytest.mark.parametrize("duration_s", [-1.0, float("nan"), float("inf")])
def test_a_length_that_is_none_is_refused(duration_s: float):
    with pytest.raises(TurnError, match="length must be seconds"):
        made_timeline(duration_s=duration_s)


def test_answers_with_other_labels_are_refused():
    entry = entry_of(0, Turn(0, 1, "a"), (0.5, 0.5), labels=("sad", "happy"))
    with pytest.raises(LabelError, match=r"'0000' has the labels \['sad', 'happy'\], expected the timeline's"):
        Timeline("call.wav", 1.0, (entry,), ("happy", "sad"), "call", "How?")


def changed(number: int, **values):
    records = made_timeline(Turn(0, 1, "a")).to_records()
    records[number] = {key: value for key, value in {**records[number], **values}.items() if value is not ...}
    return records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "must have the type 'timeline', got None"),
        (changed(0, type="turn"), "must have the type 'timeline'"),
        (changed(0, format_version=2), "has the format 2, .* reads the format 1"),
        (changed(0, prompt=...), "first record of a timeline has no key 'prompt'"),
        (changed(0, duration_s="long"), "first record of a timeline has a wrong value"),
        (changed(0, settings={"pad_s": -1}), "first record of a timeline has a wrong value"),
        (changed(1, type="timeline"), "after the first must have the type 'turn'"),
        (changed(1, end_s=...), "a record of a turn has no key 'end_s'"),
        (changed(1, end_s=0), "must end after it starts"),
        (changed(1, speaker=7), "a record of a turn has a wrong value"),
        (changed(1, emotion="bored"), "has no probability of 'bored'"),
        (changed(1, probabilities=None), "a record of a turn has a wrong value"),
    ],
)
def test_records_that_are_none_say_why(records, message):
    with pytest.raises(TurnError, match=message):
        Timeline.from_records(records)

"""Timelines for tests: of any names, texts and times, with answers, failures and overlaps."""

from pathlib import Path

from hypothesis import strategies as st

from mal_adapter.errors import AudioError, AudioFormatError, AudioTooLongError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.names import cleaned
from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.ser.timeline import Timeline, TimelineEntry
from mal_adapter.ser.turns.turn import Turn, TurnSettings

__all__ = ["LABELS", "entry_of", "made_timeline", "names", "same", "timelines"]

LABELS = ("neutral", "happy", "sad")
CALL = Path("calls/call-42.wav")


def answer_of(utterance: Utterance, probabilities: dict[str, float]) -> Prediction:
    label = max(probabilities, key=probabilities.__getitem__)
    return Prediction(utterance, label, probabilities, utterance.end_s - utterance.start_s, 0.125)


def entry_of(number: int, turn: Turn, odds=(0.2, 0.3, 0.5), plain=None, error=None, labels=LABELS) -> TimelineEntry:
    """The entry of a turn: answered with `odds`, without memory with `plain`, or failed with `error`."""
    utterance = Utterance(
        "call-42", f"{number:04d}", turn.speaker, CALL, turn.start_s, turn.end_s, turn.text, turn.emotion, turn.channel
    )
    if error is not None:
        return TimelineEntry(turn, Failure(utterance, error), Failure(utterance, error) if plain else None)
    without = None if plain is None else answer_of(utterance, dict(zip(labels, plain, strict=True)))
    return TimelineEntry(turn, answer_of(utterance, dict(zip(labels, odds, strict=True))), without)


def made_timeline(*turns: Turn, failed: tuple[int, ...] = (), duration_s: float = 60.0) -> Timeline:
    error = AudioError("calls/call-42.wav: silent from 1.0 s to 2.0 s; leave it out")
    entries = tuple(
        entry_of(number, turn, plain=(0.6, 0.3, 0.1), error=error if number in failed else None)
        for number, turn in enumerate(turns)
    )
    return Timeline(
        CALL, duration_s, entries, LABELS, "call-42", "How?", "tiny", "memory", settings=TurnSettings(max_s=8.0),
        channels=("customer", "agent"),
    )  # fmt: skip


def same(one: Timeline, other: Timeline) -> bool:
    """Equal, where errors are equal if their types and messages are: exceptions compare by identity."""
    return one.to_records() == other.to_records() and [type(e.result) for e in one.entries] == [
        type(e.result) for e in other.entries
    ]


#: Any text that UTF-8 can hold, without null characters, which no utterance takes.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
names = texts.filter(lambda name: cleaned(name) != "")
odds = st.lists(st.integers(1, 100), min_size=3, max_size=3).map(lambda parts: [part / sum(parts) for part in parts])
kinds = st.sampled_from([AudioError, AudioFormatError, AudioTooLongError])
failures = st.tuples(kinds, texts).map(lambda parts: parts[0](parts[1]))


@st.composite
def entries(draw, number: int, speakers: list[str]) -> TimelineEntry:
    start_ms = draw(st.integers(0, 3_600_000))
    end_ms = start_ms + draw(st.integers(1, 30_000))
    turn = Turn(
        start_ms / 1000, end_ms / 1000, draw(st.sampled_from(speakers)), draw(st.none() | st.integers(0, 3)),
        draw(st.none() | texts), draw(st.none() | st.sampled_from(LABELS)), draw(st.booleans()),
    )  # fmt: skip
    error = draw(st.none() | failures) if draw(st.integers(0, 3)) == 0 else None
    return entry_of(number, turn, draw(odds), draw(st.none() | odds), error)


@st.composite
def timelines(draw) -> Timeline:
    speakers = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    count = draw(st.integers(0, 6))
    made = sorted((draw(entries(number, speakers)) for number in range(count)), key=lambda entry: entry.turn.start_s)
    end_s = max([entry.turn.end_s for entry in made], default=0.0)
    settings = draw(st.none() | st.just(TurnSettings(pad_s=0.2)))
    return Timeline(
        CALL, end_s + draw(st.sampled_from([0.0, 0.5])), tuple(made), LABELS, "call-42", draw(texts), None,
        draw(st.none() | st.just("me/memory")), draw(st.none() | names), settings,
    )  # fmt: skip

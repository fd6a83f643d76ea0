"""A recording is answered turn by turn, as if its turns had been cut by hand."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mal_adapter.errors import AudioError, ConfigError, SessionError, TurnError
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction
from mal_adapter.ser.timeline import TimelineEntry
from mal_adapter.ser.timeline.make import make_timelines
from mal_adapter.ser.timeline.request import Request
from mal_adapter.ser.turns import Turn, TurnSettings, find_turns
from tests.ser.timeline.calls import SPEAKERS, Call, made_call
from tests.spoken_calls import have_voices, make_call, share_found, write_call


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return made_call(tmp_path / "call-42.wav")


def by_hand(call: Call, folder: Path) -> Dialogue:
    """The same turns, each cut into a file of its own."""
    folder.mkdir()
    utterances = []
    for number, turn in enumerate(call.turns):
        cut = call.samples[round(turn.start_s * 16_000) : round(turn.end_s * 16_000), turn.channel or 0]
        path = folder / f"{number}.wav"
        soundfile.write(path, cut, 16_000, subtype="PCM_16")
        utterances.append(Utterance("by hand", str(number), turn.speaker, path))
    return Dialogue("by hand", tuple(utterances))


def probabilities(answers) -> list[list[float]]:
    results = list(answers)
    assert all(isinstance(result, Prediction) for result in results)
    return [list(result.probabilities.values()) for result in results]


def outcome(entries: list[TimelineEntry]):
    return probabilities(entry.result for entry in entries), probabilities(entry.without_memory for entry in entries)


def same(found, expected) -> bool:
    return np.allclose(found, expected, rtol=0, atol=1e-5)  # a batch of several rows rounds differently


@pytest.mark.parametrize("channels", [1, 2])
def test_the_answers_are_those_of_turns_cut_by_hand(channels: int, recognizer: EmotionRecognizer, tmp_path: Path):
    call = made_call(tmp_path / "call-42.wav", turns=18, channels=channels)
    if channels == 2:  # what the other channel has at the same time makes no difference
        noisy = np.random.default_rng(0).integers(-9_000, 9_000, call.samples.shape, dtype=np.int16)
        for turn in call.turns:
            part = slice(round(turn.start_s * 16_000), round(turn.end_s * 16_000))
            noisy[part, turn.channel] = call.samples[part, turn.channel]
        soundfile.write(call.path, noisy, 16_000, subtype="PCM_16")
    entries = list(recognizer.timeline(call.path, call.turns))
    cut = by_hand(call, tmp_path / "cut")
    with_memory, without = outcome(entries)
    assert same(with_memory, probabilities(recognizer.recognize(cut)))
    assert same(without, probabilities(recognizer.without_memory().recognize(cut)))
    assert not same(with_memory, without)
    assert [entry.turn for entry in entries] == call.turns
    first = entries[0].result.utterance
    assert (first.dialogue_id, first.utterance_id, first.speaker) == ("call-42", "0000", call.turns[0].speaker)
    assert (first.audio, first.channel, first.emotion) == (call.path, call.turns[0].channel, call.turns[0].emotion)


def test_a_recording_starts_with_an_empty_memory_and_ends_with_all_of_it(recognizer: EmotionRecognizer, call: Call):
    first = outcome(list(recognizer.timeline(call.path, call.turns)))
    assert outcome(list(recognizer.timeline(call.path, call.turns))) == first
    assert recognizer.memory.states["call-42"].utterances.item() == len(call.turns)
    list(recognizer.timeline(call.path, call.turns[:2], session_id="other"))
    assert recognizer.memory.states["other"].utterances.item() == 2
    assert recognizer.memory.states["call-42"].utterances.item() == len(call.turns)


def test_entries_come_before_the_turns_are_all_known(recognizer: EmotionRecognizer, tmp_path: Path):
    call = made_call(tmp_path / "call.wav", turns=40)
    asked: list[Turn] = []

    def turns():
        for turn in call.turns:
            asked.append(turn)
            yield turn

    entries = recognizer.timeline(call.path, turns())
    assert asked == []
    next(entries)
    assert len(asked) == 1
    ahead = [len(asked) - place for place, _ in enumerate(entries, start=2)]
    assert max(ahead) < 8
    assert len(asked) == 40


@pytest.mark.parametrize("arms", ["compared", "memory alone", "no memory"])
def test_unusable_turns_cost_no_forward(arms: str, recognizer: EmotionRecognizer, call: Call):
    quiet = Turn(0.05, 0.4, "agent")  # before anybody speaks
    short = Turn(call.turns[1].end_s - 0.5, call.turns[1].end_s - 0.498, "agent")
    turns = [quiet, *call.turns[:2], short, *call.turns[2:]]
    rows: list[int] = []
    hook = recognizer.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    asked = recognizer.without_memory() if arms == "no memory" else recognizer
    entries = list(asked.timeline(call.path, turns, compare=arms == "compared"))
    hook.remove()
    assert [isinstance(entry.result, Failure) for entry in entries] == [True, False, False, True] + [False] * 4
    assert [entry.error is None for entry in entries] == [isinstance(e.result, Prediction) for e in entries]
    assert "silent" in entries[0].error
    assert "too short" in entries[3].error
    assert sum(rows) == len(call.turns) * (2 if arms == "compared" else 1)
    assert all((e.without_memory is not None) == (arms == "compared" and e.error is None) for e in entries)
    if arms != "no memory":
        assert recognizer.memory.states["call-42"].utterances.item() == len(call.turns)
        answered = [entry.result for entry in entries if entry.error is None]
        alone = list(recognizer.timeline(call.path, call.turns, compare=False))
        assert same(probabilities(answered), probabilities(entry.result for entry in alone))


def test_a_turn_beyond_the_hosts_limit_is_split_where_it_is_quiet(recognizer: EmotionRecognizer, tmp_path: Path):
    assert recognizer.longest_s == 6.0
    rng = np.random.default_rng(0)
    loud = rng.normal(0, 0.1, 16 * 16_000)
    pauses = (4.6, 9.3)
    for at in pauses:
        loud[round((at - 0.1) * 16_000) : round((at + 0.1) * 16_000)] *= 0.01
    soundfile.write(tmp_path / "long.wav", loud, 16_000)
    whole = Turn(0.5, 15.0, "agent", channel=0, text="words", emotion="sad")
    parts = [entry.turn for entry in recognizer.timeline(tmp_path / "long.wav", [whole])]
    assert (parts[0].start_s, parts[-1].end_s) == (0.5, 15.0)
    assert [part.end_s for part in parts[:-1]] == [part.start_s for part in parts[1:]]
    assert max(part.duration_s for part in parts) <= 6.0
    assert [min(abs(part.end_s - at) for part in parts) < 0.11 for at in pauses] == [True, True]
    assert {(part.speaker, part.channel, part.text, part.emotion) for part in parts} == {("agent", 0, None, "sad")}
    exact = [Turn(1.0, 7.0, "agent")]
    assert [entry.turn for entry in recognizer.timeline(tmp_path / "long.wav", exact)] == exact
    shorter = recognizer.timeline(tmp_path / "long.wav", exact, settings=TurnSettings(max_s=2.0))
    assert max(entry.turn.duration_s for entry in shorter) <= 2.0


def test_a_silent_turn_beyond_the_limit_fails_in_parts(recognizer: EmotionRecognizer, tmp_path: Path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000 * 20), 16_000)
    entries = list(recognizer.timeline(tmp_path / "silent.wav", [Turn(0, 20, "A")]))
    assert len(entries) >= 4
    assert all("silent" in entry.error for entry in entries)


def test_speakers_named_as_channels_are_taken_from_their_channels(recognizer: EmotionRecognizer, tmp_path: Path):
    call = made_call(tmp_path / "call.wav", channels=2)
    unplaced = [replace(turn, channel=None) for turn in call.turns]
    named = list(recognizer.timeline(call.path, unplaced, channels=SPEAKERS))
    assert [entry.turn.channel for entry in named] == [turn.channel for turn in call.turns]
    assert outcome(named) == outcome(list(recognizer.timeline(call.path, call.turns)))


def test_lists_are_sorted_and_overlaps_are_marked(recognizer: EmotionRecognizer, call: Call):
    turns = [*call.turns, replace(call.turns[1], speaker="third", start_s=call.turns[1].start_s + 0.5)]
    entries = list(recognizer.timeline(call.path, turns[::-1]))
    starts = [entry.turn.start_s for entry in entries]
    assert starts == sorted(starts)
    assert [entry.turn.overlaps for entry in entries] == [False, True, True, False, False, False, False]
    with pytest.raises(TurnError, match=r"order of start, or as a list"):
        list(recognizer.timeline(call.path, iter(turns)))


@pytest.mark.parametrize(
    ("turns", "options", "error", "message"),
    [
        ([Turn(0, 1, "A", channel=1)], {}, TurnError, "in channel 1, and the recording has 1"),
        ([Turn(0, 1e4, "A")], {}, TurnError, "ends after the recording"),
        ([(0.0, 1.0)], {}, TurnError, "expected turns or a file of turns, got a tuple"),
        ([], {"channels": ("a", "b")}, TurnError, "has 1 channel, and 2 names are given: a, b"),
        ([], {"channels": ("a", "a")}, TurnError, "must be different names, got"),
        (None, {"channels": ("a", "b")}, TurnError, "has 1 channel, and 2 names are given: a, b"),
        ([], {"session_id": ""}, SessionError, "not a non-empty string"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    turns, options, error, message, recognizer: EmotionRecognizer, call: Call
):
    with pytest.raises(error, match=message):
        recognizer.timeline(call.path, turns, **options)


def test_a_recording_that_is_none_is_refused_at_once(recognizer: EmotionRecognizer, tmp_path: Path):
    (tmp_path / "text.wav").write_text("no sound")
    for name in ("text.wav", "missing.wav"):
        with pytest.raises(AudioError, match=name):
            recognizer.timeline(tmp_path / name, [])


def test_no_turns_are_no_entries(recognizer: EmotionRecognizer, call: Call):
    assert list(recognizer.timeline(call.path, [])) == []


def test_a_timeline_that_is_left_early_keeps_the_memory_of_what_was_answered(recognizer: EmotionRecognizer, call: Call):
    entries = list(islice(recognizer.timeline(call.path, call.turns), 3))
    assert len(entries) == 3
    assert recognizer.memory.states["call-42"].utterances.item() == 3


@pytest.mark.skipif(not have_voices(), reason="no espeak-ng on this machine")
def test_without_turns_they_are_found_by_voice_activity_in_each_channel(recognizer: EmotionRecognizer, tmp_path: Path):
    spoken = make_call(40.0, seed=1)
    path = write_call(tmp_path / "call.wav", spoken)
    settings = TurnSettings(max_s=4.0)
    entries = list(recognizer.timeline(path, channels=SPEAKERS, settings=settings))
    turns = [entry.turn for entry in entries]
    assert turns == list(find_turns(path, SPEAKERS, settings))
    assert share_found(turns, [turn for turn in spoken.turns if turn.end_s - turn.start_s < 3.5]) > 0.9
    assert {(turn.speaker, turn.channel) for turn in turns} == {("customer", 0), ("agent", 1)}
    assert outcome(entries) == outcome(list(recognizer.timeline(path, turns)))
    assert max(turn.duration_s for turn in turns) <= 4.0
    mixed = [entry.turn for entry in recognizer.timeline(path)]
    assert {(turn.speaker, turn.channel) for turn in mixed} == {("?", None)}
    assert max(turn.duration_s for turn in mixed) <= recognizer.longest_s


@pytest.mark.skipif(not have_voices(), reason="no espeak-ng on this machine")
def test_of_a_recording_that_is_damaged_in_its_middle_the_start_is_answered(
    recognizer: EmotionRecognizer, tmp_path: Path
):
    path = write_call(tmp_path / "call.flac", make_call(240.0, seed=1), subtype="PCM_16")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(5_000) + whole[len(whole) // 2 + 5_000 :])
    answered = []
    with pytest.raises(AudioError, match=r"call\.flac"):
        answered.extend(recognizer.timeline(path, channels=SPEAKERS))  # keeps what came before the error
    assert len(answered) > 10
    assert all(isinstance(entry.result, Prediction) for entry in answered)


@pytest.mark.parametrize("arms", ["compared", "memory alone", "no memory"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_recordings_side_by_side_have_the_answers_of_each_alone(
    arms: str, batch_size: int, recognizer: EmotionRecognizer, tmp_path: Path
):
    asked = recognizer.without_memory() if arms == "no memory" else recognizer
    compare = arms == "compared"
    requests = []
    for number, turns in enumerate((5, 3, 9, 4, 6)):
        folder = tmp_path / str(number)
        folder.mkdir()
        name = "call" if number in (0, 3) else f"call{number}"  # two of them have the same session
        call = made_call(folder / f"{name}.wav", seed=number, turns=turns)
        requests.append(Request(call.path, [Turn(0.0, 0.3, "?"), *call.turns]))
    found: dict[Request, list[TimelineEntry]] = {request: [] for request in requests}
    over, order = [], []
    for request, entry in make_timelines(asked, requests, compare=compare, batch_size=batch_size):
        assert request not in over
        if entry is None:
            over.append(request)
        else:
            found[request].append(entry)
            order.append(requests.index(request))
    assert set(over) == set(requests)
    for request in requests:
        alone = list(asked.timeline(request.path, request.turns, compare=compare))
        assert [entry.turn for entry in found[request]] == [entry.turn for entry in alone]
        assert [entry.error is None for entry in found[request]] == [False] + [True] * (len(alone) - 1)
        for arm in ("result", "without_memory") if compare else ("result",):
            both = [[getattr(entry, arm) for entry in entries[1:]] for entries in (found[request], alone)]
            assert same(*map(probabilities, both))
        utterances = [entry.result.utterance for entry in found[request]]
        assert [utterance.utterance_id for utterance in utterances] == [f"{n:04d}" for n in range(len(alone))]
    places = {number: [k for k, one in enumerate(order) if one == number] for number in range(5)}
    assert (min(places[1]) < max(places[0])) == (batch_size > 1)  # side by side
    assert max(places[0]) < min(places[3])  # one session after the other
    if arms != "no memory":
        list(make_timelines(asked, requests[:2], compare=compare))
        assert all(request.session not in recognizer.memory.states for request in requests[:2])


def test_a_bad_recording_among_others_ends_alone(recognizer: EmotionRecognizer, tmp_path: Path):
    call = made_call(tmp_path / "call.wav", turns=4)

    def damaged():
        yield from call.turns[:3]
        raise AudioError("call.wav: the file is damaged")

    (tmp_path / "text.wav").write_text("no sound")
    requests = [
        Request(call.path, damaged(), session_id="damaged"),
        Request(tmp_path / "text.wav", [], session_id="text"),
        Request(call.path, call.turns, session_id="good"),
    ]
    entries: dict[str, int] = dict.fromkeys(("damaged", "text", "good"), 0)
    ends = {}
    for request, found in make_timelines(recognizer, requests):
        if isinstance(found, TimelineEntry):
            entries[request.session] += 1
        else:
            ends[request.session] = found
    assert entries == {"damaged": 3, "text": 0, "good": 4}
    assert (str(ends["damaged"]), ends["good"]) == ("call.wav: the file is damaged", None)
    assert isinstance(ends["text"], AudioError)
    with pytest.raises(ConfigError, match="batch_size"):
        make_timelines(recognizer, requests, batch_size=0)

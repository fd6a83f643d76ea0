"""Live streams of speech: whatever the blocks, the turns and answers are those of the recording."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError, HostError, StreamError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.live import EmotionStream, LiveEntry
from mal_adapter.ser.live.stream import live_settings, speakers_of
from mal_adapter.ser.live.turn_stream import SpokenTurn, TurnStream, feed_streams
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.timeline.timeline import TimelineEntry
from mal_adapter.ser.turns.detect import find_turns
from mal_adapter.ser.turns.turn import TurnSettings
from tests import spoken_calls
from tests.ser.live.calls import Samples, make_call, mulaw, sentence

NAMES = ("customer", "agent")
SETTINGS = live_settings(None, 6.0)


def cut(samples: Samples, sizes: Sequence[int]) -> Iterator[Samples]:
    """Blocks of these sizes, again and again."""
    place = 0
    for size in itertools.cycle(sizes):
        if place >= len(samples):
            return
        yield samples[place : place + size]
        place += size


def turns_of(stream: TurnStream, blocks: Iterator[Samples]) -> list[SpokenTurn]:
    return [turn for block in blocks for turn in stream.feed(block)] + stream.finish()


def assert_equal(found: Sequence[SpokenTurn], expected: Sequence[SpokenTurn]) -> None:
    assert [(one.turn, one.voice_end_s) for one in found] == [(one.turn, one.voice_end_s) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.waveform, other.waveform)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_every_turn_is_found_where_it_is(rate: int):
    call, said = make_call(rate, seed=rate)
    found = turns_of(TurnStream(rate, 16_000, NAMES, SETTINGS), cut(call, [rate // 50]))
    assert [(one.turn.channel, one.turn.speaker) for one in found] == [(s.channel, NAMES[s.channel]) for s in said]
    for one, truth in zip(found, said, strict=True):
        assert abs(one.turn.start_s + SETTINGS.pad_s - truth.start_s) < 0.2
        assert abs(one.voice_end_s - truth.end_s) < 0.2
        assert not one.turn.overlaps
        assert one.waveform.size == round(one.turn.end_s * 16_000) - round(one.turn.start_s * 16_000)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rate=st.sampled_from([8_000, 11_025]),
    sizes=st.lists(st.one_of(st.integers(1, 400), st.integers(0, 30_000)), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 2),
)
def test_the_sizes_of_the_blocks_change_nothing(rate: int, sizes: list[int], seed: int):
    if sum(sizes) / len(sizes) < 100:  # a stream of single samples takes minutes
        sizes = [*sizes, 5_000]
    call, _ = make_call(rate, turns=4, seed=seed)
    expected = turns_of(TurnStream(rate, 16_000, NAMES, SETTINGS), cut(call, [len(call)]))
    assert len(expected) == 4
    assert_equal(turns_of(TurnStream(rate, 16_000, NAMES, SETTINGS), cut(call, sizes)), expected)


def test_streams_that_are_fed_together_are_those_fed_alone():
    rates = [8_000, 8_000, 16_000, 48_000, 8_000]
    calls = [make_call(rate, turns=3, seed=seed)[0] for seed, rate in enumerate(rates)]
    alone = [
        turns_of(TurnStream(rate, 16_000, NAMES, SETTINGS), cut(call, [777]))
        for rate, call in zip(rates, calls, strict=True)
    ]
    streams = [TurnStream(rate, 16_000, NAMES, SETTINGS) for rate in rates]
    rest = [cut(call, [rate // 50, rate // 10]) for rate, call in zip(rates, calls, strict=True)]
    found: list[list[SpokenTurn]] = [[] for _ in streams]
    going_on = list(range(len(streams)))
    while going_on:
        blocks = {place: block for place in going_on if (block := next(rest[place], None)) is not None}
        going_on = list(blocks)
        for place, turns in zip(blocks, feed_streams([streams[p] for p in blocks], list(blocks.values())), strict=True):
            found[place] += turns
    for stream, turns, expected in zip(streams, found, alone, strict=True):
        turns += stream.finish()
        assert len(expected) == 3
        assert [one.turn for one in turns] == [one.turn for one in expected]


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
def test_the_turns_are_those_of_the_whole_recording(rate: int, tmp_path: Path):
    call, _ = make_call(rate, seed=1)
    path = tmp_path / "call.wav"
    soundfile.write(path, call, rate, subtype="FLOAT")
    found = turns_of(TurnStream(rate, 16_000, NAMES, SETTINGS), cut(call, [rate // 50]))
    assert [one.turn for one in found] == list(find_turns(path, NAMES, SETTINGS))
    mono = call.sum(1, keepdims=True) / 2
    soundfile.write(path, mono, rate, subtype="FLOAT")
    found = turns_of(TurnStream(rate, 16_000, ["?"], SETTINGS), cut(mono, [rate // 50]))
    assert [one.turn for one in found] == list(find_turns(path, None, SETTINGS))


def test_with_overlaps_and_crosstalk_only_padding_and_marks_may_differ(tmp_path: Path):
    call = spoken_calls.make_call(60.0, seed=3, overlap=0.3, crosstalk_db=18.0)
    path = tmp_path / "call.wav"
    soundfile.write(path, call.samples, call.sampling_rate, subtype="FLOAT")
    found = turns_of(TurnStream(call.sampling_rate, 16_000, NAMES, SETTINGS), cut(call.samples, [160]))
    whole = list(find_turns(path, NAMES, SETTINGS))
    assert len(found) == len(whole) > 10
    assert [one.voice_end_s for one in found] == sorted(one.voice_end_s for one in found)
    for one, other in zip(sorted(found, key=lambda one: (one.turn.start_s, one.turn.channel)), whole, strict=True):
        assert one.turn.speaker == other.speaker
        assert one.turn.start_s == pytest.approx(other.start_s, abs=SETTINGS.pad_s)
        assert one.turn.end_s == pytest.approx(other.end_s, abs=SETTINGS.pad_s)


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_answers_are_those_of_the_same_turns_of_a_file(rate: int, recognizer: EmotionRecognizer, tmp_path: Path):
    call, _ = make_call(rate)
    memory = recognizer.memory
    assert memory is not None
    stream = recognizer.stream(rate, channels=NAMES, session_id="live")
    entries = list(stream.entries(cut(call, [rate // 50])))
    assert len(entries) == 6
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", call[:, number], rate, subtype="FLOAT")
    for place, entry in enumerate(entries):
        turn = entry.turn
        file = Utterance("file", str(place), "?", tmp_path / f"{turn.channel}.wav", turn.start_s, turn.end_s)
        (expected,) = recognizer.answer([file])
        assert isinstance(entry.result, Prediction)
        assert isinstance(expected, Prediction)
        assert entry.result.audio_s == expected.audio_s
        assert entry.result.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
        utterance = entry.result.utterance
        assert (utterance.dialogue_id, utterance.utterance_id) == ("live", f"{place:04d}")
        assert (utterance.speaker, utterance.channel, str(utterance.audio)) == (turn.speaker, turn.channel, "live")
        assert entry.waveform is not None
        assert np.array_equal(entry.waveform, load_waveform(file))
    torch.testing.assert_close(memory.states["live"].weights, memory.states["file"].weights)


def test_the_sound_of_a_turn_is_what_is_read_from_a_file(tmp_path: Path):
    for rate, wanted in ((8_000, 16_000), (16_000, 16_000), (16_000, 24_000)):
        call, _ = make_call(rate, turns=2, channels=1)
        path = tmp_path / "call.wav"
        soundfile.write(path, call, rate, subtype="FLOAT")
        for one in turns_of(TurnStream(rate, wanted, ["?"], SETTINGS), cut(call, [100])):
            file = load_waveform(Utterance("d", "0", "?", path, one.turn.start_s, one.turn.end_s), wanted)
            assert np.array_equal(one.waveform, file)
            assert one.turn.channel is None


def test_speech_that_does_not_end_is_split_and_the_memory_is_bounded():
    voice = np.concatenate(
        [sentence("and then he said that it would never ever work again", v, 8_000) for v in ("en", "en-us")]
    )
    endless = np.tile(voice, 20)[:, np.newaxis]
    stream = TurnStream(8_000, 16_000, ["?"], SETTINGS)
    found, kept = [], 0.0
    for block in cut(endless, [160]):
        found += stream.feed(block)
        kept = max(kept, stream.kept_s)
    found += stream.finish()
    assert len(endless) / 8_000 > 60
    assert len(found) > 10
    assert all(one.turn.duration_s <= 6.0 for one in found)
    assert kept < 7.0
    spans = [(one.turn.start_s, one.turn.end_s) for one in found]
    assert all(start == pytest.approx(end) for (_, end), (start, _) in itertools.pairwise(spans) if start - end < 0.2)
    quiet = TurnStream(8_000, 16_000, ["?"], SETTINGS)
    for block in cut(np.zeros((8_000 * 60, 1), np.float32), [160]):
        assert quiet.feed(block) == []
        assert quiet.kept_s < 0.3


def test_overlapping_speech_is_marked_and_never_mixed():
    one = sentence("My order has not arrived yet, and nobody tells me why.", "en-us+f3", 8_000)
    other = sentence("I am sorry to hear that.", "en+m3", 8_000)
    call = np.zeros((one.size + 16_000, 2), np.float32)
    call[4_000 : 4_000 + one.size, 0] = one
    call[12_000 : 12_000 + other.size, 1] = other
    found = turns_of(TurnStream(8_000, 8_000, NAMES, SETTINGS), cut(call, [160]))
    assert {turn.turn.speaker for turn in found} == set(NAMES)
    assert all(turn.turn.overlaps for turn in found)
    for turn in found:
        start, channel = round(turn.turn.start_s * 8_000), turn.turn.channel
        assert np.array_equal(turn.waveform, call[start : start + turn.waveform.size, channel])


def test_padding_ends_where_another_person_speaks():
    one, other = (sentence(text, "en", 8_000) for text in ("Good morning, this is Ann.", "Good morning, I am Bob."))
    call = np.zeros((one.size + other.size + 16_000, 2), np.float32)
    call[4_000 : 4_000 + one.size, 0] = one
    begin = 4_000 + one.size + 400
    call[begin : begin + other.size, 1] = other
    first, second = turns_of(TurnStream(8_000, 8_000, NAMES, TurnSettings(max_s=6.0, pad_s=0.25)), cut(call, [160]))
    if not first.turn.overlaps:
        assert first.turn.end_s <= second.turn.start_s + 0.25
        assert first.voice_end_s <= second.turn.start_s


def test_blocks_may_be_bytes_and_integers(recognizer: EmotionRecognizer):
    call, _ = make_call(turns=3)
    sixteen = np.clip(call * 32_768, -32_768, 32_767).astype(np.int16)
    forms: list[Any] = [sixteen, sixteen.astype(np.int32) * 65_536, sixteen / 32_768, sixteen.tobytes()]
    streams = [recognizer.stream(8_000, channels=2, session_id=f"form-{n}") for n in range(len(forms))]
    answers = [
        [*stream.feed(form[:2_001]), *stream.feed(form[2_001:]), *stream.finish()]
        for stream, form in zip(streams, forms, strict=True)
    ]
    assert len(answers[0]) == 3
    for other in answers[1:]:
        assert [entry.turn for entry in other] == [entry.turn for entry in answers[0]]
        assert [entry.emotion for entry in other] == [entry.emotion for entry in answers[0]]


def test_the_delay_counts_from_the_end_of_the_voice(recognizer: EmotionRecognizer, monkeypatch: pytest.MonkeyPatch):
    """With a clock that runs with the stream, it is the pause that shows the end, and a few windows."""
    call, said = make_call(turns=4)
    now = 0.0
    monkeypatch.setattr("mal_adapter.ser.live.stream.time.perf_counter", lambda: now)
    stream = recognizer.stream(8_000, channels=NAMES, session_id="clock")
    entries: list[LiveEntry] = []
    for block in cut(call, [160]):
        now += 0.02
        entries += stream.feed(block)
    assert len(entries) == 4
    for entry in entries:
        assert SETTINGS.merge_s - 0.02 <= entry.delay_s <= SETTINGS.merge_s + 0.2
        assert entry.to_record()["delay_s"] == entry.delay_s
        assert TimelineEntry.from_record(entry.to_record()).result == entry.result
    late = recognizer.stream(8_000, channels=NAMES, session_id="late")
    late.feed(call)
    now += 5.0
    assert [entry.delay_s for entry in late.finish()] == []
    held = recognizer.stream(8_000, channels=NAMES, session_id="held")
    held.feed(call[: round((said[0].end_s + 0.1) * 8_000)])
    now += 5.0
    (last,) = held.finish()
    assert last.delay_s == pytest.approx(5.0)


def test_a_session_continues_and_is_compared(recognizer: EmotionRecognizer):
    memory = recognizer.memory
    assert memory is not None
    call, _ = make_call(turns=4)
    whole = list(recognizer.stream(8_000, channels=NAMES, session_id="whole", compare=True).entries([call]))
    half = round(whole[2].turn.start_s * 8_000)
    first = list(recognizer.stream(8_000, channels=NAMES, session_id="halves").entries([call[:half]]))
    second = list(recognizer.stream(8_000, channels=NAMES, session_id="halves").entries([call[half:]]))
    assert [entry.emotion for entry in first + second] == [entry.emotion for entry in whole]
    assert int(memory.states["halves"].utterances) == 4
    plain = [entry.without_memory for entry in whole]
    assert all(isinstance(answer, Prediction) for answer in plain)
    assert first[0].without_memory is None
    alone = recognizer.without_memory().stream(8_000, channels=NAMES, compare=True)
    found = list(alone.entries([call]))
    for entry, expected in zip(found, plain, strict=True):
        assert isinstance(entry.result, Prediction)
        assert isinstance(expected, Prediction)
        assert entry.result.probabilities == pytest.approx(expected.probabilities)
        assert entry.without_memory is None
    assert alone.session_id not in memory.states
    assert alone.session_id != recognizer.stream(8_000).session_id


def test_the_end_of_a_block_finishes_the_stream(recognizer: EmotionRecognizer):
    memory = recognizer.memory
    assert memory is not None
    call, said = make_call(turns=1, channels=1)
    spoken = call[: round(said[0].end_s * 8_000)]
    with recognizer.stream(8_000, session_id="block") as stream:
        assert stream.feed(spoken) == []
        since = stream.speaking_since()
        assert since is not None
        assert abs(since - said[0].start_s) < 0.1
    assert len(stream.rest) == 1
    assert int(memory.states["block"].utterances) == 1
    broken = recognizer.stream(8_000, session_id="broken")
    with contextlib.suppress(KeyError), broken:
        broken.feed(spoken)
        raise KeyError
    assert broken.rest == []
    assert "broken" not in memory.states
    for ended in (stream, broken):
        with pytest.raises(StreamError, match="has ended"):
            ended.feed(spoken)


def test_an_error_of_the_recognizer_loses_no_other_turn(recognizer: EmotionRecognizer, monkeypatch: pytest.MonkeyPatch):
    call, _ = make_call(turns=4)
    expected = list(recognizer.stream(8_000, channels=NAMES, session_id="good").entries([call]))
    stream = recognizer.stream(8_000, channels=NAMES, session_id="bad")
    answer = recognizer.answer
    asked = itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(asked) == 1:
            raise HostError("the answer is NaN")
        return answer(*args, **kwargs)

    monkeypatch.setattr(recognizer, "answer", failing)
    with pytest.raises(HostError):
        stream.feed(call)
    found = stream.feed(call[:0]) + stream.finish()
    assert [entry.turn for entry in found] == [expected[place].turn for place in (0, 2, 3)]


def test_a_turn_without_usable_sound_is_a_failure(recognizer: EmotionRecognizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "mal_adapter.ser.live.history.History.part", lambda *_, **__: np.zeros(16_000, dtype=np.float32)
    )
    call, _ = make_call(turns=2)
    entries = list(recognizer.stream(8_000, channels=NAMES, session_id="silent").entries([call]))
    assert [type(entry.result) for entry in entries] == [Failure, Failure]
    assert all(entry.error is not None and entry.error.startswith("silent: ") for entry in entries)
    assert all(math.isfinite(entry.delay_s) for entry in entries)


def test_what_is_no_block_is_refused(recognizer: EmotionRecognizer):
    stream = recognizer.stream(8_000, channels=2)
    for block in (
        np.zeros(10),
        np.zeros((10, 3)),
        np.zeros((1, 1, 1)),
        np.zeros((10, 2), np.uint8),
        np.full((9, 2), np.nan),
    ):
        with pytest.raises(StreamError):
            stream.feed(block)
    assert stream.position_s == 0
    assert stream.feed(np.zeros((80, 2))) == []
    assert stream.position_s == 0.01


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampling_rate": 100},
        {"sampling_rate": 10**6},
        {"sampling_rate": 8_000.5},
        {"channels": 0},
        {"channels": []},
        {"channels": ["a", "a"]},
        {"channels": ["a", " "]},
        {"settings": TurnSettings(max_s=6.5)},
    ],
)
def test_arguments_are_checked(recognizer: EmotionRecognizer, arguments: dict[str, Any]):
    with pytest.raises(ConfigError):
        recognizer.stream(**{"sampling_rate": 8_000, **arguments})


def test_names_of_channels():
    assert speakers_of(1) == ("?",)
    assert speakers_of(2) == ("channel 0", "channel 1")
    assert speakers_of("customer") == ("customer",)
    assert live_settings(None, 3600.0).max_s == 30.0
    assert live_settings(TurnSettings(max_s=50.0), 3600.0).max_s == 50.0


def test_a_phone_call_is_not_worse_than_its_recording(recognizer: EmotionRecognizer):
    """µ-law at 8 kHz, decoded and fed as it comes."""
    from mal_adapter.ser.live.codecs import Decoder

    call, said = make_call(turns=4, channels=1)
    decoder, stream = Decoder("mulaw"), recognizer.stream(8_000)
    data = mulaw(call[:, 0])
    entries = [e for place in range(0, len(data), 160) for e in stream.feed(decoder(data[place : place + 160]))]
    entries += stream.finish()
    assert len(entries) == len(said)
    assert isinstance(stream, EmotionStream)

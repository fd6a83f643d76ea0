"""`EmotionStream`: emotions while people speak, turn by turn."""

import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mal_adapter.errors import ConfigError, StreamError
from mal_adapter.memory.config import check_integer
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.live.arrivals import Arrivals
from mal_adapter.ser.live.codecs import Decoder, Samples
from mal_adapter.ser.live.turn_stream import SpokenTurn, TurnStream
from mal_adapter.ser.recognizer.audio import Waveform
from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.ser.timeline.timeline import TimelineEntry
from mal_adapter.ser.turns.turn import TurnSettings

__all__ = ["LONGEST_TURN_S", "EmotionStream", "LiveEntry", "live_settings", "speakers_of"]

#: Turns of a stream are split here, unless the host takes less or the settings say otherwise. In seconds.
LONGEST_TURN_S = 30.0
_RATES = (4_000, 384_000)


@dataclass(frozen=True)
class LiveEntry(TimelineEntry):
    """One turn of a stream and its answer.

    Args:
        delay_s: Seconds from the end of speech to the answer: from when the block came that has the end of the voice,
            without padding, until the answer was known. It includes the pause that shows that the turn has ended
            (`merge_s`) if the blocks come in real time.
        waveform: The turn's sound, (samples,) float32 at the recogniser's `sampling_rate`; nothing else keeps it.
    """

    delay_s: float = field(default=float("nan"), kw_only=True)
    waveform: Waveform | None = field(default=None, kw_only=True, repr=False, compare=False)

    def to_record(self) -> dict[str, Any]:
        """As `TimelineEntry.to_record`, with `delay_s` and without the sound."""
        return {**super().to_record(), "delay_s": self.delay_s}


class Answering(Protocol):
    """What a stream needs of a recogniser."""

    @property
    def sampling_rate(self) -> int:
        """Of the host's audio, in Hz."""

    @property
    def longest_s(self) -> float:
        """The longest utterance that the host takes, in seconds."""

    @property
    def reads_memory(self) -> bool:
        """Whether there is a memory."""

    def without_memory(self) -> "Answering":
        """The plain host."""

    def answer(
        self, utterances: Sequence[Utterance], *, waveforms: Sequence[Waveform | None] | None = None
    ) -> list[Prediction | Failure]:
        """One result per utterance."""


class EmotionStream:
    """The emotions of a live stream of sound: blocks go in, and a turn comes out as soon as it has ended.

    What is mutated: each turn is written to the memory's session of the stream, in the order of the turns' ends.

    Args:
        recognizer: Answers the turns.
        sampling_rate: Of the blocks, in Hz.
        channels: The number of channels, or the name of each channel's speaker.
        session_id: Of the memory; a new one unless given. An existing session is continued.
        settings: How turns are found. `max_s` is 30 s unless given, or what the host takes if that is less.
        compare: Ask the plain host as well.

    Attributes:
        session_id: Of the memory.
        rest: The last turns, once the stream has been finished by the end of a `with` block.

    Raises:
        ConfigError: An argument is not what it should be.
        MissingDependencyError: silero-vad is not installed.
    """

    def __init__(
        self,
        recognizer: Answering,
        sampling_rate: int,
        *,
        channels: int | Sequence[str] = 1,
        session_id: str | None = None,
        settings: TurnSettings | None = None,
        compare: bool = False,
    ) -> None:
        check_integer("sampling_rate", sampling_rate, _RATES[0])
        if sampling_rate > _RATES[1]:
            raise ConfigError(f"sampling_rate must be at most {_RATES[1]} Hz, got {sampling_rate}")
        settings = live_settings(settings, recognizer.longest_s)
        assert settings.max_s is not None
        speakers = speakers_of(channels)
        self.session_id = secrets.token_hex(8) if session_id is None else session_id
        self.rest: list[LiveEntry] = []
        self._arms = [recognizer, recognizer.without_memory()] if compare and recognizer.reads_memory else [recognizer]
        self._rate = sampling_rate
        self._decoder = Decoder("pcm16", len(speakers))
        self._turns = TurnStream(sampling_rate, recognizer.sampling_rate, speakers, settings)
        self._arrivals = Arrivals(settings.max_s + settings.merge_s + 1.0)
        self._waiting: deque[SpokenTurn] = deque()
        self._answered: list[LiveEntry] = []
        self._frames = 0
        self._count = 0
        self._ended = False

    @property
    def position_s(self) -> float:
        """Seconds of the stream that came."""
        return self._frames / self._rate

    def speaking_since(self, channel: int = 0) -> float | None:
        """The start of speech that has not ended, in seconds from the start of the stream; None in a pause."""
        return self._turns.speaking_since(channel)

    def feed(self, block: npt.ArrayLike | bytes) -> list[LiveEntry]:
        """Continue the stream, and answer the turns that have ended.

        Args:
            block: (frames, channels), or (frames,) of one channel: floating point from -1 to 1, or integers of 16 or 32
                bits; or bytes, 16-bit PCM, little endian. Any number of frames.

        Returns:
            The turns that have ended, in the order of their ends.

        Raises:
            StreamError: The block has another shape or type, or the stream has ended.
            HostError, SessionError, SessionConflictError, StoreError: As `EmotionRecognizer.answer`. The turn is not
                answered; the stream can continue, and what was answered before comes with the next call.
        """
        if self._ended:
            raise StreamError("the stream has ended; begin another one")
        samples = self._samples(block)
        turns = self._turns.feed(samples)
        self._frames += len(samples)
        self._arrivals.add(self.position_s, time.perf_counter())
        return self._answer(turns)

    def finish(self) -> list[LiveEntry]:
        """End the stream: speech that has not ended is a turn up to here. A second call returns what is left.

        Raises:
            HostError, SessionError, SessionConflictError, StoreError: As `feed`.
        """
        turns = [] if self._ended else self._turns.finish()
        self._ended = True
        return self._answer(turns)

    def entries(self, blocks: Iterable[npt.ArrayLike | bytes]) -> Iterator[LiveEntry]:
        """Feed all blocks of an iterable, and finish.

        Yields:
            Each turn as soon as it is answered.

        Raises:
            StreamError, HostError, SessionError, SessionConflictError, StoreError: As `feed`.
        """
        for block in blocks:
            yield from self.feed(block)
        yield from self.finish()

    def __enter__(self) -> "EmotionStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Finish the stream, so that the memory has all of it. After an exception, speech that continues is dropped."""
        if kind is None:
            self.rest += self.finish()
        self._ended = True

    def _answer(self, turns: Sequence[SpokenTurn]) -> list[LiveEntry]:
        self._waiting += turns
        while self._waiting:
            spoken = self._waiting.popleft()
            turn = spoken.turn
            utterance = Utterance(
                self.session_id, f"{self._count:04d}", turn.speaker, Path(self.session_id), turn.start_s, turn.end_s,
                channel=turn.channel,
            )  # fmt: skip
            answer, *others = self._arms
            (result,) = answer.answer([utterance], waveforms=[spoken.waveform])
            delay_s = time.perf_counter() - self._arrivals.of(spoken.voice_end_s)
            plain = [other.answer([utterance], waveforms=[spoken.waveform])[0] for other in others]
            self._count += 1
            self._answered.append(LiveEntry(turn, result, *plain, delay_s=delay_s, waveform=spoken.waveform))
        answered, self._answered = self._answered, []
        return answered

    def _samples(self, block: npt.ArrayLike | bytes) -> Samples:
        if isinstance(block, (bytes, bytearray, memoryview)):
            return self._decoder(bytes(block))
        array = np.asarray(block)
        if array.dtype in (np.int16, np.int32):
            array = array / np.float32(-float(np.iinfo(array.dtype).min))
        if not np.issubdtype(array.dtype, np.floating):
            raise StreamError(
                f"a block must be floating point from -1 to 1, or integers of 16 or 32 bits, got {array.dtype}"
            )
        return np.asarray(array[:, np.newaxis] if array.ndim == 1 else array, dtype=np.float32)


def live_settings(settings: TurnSettings | None, longest_s: float) -> TurnSettings:
    """The settings of a stream, which always have a longest turn.

    Raises:
        ConfigError: The settings' longest turn is longer than the host takes.
    """
    settings = settings or TurnSettings()
    if settings.max_s is None:
        return replace(settings, max_s=min(longest_s, LONGEST_TURN_S))
    if settings.max_s > longest_s:
        raise ConfigError(f"max_s is {settings.max_s:g} s, but the host takes utterances of at most {longest_s:g} s")
    return settings


def speakers_of(channels: int | Sequence[str]) -> tuple[str, ...]:
    """The name of each channel's speaker: "?" for one channel, "channel 0", "channel 1", … for several.

    Raises:
        ConfigError: There is no channel, a name is empty, or two names are equal.
    """
    if isinstance(channels, int):
        check_integer("channels", channels, 1)
        return ("?",) if channels == 1 else tuple(f"channel {number}" for number in range(channels))
    names = (channels,) if isinstance(channels, str) else tuple(channels)
    if not names or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"channels must be a number, or a different name per channel, got {channels!r}")
    return names

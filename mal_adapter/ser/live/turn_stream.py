"""`TurnStream`: the turns of a stream and their sound, as soon as each of them ends."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mal_adapter.errors import StreamError
from mal_adapter.ser.live.codecs import Resampler, Samples
from mal_adapter.ser.live.history import History
from mal_adapter.ser.recognizer.audio import Waveform
from mal_adapter.ser.turns.detector import SpeechDetector, speech_probabilities
from mal_adapter.ser.turns.shaping import OVERLAP_S
from mal_adapter.ser.turns.speech import Speech
from mal_adapter.ser.turns.turn import Turn, TurnSettings
from mal_adapter.ser.turns.voice import RATES, WINDOW_S

__all__ = ["SpokenTurn", "TurnStream", "feed_streams"]


class SpokenTurn(NamedTuple):
    """A turn that has ended.

    Attributes:
        turn: When it is, with its padding, and whose it is.
        waveform: Its sound, (samples,) float32 at the host's rate.
        voice_end_s: Where its speech ends, without padding, in seconds from the start of the stream.
    """

    turn: Turn
    waveform: Waveform
    voice_end_s: float


class TurnStream:
    """Finds turns in blocks of any size. What is found does not depend on the blocks' sizes.

    A turn is given as soon as its speech has ended, which a pause of `merge_s` shows, and not in order of start, as
    `find_turns` does, which would have to wait for the end of speech of another channel that began before. Otherwise
    the turns are those of `find_turns`, except that padding and overlaps take only what is known by then: speech of
    another channel that may be crosstalk is known 0.4 s later, and too short speech counts while it lasts.

    The memory is bounded: the sound of speech that continues is kept for at most `max_s`, otherwise the last half
    second.

    Args:
        sampling_rate: Of the blocks, in Hz.
        wanted_rate: Of the turns' sound, in Hz.
        speakers: The name of each channel's speaker; ("?",) is a channel of unknown speakers.
        settings: `max_s` must be set.
    """

    def __init__(self, sampling_rate: int, wanted_rate: int, speakers: Sequence[str], settings: TurnSettings) -> None:
        assert settings.max_s is not None
        rate = RATES[0] if sampling_rate < RATES[1] else RATES[1]  # as `find_turns`
        self._speakers = tuple(speakers)
        self._pad_s = min(settings.pad_s, settings.max_s / 4)  # as `TurnShaper`
        self._window = round(WINDOW_S * rate)
        self._resampler = Resampler(sampling_rate, rate, len(self._speakers))
        self._detector = SpeechDetector(rate, len(self._speakers), settings)
        self._history = History(sampling_rate, wanted_rate, len(self._speakers))
        self._pending = np.zeros((0, len(self._speakers)), dtype=np.float32)
        self._recent: list[Speech] = []
        self._finished = False

    @property
    def position_s(self) -> float:
        """Seconds of the stream in which speech has been looked for."""
        return self._detector.position_s

    @property
    def kept_s(self) -> float:
        """Seconds of sound in memory."""
        return self._history.seconds

    def speaking_since(self, channel: int) -> float | None:
        """The start of speech that has not ended, in seconds; None in a pause. It may yet be too short for a turn."""
        return self._detector.speaking_since(channel)

    def feed(self, block: Samples) -> list[SpokenTurn]:
        """Continue with a block.

        Args:
            block: (frames, channels) float32.

        Returns:
            The turns that have ended, in order of the ends of their speech.

        Raises:
            StreamError: The block has another shape, or samples that are not finite; or the stream has been finished.
        """
        (turns,) = feed_streams([self], [block])
        return turns

    def finish(self) -> list[SpokenTurn]:
        """End the stream. Speech that has not ended is a turn up to here."""
        if self._finished:
            return []
        samples = self._windows(self._take(self._pending[:0], last=True))
        turns = self._look(samples, *speech_probabilities([self._detector], [samples]))
        self._finished = True
        rest, self._pending = self._pending, self._pending[:0]
        turns += self._turns(self._detector.feed(rest))
        turns += self._turns(self._detector.finish())
        self._history.drop(self._detector.position_s)
        return turns

    def _take(self, block: Samples, *, last: bool = False) -> int:
        """Take a block. Returns how many windows are whole now."""
        if self._finished:
            raise StreamError("the stream has been finished; begin another one")
        if block.ndim != 2 or block.shape[1] != len(self._speakers):
            raise StreamError(f"a block must have the shape (frames, {len(self._speakers)}), got {block.shape}")
        if not np.isfinite(block).all():
            raise StreamError("a block has samples that are not finite (NaN or infinity)")
        self._history.append(block)
        self._pending = np.concatenate((self._pending, self._resampler(block, last=last)))
        return len(self._pending) // self._window

    def _windows(self, count: int) -> Samples:
        """The next whole windows, (count * window, channels)."""
        end = count * self._window
        samples, self._pending = self._pending[:end], self._pending[end:]
        return samples

    def _look(self, samples: Samples, probabilities: npt.NDArray[np.float32]) -> list[SpokenTurn]:
        """The turns that have ended in whole windows. These are looked at one by one, so that what is known at the end
        of a turn does not depend on the blocks."""
        turns = []
        for number in range(len(probabilities)):
            window = samples[number * self._window : (number + 1) * self._window]
            turns += self._turns(self._detector.feed(window, probabilities[number : number + 1]))
        return turns

    def _turns(self, ended: Sequence[Speech]) -> list[SpokenTurn]:
        """The turns of speech that has ended within the last window."""
        self._recent += ended
        going_on = [
            Speech(since, math.inf, channel)
            for channel in range(len(self._speakers))
            if (since := self._detector.speaking_since(channel)) is not None
        ]
        turns = [self._turn(speech, [*self._recent, *going_on]) for speech in ended]
        # Nothing that starts later takes anything from before this second.
        earliest_s = min(speech.start_s for speech in (*going_on, self._settled)) - 2 * self._pad_s
        self._recent = [speech for speech in self._recent if speech.end_s >= earliest_s]
        self._history.drop(earliest_s)
        return turns

    @property
    def _settled(self) -> Speech:
        return Speech(self._detector.settled_s, math.inf)

    def _turn(self, speech: Speech, all_speech: Sequence[Speech]) -> SpokenTurn:
        """The turn of speech that has ended, with `TurnShaper`'s padding."""
        others = [other for other in all_speech if other is not speech]
        common_s = (
            min(other.end_s, speech.end_s) - max(other.start_s, speech.start_s)
            for other in others
            if other.channel != speech.channel
        )
        first = (speech.start_s, speech.channel)
        before = [other for other in others if (other.start_s, other.channel) < first]
        last_s = max((other.end_s for other in before), default=-math.inf)
        next_s = min((other.start_s for other in others if other.end_s > speech.end_s), default=math.inf)
        before_s = min(self._pad_s, speech.start_s, max(0.0, speech.start_s - last_s) / 2)
        after_s = min(self._pad_s, self.position_s - speech.end_s, max(0.0, next_s - speech.end_s) / 2)
        start_s, end_s = speech.start_s - before_s, speech.end_s + after_s
        channel = None if self._speakers == ("?",) else speech.channel
        overlaps = any(seconds >= OVERLAP_S for seconds in common_s)
        turn = Turn(start_s, end_s, self._speakers[speech.channel], channel, overlaps=overlaps)
        waveform = self._history.part(start_s, end_s, speech.channel, self.position_s)
        return SpokenTurn(turn, waveform, speech.end_s)


def feed_streams(streams: Sequence[TurnStream], blocks: Sequence[Samples]) -> list[list[SpokenTurn]]:
    """As `feed` of each stream, with the windows of all of them in the network at once.

    Args:
        streams: Different ones.
        blocks: Of each stream.

    Returns:
        The turns of each stream that have ended.

    Raises:
        StreamError: As `TurnStream.feed`.
    """
    counts = [stream._take(block) for stream, block in zip(streams, blocks, strict=True)]
    samples = [stream._windows(count) for stream, count in zip(streams, counts, strict=True)]
    probabilities = speech_probabilities([stream._detector for stream in streams], samples)
    return [stream._look(*found) for stream, *found in zip(streams, samples, probabilities, strict=True)]

"""Speech in a stream of samples, per channel, as it comes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mal_adapter.errors import AudioError, ConfigError
from mal_adapter.ser.turns.crosstalk import Crosstalk
from mal_adapter.ser.turns.speech import HYSTERESIS, ChannelSpeech, Speech
from mal_adapter.ser.turns.turn import TurnSettings
from mal_adapter.ser.turns.voice import VoiceActivity, feed_together

__all__ = ["SpeechDetector", "speech_probabilities"]


class SpeechDetector:
    """Finds speech in a stream, in blocks of any size.

    The blocks' sizes do not change what is found. A detector keeps a few kilobytes, and the levels of speech that goes
    on if `max_s` is set. Detectors share only constants, so each may run in its own thread.

    Args:
        sampling_rate: 8000 or 16000, in Hz.
        channels: Number of channels.
        settings: `threshold`, `min_s`, `max_s`, `pad_s` and `merge_s` are used. Speech that would be longer than
            `max_s` with its padding is split at its quietest place as soon as it gets longer.

    Raises:
        ConfigError: Another rate, or no channels.
        MissingDependencyError: silero-vad is not installed.

    Example:
        >>> detector = SpeechDetector(8_000)
        >>> for _ in range(50):
        ...     assert detector.feed(np.zeros(160, dtype=np.float32)) == []
        >>> detector.position_s, detector.speaking_since(), detector.finish()
        (1.0, None, [])
    """

    def __init__(self, sampling_rate: int, channels: int = 1, settings: TurnSettings | None = None) -> None:
        self._voice = VoiceActivity(sampling_rate, channels)
        settings = settings or TurnSettings()
        self.sampling_rate = sampling_rate
        self.channels = channels
        self._channels = [
            ChannelSpeech(number, sampling_rate, self._voice.window, settings) for number in range(channels)
        ]
        self._crosstalk = None
        if channels > 1:
            self._crosstalk = Crosstalk(channels, sampling_rate, settings, settings.threshold - HYSTERESIS)
        self._samples = 0
        self._rest = np.zeros((0, channels), dtype=np.float32)  # less than a window
        self._finished = False

    @property
    def position_s(self) -> float:
        """Seconds of sound that were fed."""
        return self._samples / self.sampling_rate

    def speaking_since(self, channel: int = 0) -> float | None:
        """The start of the speech of a channel, in seconds from the start of the stream; None in a pause.

        Speech has ended when its pause is longer than `merge_s`. Speech shorter than `min_s` counts here as well, since
        it may become longer.

        Raises:
            ConfigError: There is no such channel.
        """
        if not 0 <= channel < self.channels:
            raise ConfigError(f"channel must be from 0 to {self.channels - 1}, got {channel}")
        return self._channels[channel].since_s

    @property
    def settled_s(self) -> float:
        """All speech that `feed` and `finish` have not returned yet starts at this time, in seconds, or later."""
        return min(channel.settled_s for channel in self._channels)

    def feed(self, samples: npt.ArrayLike, probabilities: npt.NDArray[np.float32] | None = None) -> list[Speech]:
        """Continue the stream.

        Args:
            samples: (samples, channels), or (samples,) of one channel: floating point, from -1 to 1.
            probabilities: What `speech_probabilities` has returned for these samples.

        Returns:
            The speech that has ended since the last call, in order of end.

        Raises:
            ConfigError: The samples have another shape or type, or the stream has been finished.
            AudioError: Samples are not finite. They are left out, and the stream can continue.
        """
        return self._process(self._checked(samples), probabilities=probabilities)

    def finish(self) -> list[Speech]:
        """End the stream.

        Returns:
            The rest of the speech, in order of end. A second call returns nothing.
        """
        if self._finished:
            return []
        window = self._voice.window
        missing = -len(self._rest) % window
        found = self._process(np.zeros((missing, self.channels), dtype=np.float32), real=False)
        found += [speech for channel in self._channels for speech in channel.finish(self._samples)]
        self._finished = True
        return sorted(found, key=lambda speech: (speech.end_s, speech.channel))

    def _process(
        self,
        samples: npt.NDArray[np.float32],
        real: bool = True,
        probabilities: npt.NDArray[np.float32] | None = None,
    ) -> list[Speech]:
        if real:
            self._samples += len(samples)
        if probabilities is None:
            probabilities = self._voice.feed(samples)
        samples = np.concatenate((self._rest, samples))
        window, count = self._voice.window, len(probabilities)
        self._rest = samples[count * window :].copy()
        samples = samples[: count * window]
        windows = samples.reshape(count, window, self.channels)
        rows = np.stack((probabilities, np.einsum("wsc,wsc->wc", windows, windows) / window), axis=2)
        if self._crosstalk is None:
            parts = [rows[:, channel] for channel in range(self.channels)]
        else:
            parts = self._crosstalk.feed(samples, rows, last=not real)
        found = [
            speech
            for channel, part in zip(self._channels, parts, strict=True)
            for speech in channel.feed(part[:, 0].tolist(), part[:, 1].tolist())
        ]
        return sorted(found, key=lambda speech: (speech.end_s, speech.channel))

    def _checked(self, samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
        array = np.asarray(samples)
        if self._finished:
            raise ConfigError("the stream was finished; make another SpeechDetector for the next one")
        if array.ndim == 1 and self.channels == 1:
            array = array[:, np.newaxis]
        if array.ndim != 2 or array.shape[1] != self.channels:
            raise ConfigError(f"samples must have the shape (samples, {self.channels}), got {array.shape}")
        if not np.issubdtype(array.dtype, np.floating):
            raise ConfigError(f"samples must be floating point from -1 to 1, got {array.dtype}; divide by its range")
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise AudioError(f"samples after {self.position_s:.2f} s are not finite (NaN or infinity)")
        return array


def speech_probabilities(
    detectors: Sequence[SpeechDetector], blocks: Sequence[npt.NDArray[np.float32]]
) -> list[npt.NDArray[np.float32]]:
    """The probabilities of speech in the next blocks of several streams, with as few passes through the network as
    possible. The streams continue with `feed(block, probabilities)`, in one call or in parts.

    Args:
        detectors: Of different streams.
        blocks: Of each stream, (samples, channels) float32, finite.

    Returns:
        Per stream (windows, channels): of the windows that are complete with its block.

    Example:
        >>> detectors = [SpeechDetector(8_000) for _ in range(50)]
        >>> blocks = [np.zeros((512, 1), dtype=np.float32)] * 50
        >>> found = speech_probabilities(detectors, blocks)
        >>> found[0].shape, detectors[0].feed(blocks[0], found[0])
        ((2, 1), [])
    """
    return feed_together([detector._voice for detector in detectors], blocks)

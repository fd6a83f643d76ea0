"""The probability of speech, window by window: silero-vad's network, for several channels and any number of windows at
once."""

import importlib.util
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mal_adapter.errors import ConfigError, MissingDependencyError
from mal_adapter.extras import require

__all__ = ["RATES", "WINDOW_S", "VoiceActivity", "feed_together"]

#: Sampling rates, in Hz, that the network was trained for.
RATES = (8_000, 16_000)
#: The network's window, in seconds.
WINDOW_S = 0.032
#: How many windows of all channels go through the first layers at once: about 10 MB.
_AT_ONCE = 2048
_STRIDES = (1, 2, 2, 1)


class _Layers(NamedTuple):
    """The network's weights, as matrices: a convolution over a few frames takes longer than its multiplication."""

    spectrum: Tensor  # (frame, 2 * bins): cosines, then sines
    convolutions: tuple[tuple[Tensor, Tensor], ...]  # (3 * inputs, outputs), (outputs,)
    recurrence: nn.LSTM
    answer: tuple[Tensor, Tensor]  # (1, hidden), (1,)


class VoiceActivity:
    """The probability of speech in each window of 32 ms of a stream.

    The weights are shared by all streams of a process and never change; each stream has its own state, of a few
    kilobytes. So many streams can run in many threads.

    Args:
        sampling_rate: 8000 or 16000, in Hz.
        channels: Number of channels, which don't influence each other.

    Raises:
        ConfigError: Another rate, or no channels.
        MissingDependencyError: silero-vad is not installed.

    Example:
        >>> voice = VoiceActivity(8_000, channels=2)
        >>> voice.feed(np.zeros((1_000, 2), dtype=np.float32)).shape  # three windows of 256 samples
        (3, 2)
    """

    def __init__(self, sampling_rate: int, channels: int = 1) -> None:
        if sampling_rate not in RATES:
            raise ConfigError(f"voice activity is found at {RATES[0]} or {RATES[1]} Hz, got {sampling_rate}; resample")
        if channels < 1:
            raise ConfigError(f"channels must be at least 1, got {channels}")
        self.sampling_rate = sampling_rate
        self.window = round(WINDOW_S * sampling_rate)
        self._context = self.window // 8  # samples of the window before
        self._layers = _layers(sampling_rate)
        with torch.inference_mode():
            zeros = torch.zeros(1, channels, 128, dtype=torch.float32, device="cpu")
            self._state = (zeros, zeros)
        self._rest = np.zeros((self._context, channels), dtype=np.float32)  # the context, and less than a window

    def feed(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Continue the stream.

        Args:
            samples: (samples, channels), finite; any number of samples.

        Returns:
            (windows, channels): the windows that are now complete.
        """
        samples = np.concatenate((self._rest, samples))
        count = (len(samples) - self._context) // self.window
        self._rest = samples[count * self.window :].copy()
        probabilities = np.empty((count, samples.shape[1]), dtype=np.float32)
        step = max(1, _AT_ONCE // samples.shape[1])
        for first in range(0, count, step):
            last = min(count, first + step)
            part = samples[first * self.window : last * self.window + self._context]
            probabilities[first:last] = self._probabilities(part)
        return probabilities

    @torch.inference_mode()
    def _probabilities(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        channels = samples.shape[1]
        # (windows, channels, context + window)
        windows = torch.from_numpy(samples).unfold(0, self._context + self.window, self.window)
        seen = self._encode(windows.reshape(-1, windows.shape[-1])).reshape(-1, channels, 128)
        hidden, self._state = self._layers.recurrence(seen, self._state)
        answer = nn.functional.linear(hidden.relu(), *self._layers.answer).sigmoid()
        return answer[..., 0].numpy()

    def _encode(self, windows: Float[Tensor, "rows samples"]) -> Float[Tensor, "rows 128"]:
        frame = 4 * self._context  # in samples; a frame starts every half of it
        padded = torch.cat((windows, windows[:, -self._context - 1 : -1].flip(1)), dim=1)
        spectrum = padded.unfold(1, frame, frame // 2) @ self._layers.spectrum
        cosines, sines = spectrum.chunk(2, dim=2)
        seen = (cosines.square() + sines.square()).sqrt()
        for stride, (weight, bias) in zip(_STRIDES, self._layers.convolutions, strict=True):
            padded = nn.functional.pad(seen, (0, 0, 1, 1))
            rows, frames, width = padded.shape
            # Three frames that follow each other are one row in memory.
            size = (rows, (frames - 3) // stride + 1, 3 * width)
            triples = padded.as_strided(size, (frames * width, stride * width, 1))
            seen = torch.addmm(bias, triples.reshape(-1, 3 * width), weight).relu().reshape(rows, -1, weight.shape[1])
        return seen[:, 0]


def feed_together(
    voices: Sequence[VoiceActivity], blocks: Sequence[npt.NDArray[np.float32]]
) -> list[npt.NDArray[np.float32]]:
    """As `feed` of each stream, in as few passes through the network as possible.

    A window of one stream costs a third of a millisecond, and one of fifty streams together one millisecond.

    Args:
        voices: Different streams.
        blocks: Of each stream, as for its `feed`.

    Returns:
        The probabilities of each stream.
    """
    found = [np.empty((0, block.shape[1]), dtype=np.float32) for block in blocks]
    groups: dict[tuple[int, int], list[tuple[int, npt.NDArray[np.float32]]]] = {}
    for place, (voice, block) in enumerate(zip(voices, blocks, strict=True)):
        samples = np.concatenate((voice._rest, block))
        count = (len(samples) - voice._context) // voice.window
        voice._rest = samples[count * voice.window :].copy()
        if count:
            groups.setdefault((voice.sampling_rate, count), []).append((place, samples))
    for (rate, count), members in groups.items():
        group = [voices[place] for place, _ in members]
        channels = [samples.shape[1] for _, samples in members]
        joint = VoiceActivity(rate, sum(channels))
        joint._rest = joint._rest[:0]
        joint._state = _joined([voice._state for voice in group])
        length = joint._context + count * joint.window
        together = joint.feed(np.concatenate([samples[:length] for _, samples in members], axis=1))
        states = zip(*(torch.split(part, channels, dim=1) for part in joint._state), strict=True)
        parts = np.split(together, np.cumsum(channels)[:-1], axis=1)
        for (place, _), voice, (hidden, cell), part in zip(members, group, states, parts, strict=True):
            voice._state = (hidden, cell)
            found[place] = part
    return found


def _joined(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    hidden, cells = zip(*states, strict=True)
    return torch.cat(hidden, dim=1), torch.cat(cells, dim=1)


@lru_cache(maxsize=len(RATES))
def _layers(sampling_rate: int) -> _Layers:
    """Read the weights from the installed silero-vad. The package is not imported: that would set torch's number of
    threads for the whole process."""
    require("voice activity", "silero_vad", extra="recordings")
    spec = importlib.util.find_spec("silero_vad")
    path = Path((spec and spec.origin) or "").parent / "data" / "silero_vad.jit"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 advises torch.export to its makers
            network = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        weights = getattr(network, "_model" if sampling_rate == 16_000 else "_model_8k").state_dict()
        recurrence = nn.LSTM(128, 128, device="meta")  # so that no random numbers are drawn
        recurrence.load_state_dict(
            {f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
            assign=True,
        )
        convolutions = tuple(
            (
                weights[f"encoder.{place}.reparam_conv.weight"].permute(2, 1, 0).flatten(0, 1).contiguous(),
                weights[f"encoder.{place}.reparam_conv.bias"],
            )
            for place in range(len(_STRIDES))
        )
        return _Layers(
            weights["stft.forward_basis_buffer"][:, 0].t().contiguous(),
            convolutions,
            recurrence.requires_grad_(False).eval(),
            (weights["decoder.decoder.2.weight"][..., 0], weights["decoder.decoder.2.bias"]),
        )
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise MissingDependencyError(
            f"the network of the installed silero-vad can not be read ({error}): pip install 'silero-vad>=6.2,<7'",
            name="silero_vad",
        ) from error

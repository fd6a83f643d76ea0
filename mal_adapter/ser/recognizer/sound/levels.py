"""Silence, and channels that cancel, measured block by block."""

import numpy as np
import numpy.typing as npt

from mal_adapter.ser.recognizer.sound.source import DamagedSoundError

__all__ = ["CANCELLED", "Levels"]

#: Audio with at most this peak amplitude counts as silent: -80 dBFS, three steps of 16-bit sound.
SILENCE_PEAK = 1e-4
#: In windows of this length, whatever a parabola fits is offset or drift, and not sound.
WINDOW_S = 0.05
#: A codec rings for this long where a constant begins or ends, and no louder than the constant.
EDGE_S = 0.4
#: A lossy codec adds noise of up to this share to a constant.
CODEC_NOISE = 0.03
#: The channels of a window cancel if their mean has less than this share of the power of independent channels.
CANCELLED = 0.05
#: The share of the sound's energy that may be in windows whose channels cancel.
CANCELLED_SHARE = 0.3

_Floats = npt.NDArray[np.float64]


class Levels:
    """Measures the levels of blocks of sound, without their offset.

    Args:
        channels: Number of channels of the blocks.
        sampling_rate: In Hz.
        lossy: Whether the file's encoding keeps a constant only roughly.
    """

    def __init__(self, channels: int, sampling_rate: int, lossy: bool) -> None:
        self._window = max(4, round(WINDOW_S * sampling_rate))
        self._edge = round(EDGE_S / WINDOW_S)
        self._lossy = lossy
        self._rest = np.empty((0, channels), dtype=np.float32)
        #: Per window: peak without offset, offset, power of independent channels' mean, power of the channels' mean.
        self._rows: list[_Floats] = []
        self._peak = 0.0
        self._has_sound = False

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Measure a block, (frames, channels) float32.

        Raises:
            DamagedSoundError: It has values that are not finite.
        """
        peak = float(np.abs(block).max(initial=0.0))
        if not np.isfinite(peak):
            raise DamagedSoundError("the audio contains values that are not finite (NaN or infinity); export it again")
        self._peak = max(self._peak, peak)
        if self._has_sound and block.shape[1] == 1:
            return  # the result is known: there is sound, and one channel can't cancel
        block = np.concatenate((self._rest, block)) if len(self._rest) else block
        count = len(block) // self._window
        if count:
            self._measure(block[: count * self._window].reshape(count, self._window, -1))
            self._has_sound = self._has_sound or self._sounds_inside()
        self._rest = block[count * self._window :].copy()

    def check(self, at_start: bool, at_end: bool) -> None:
        """Check all blocks that were added.

        Args:
            at_start: Whether the first block is at the start of the file.
            at_end: Whether the last block is at the end of the file.

        Raises:
            DamagedSoundError: The blocks are silent, or their channels cancel.
        """
        if self._has_sound and self._rest.shape[1] == 1:
            return
        if len(self._rest):
            self._measure(self._rest[np.newaxis])
        peak, offset, independent, mean = np.concatenate(self._rows, axis=1)
        active = self._is_active(peak, offset) & ~self._rings(peak, offset, at_start, at_end)
        if not active.any():
            raise DamagedSoundError(
                f"the audio is silent ({self._silence(offset)}); check the recording or leave this utterance out"
            )
        lost = independent[mean < CANCELLED * independent].sum()
        if lost > CANCELLED_SHARE * independent.sum():
            raise DamagedSoundError(
                "its channels cancel each other: one is the inverse of another, and their mean has almost no sound; "
                "use one channel: \"channel\": 0 in a manifest, or ffmpeg -i in.wav -af 'pan=mono|c0=c0' out.wav"
            )

    def _measure(self, windows: npt.NDArray[np.float32]) -> None:
        """Add the rows of these windows, (windows, frames, channels)."""
        values = windows.astype(np.float64)
        offset = values.mean(axis=1, keepdims=True)
        values -= offset
        frames = values.shape[1]
        if frames >= 32:  # fewer occur at the end of a file; a parabola would fit sound there too
            basis = _parabola(frames)
            values -= basis @ (basis.T @ values)
        count = values.shape[2]
        independent = np.square(values).mean(axis=1).sum(axis=1) / count**2
        mean = np.square(values.mean(axis=2)).mean(axis=1)
        # Rounding errors in float64 are not sound, however large the offset is.
        peak = np.maximum(0.0, np.abs(values).max(axis=(1, 2)) - 1e-9 * np.abs(offset).max(axis=(1, 2)))
        self._rows.append(np.stack((peak, np.abs(offset).max(axis=(1, 2)), independent, mean)))

    def _is_active(self, peak: _Floats, offset: _Floats) -> npt.NDArray[np.bool_]:
        return peak > np.maximum(SILENCE_PEAK, CODEC_NOISE * offset if self._lossy else 0.0)

    def _sounds_inside(self) -> bool:
        """Whether there is sound in windows that are at neither end of the file, whatever its length."""
        rows = np.concatenate(self._rows, axis=1)[:, self._edge : -self._edge]
        return bool(self._is_active(rows[0], rows[1]).any())

    def _rings(self, peak: _Floats, offset: _Floats, at_start: bool, at_end: bool) -> npt.NDArray[np.bool_]:
        """Which windows at the ends of the file may be only the response of a filter or codec to an offset that starts
        or ends there."""
        rings = np.zeros(peak.size, dtype=bool)
        edge = min(self._edge, peak.size // 3)
        if edge == 0:
            return rings
        inside = float(np.median(offset[edge:-edge]))
        for there, ends in ((at_start, slice(0, edge)), (at_end, slice(-edge, None))):
            # Opus fades an offset out, so only the windows at the very end still have some of it.
            height = max(inside, float(offset[ends].max())) if self._lossy else inside
            rings[ends] = there & (peak[ends] <= height)
        return rings

    def _silence(self, offset: _Floats) -> str:
        if self._peak == 0:
            return "all samples are zero"
        if self._peak <= SILENCE_PEAK:
            return f"its peak is {20 * np.log10(self._peak):.0f} dBFS"
        return f"there is nothing but an offset of up to {offset.max():.4f}"


def _parabola(frames: int) -> _Floats:
    """(frames, 2): what is left of a parabola without its mean, as an orthonormal basis."""
    time = np.linspace(-1.0, 1.0, frames)
    basis = np.stack((time, time**2 - np.mean(time**2)), axis=1)
    return np.asarray(basis / np.linalg.norm(basis, axis=0), dtype=np.float64)

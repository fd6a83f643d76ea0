"""Whisper's spectrum, without computing it for the silence that pads a clip to the extractor's window."""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import WhisperFeatureExtractor

__all__ = ["without_padding"]

_Floats = npt.NDArray[np.float32]


def without_padding(processor: Any) -> Any:
    """A copy of a processor whose spectra take as long as the sound is, and not as long as the extractor's window.

    Whisper's extractor pads each clip to 30 s and computes the spectrum of all of it. The frames after the longest clip
    of a batch are equal, so one of them is computed. `processor` is not changed.

    Args:
        processor: Of any host. Returned as it is unless its extractor is Whisper's own.

    Example:
        >>> from mal_adapter.demo import HOST_FOLDER
        >>> from mal_adapter.ser import load_host
        >>> _, processor = load_host(str(HOST_FOLDER))
        >>> clip = np.sin(np.arange(16_000, dtype=np.float32) / 9)  # one second, in a window of six
        >>> options = dict(sampling_rate=16_000, return_tensors="np")
        >>> whole = processor.feature_extractor(clip, **options).input_features
        >>> quick = without_padding(processor).feature_extractor(clip, **options).input_features
        >>> bool(np.allclose(quick, whole, rtol=0, atol=1e-5))
        True
    """
    extractor: Any = getattr(processor, "feature_extractor", None)
    # Not its subclasses, which may compute something else; and dither is noise, which differs from frame to frame.
    if type(extractor) is not WhisperFeatureExtractor or extractor.dither:
        return processor
    quick = object.__new__(_SoundOnly)
    quick.__dict__.update(extractor.__dict__)
    twin = copy.copy(processor)
    twin.feature_extractor = quick
    return twin


class _SoundOnly(WhisperFeatureExtractor):
    def _torch_extract_fbank_features(self, waveform: _Floats, device: str = "cpu") -> _Floats:
        """(batch, mels, frames) of the padded clips (batch, samples). transformers 4.57 to 5.23 have this method."""
        sounding = np.flatnonzero(waveform.any(axis=0))
        samples = int(sounding[-1]) + 1 if sounding.size else 0
        # Frame t is made of the samples around t · hop_length. The last of these frames is the first with no sound.
        frames = -(-(samples + self.n_fft // 2) // self.hop_length) + 1
        end = frames * self.hop_length + self.n_fft // 2  # where the mirror image that the STFT adds is silent too
        if end >= waveform.shape[1]:
            return np.asarray(super()._torch_extract_fbank_features(waveform, device))
        features = super()._torch_extract_fbank_features(waveform[:, :end].copy(), device)
        silent = (waveform.shape[1] - self.n_fft % 2) // self.hop_length - frames
        return np.pad(features[:, :, :frames], ((0, 0), (0, 0), (0, silent)), mode="edge")

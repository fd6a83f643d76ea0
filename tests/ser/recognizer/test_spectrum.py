import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from mal_adapter.demo import HOST_FOLDER
from mal_adapter.ser import load_host
from mal_adapter.ser.recognizer.spectrum import without_padding

RATE = 16_000


class Processor:
    def __init__(self, extractor: Any) -> None:
        self.feature_extractor = extractor


def spectra(extractor: Any, clips: list[Any]) -> tuple[Any, Any]:
    made = extractor(clips, sampling_rate=RATE, return_attention_mask=True, return_tensors="np")
    return made.input_features, made.attention_mask


@given(
    lengths=st.lists(st.integers(1, 3 * RATE), min_size=1, max_size=4),
    hop=st.integers(40, 500),
    n_fft=st.integers(64, 1200),
    seed=st.integers(0, 99),
    gap=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_spectra_are_those_of_the_whole_window(lengths: list[int], hop: int, n_fft: int, seed: int, gap: bool) -> None:
    noise = np.random.default_rng(seed)
    clips = [noise.normal(0, 0.1, length).astype(np.float32) for length in lengths]
    if gap:  # a recording may end in digital silence
        clips[0][len(clips[0]) // 2 :] = 0
    whole = WhisperFeatureExtractor(feature_size=16, hop_length=hop, n_fft=n_fft, chunk_length=2)
    quick = without_padding(Processor(whole)).feature_extractor
    (features, mask), (expected, expected_mask) = spectra(quick, clips), spectra(whole, clips)
    assert (features.shape, features.dtype) == (expected.shape, expected.dtype)
    # The matrix product sums in another order where it has few columns: one unit in the last place of a logarithm.
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(mask, expected_mask)


def test_no_frames_are_computed_for_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = WhisperFeatureExtractor()
    samples: list[int] = []
    stft = torch.stft

    def counted(waveform: torch.Tensor, *options: Any, **more: Any) -> torch.Tensor:
        samples.append(waveform.shape[-1])
        return stft(waveform, *options, **more)

    monkeypatch.setattr(torch, "stft", counted)
    clips = [np.ones(RATE, np.float32), np.ones(RATE // 2, np.float32)]
    spectra(whole, clips)
    spectra(without_padding(Processor(whole)).feature_extractor, clips)
    assert samples[0] == 30 * RATE
    assert samples[1] < 1.1 * RATE


def test_the_given_processor_is_not_changed() -> None:
    _, processor = load_host(str(HOST_FOLDER))
    before, extractor = dict(vars(processor)), processor.feature_extractor
    twin = without_padding(processor)
    assert type(twin) is type(processor)
    assert twin.tokenizer is processor.tokenizer
    assert twin.feature_extractor is not extractor
    assert vars(processor) == before
    assert type(extractor) is WhisperFeatureExtractor


def test_other_extractors_are_left_as_they_are() -> None:
    class Other(WhisperFeatureExtractor):
        pass

    dithered = copy.copy(WhisperFeatureExtractor())
    dithered.dither = 1e-4  # noise, also where the padding is
    for extractor in (Other(), dithered, None):
        processor = Processor(extractor)
        assert without_padding(processor) is processor

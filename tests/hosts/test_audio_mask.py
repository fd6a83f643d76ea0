"""Padding as the attention mask of a call gives it, for hosts with audio at every position."""

import pytest
import torch
from transformers import DynamicCache

from mal_adapter import HostSpec
from mal_adapter.errors import AudioMaskError
from mal_adapter.hosts import find_audio_mask

EVERYWHERE = HostSpec(audio_positions="every", feature_arguments=("input_features",))
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # on the left, as generate() needs it


def call(seq_len: int, **arguments: object) -> dict[str, object]:
    return {"input_ids": torch.zeros(2, seq_len, dtype=torch.long), "input_features": torch.zeros(2, 4), **arguments}


def cache_of(length: int) -> DynamicCache:
    cache = DynamicCache()
    if length:
        cache.update(torch.zeros(2, 1, length, 4), torch.zeros(2, 1, length, 4), 0)
    return cache


def audio_of(seq_len: int, **arguments: object) -> list[list[bool]]:
    mask = find_audio_mask(EVERYWHERE, torch.nn.Module(), call(seq_len, **arguments))
    assert mask is not None
    return mask.tolist()


@pytest.mark.parametrize("past", [0, 2, 4])
@pytest.mark.parametrize("form", ["2-D", "4-D bool", "4-D added"])
def test_the_end_of_the_mask_gives_the_padding_of_a_call_on_a_cache(past: int, form: str):
    seq_len = PADDED.shape[1] - past
    mask = PADDED
    if form != "2-D":
        attends = torch.ones(5, 5, dtype=torch.bool).tril() & PADDED[:, None].bool()
        mask = torch.nn.functional.pad(attends[:, None, past:], (0, 3))  # a static cache has room for more
        if form == "4-D added":
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    expected = PADDED[:, past:].bool().tolist()
    assert audio_of(seq_len, attention_mask=mask, past_key_values=cache_of(past)) == expected


def test_without_a_mask_nothing_is_padding():
    assert audio_of(3) == [[True] * 3] * 2


def test_a_mask_of_an_unknown_shape_is_refused():
    with pytest.raises(AudioMaskError, match="dict"):
        audio_of(3, attention_mask={"full_attention": None})

"""The frozen host cut in two at the hooked layer, so that an adapter trains in minutes on cached activations.

Everything up to the hooked layer's output is frozen and knows no dialogue: it is computed once per utterance and kept.
The layers above it run again in training, with the adapter's residual added, and are differentiable with respect to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from mal_adapter.demo import EMOTIONS, LAYER_IDX, PROMPT
from mal_adapter.demo.features import FRAMES, Features
from mal_adapter.demo.host import audio_tokens
from mal_adapter.demo.host_training import prompt_pieces

__all__ = ["Activations", "HostTail", "cache_activations", "emotion_prompt", "head_hidden"]

_FIELDS = ("hidden", "labels", "speakers", "truth", "baselines")


@dataclass(frozen=True)
class Activations:
    """What leaves the hooked decoder layer for the emotion prompt, utterance by utterance, and the truth.

    Every sequence has the same length and no padding: prompt start, audio, question, up to where the answer starts.

    Attributes:
        hidden: float16, (dialogues, turns, seq_len, width); a read-only memory map.
        audio: the audio positions, a slice into seq_len (the same for all utterances).
        labels: index into EMOTIONS, int64, (dialogues, turns).
        speakers: 0 or 1, int64, (dialogues, turns).
        truth: log pitch, level (dBFS) and log tract of the utterance, float32, (dialogues, turns, 3).
        baselines: the same three of its speaker, float32, (dialogues, turns, 3).
    """

    hidden: NDArray[np.float16]
    audio: slice
    labels: NDArray[np.int64]
    speakers: NDArray[np.int64]
    truth: NDArray[np.float32]
    baselines: NDArray[np.float32]

    @classmethod
    def load(cls, folder: str | Path, features: Features, processor: Qwen2AudioProcessor) -> Activations:
        """What `cache_activations` has left in `folder` for these features."""
        hidden = np.load(Path(folder) / "hidden.npy", mmap_mode="r")
        shaped = hidden.reshape(*features.labels.shape, *hidden.shape[1:])
        _, audio = emotion_prompt(processor)
        return cls(shaped, audio, *(np.array(getattr(features, name)) for name in _FIELDS[1:]))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def audio_mask(self) -> Bool[Tensor, " seq_len"]:
        """True at the audio positions."""
        mask = torch.zeros(self.hidden.shape[2], dtype=torch.bool)
        mask[self.audio] = True
        return mask

    def batch(
        self, dialogues: NDArray[np.int64] | list[int]
    ) -> tuple[Float[Tensor, "batch turns seq_len width"], Int[Tensor, "batch turns"]]:
        """Hidden states, float32, and labels of some dialogues."""
        index = np.asarray(dialogues)
        return torch.from_numpy(self.hidden[index]).float(), torch.from_numpy(self.labels[index])


class HostTail:
    """The host above the hooked layer, for the emotion prompt: hidden states in, scores of the labels out.

    Mutates nothing; the host's weights stay frozen, gradients flow to `hidden`.

        tail = HostTail(model, processor)
        logits = tail(hidden)                     # (rows, seq_len, width) -> (rows, 4)
        loss = cross_entropy(logits, labels)
    """

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        processor: Qwen2AudioProcessor,
        labels: tuple[str, ...] = EMOTIONS,
        layer_idx: int = LAYER_IDX,
    ) -> None:
        decoder = model.model.language_model
        self.layers = decoder.layers[layer_idx + 1 :]
        self.norm, self.rotary = decoder.norm, decoder.rotary_emb
        ids = processor.tokenizer(list(labels), add_special_tokens=False)["input_ids"]
        if any(len(pieces) != 1 for pieces in ids):
            given = dict(zip(labels, ids, strict=True))
            raise ValueError(f"labels must be single tokens of the host, got {given}")
        self.label_ids = torch.tensor(ids)[:, 0]
        self.answers = model.lm_head.weight[self.label_ids]

    def __call__(self, hidden: Float[Tensor, "rows seq_len width"]) -> Float[Tensor, "rows labels"]:
        """Logits of the labels at the answer position."""
        position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embeddings = self.rotary(hidden, position_ids)
        for layer in self.layers[:-1]:  # no mask: rows have no padding, and attention without one is causal
            hidden = layer(hidden, attention_mask=None, position_ids=position_ids, position_embeddings=embeddings)
        return functional.linear(self.norm(_last_position(self.layers[-1], hidden, embeddings)), self.answers)


def cache_activations(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    features: Features,
    folder: str | Path,
    layer_idx: int = LAYER_IDX,
    batch_size: int = 64,
) -> Activations:
    """Run the frozen host up to `layer_idx` on every utterance of `features` and keep what leaves that layer.

    Args:
        features: dialogues as the host hears them, from `load_features` or `features_of`.
        folder: where `hidden.npy` is written, about 7 KB per utterance. What is there is written over.

    Returns:
        The activations; `hidden` is memory-mapped from `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids, audio = emotion_prompt(processor)
    count, turns = features.labels.shape
    width = model.config.text_config.hidden_size
    mels = features.mels.reshape(count * turns, *features.mels.shape[2:])
    hidden = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        folder / "hidden.npy", mode="w+", dtype=np.float16, shape=(count * turns, len(ids), width)
    )
    for start in tqdm(range(0, len(mels), batch_size), desc="listening", unit="batch", mininterval=2):
        piece = torch.from_numpy(mels[start : start + batch_size]).float()
        hidden[start : start + batch_size] = head_hidden(model, piece, ids, audio, layer_idx).to(torch.float16).numpy()
    hidden.flush()
    return Activations.load(folder, features, processor)


@torch.no_grad()
def head_hidden(
    model: Qwen2AudioForConditionalGeneration,
    mels: Float[Tensor, "batch mel_bins frames"],
    ids: Int[Tensor, " seq_len"],
    audio: slice,
    layer_idx: int = LAYER_IDX,
) -> Float[Tensor, "batch seq_len width"]:
    """Hidden states that leave decoder layer `layer_idx`, of utterances with one prompt.

    Args:
        mels: FRAMES_KEPT frames, float32.
        ids, audio: from `emotion_prompt`.
    """
    decoder = model.model.language_model
    hidden: Tensor = model.get_input_embeddings()(ids).expand(len(mels), -1, -1).clone()
    hidden[:, audio] = audio_tokens(model, mels, FRAMES)
    position_ids = torch.arange(len(ids))[None]
    embeddings = decoder.rotary_emb(hidden, position_ids)
    for layer in decoder.layers[: layer_idx + 1]:
        hidden = layer(hidden, attention_mask=None, position_ids=position_ids, position_embeddings=embeddings)
    return hidden


def emotion_prompt(processor: Qwen2AudioProcessor) -> tuple[Int[Tensor, " seq_len"], slice]:
    """Token ids of the emotion prompt about one utterance, and its audio positions."""
    start, end = prompt_pieces(processor)
    ids = torch.tensor(processor.tokenizer(start + PROMPT + end, add_special_tokens=False)["input_ids"])
    placeholders = torch.nonzero(ids == processor.tokenizer.convert_tokens_to_ids(processor.audio_token))[:, 0]
    return ids, slice(int(placeholders[0]), int(placeholders[-1]) + 1)


def _last_position(
    layer: Any, hidden: Float[Tensor, "rows seq_len width"], embeddings: tuple[Tensor, Tensor]
) -> Float[Tensor, "rows width"]:
    """What a Qwen2 decoder layer makes of the last position alone: a third of the layer's time."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    heads = (*normed.shape[:2], -1, attention.head_dim)
    key = attention.k_proj(normed).view(heads).transpose(1, 2)
    value = attention.v_proj(normed).view(heads).transpose(1, 2)
    query = attention.q_proj(normed[:, -1:]).view(len(normed), 1, -1, attention.head_dim).transpose(1, 2)
    cosines, sines = embeddings
    query, _ = apply_rotary_pos_emb(query, query, cosines[:, -1:], sines[:, -1:])
    _, key = apply_rotary_pos_emb(key, key, cosines, sines)
    seen = functional.scaled_dot_product_attention(query, key, value)
    after: Tensor = hidden[:, -1] + attention.o_proj(seen.transpose(1, 2).flatten(1))
    after = after + layer.mlp(layer.post_attention_layernorm(after))
    return after

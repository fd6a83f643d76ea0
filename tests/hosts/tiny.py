"""How a tiny random model of an audio language model family is built, and how its inputs are made.

A family is one `TinyHost` literal in `families/`. Everything else (placeholder runs, padding, masks, several clips in a
prompt) is shared, so that a new family needs a config, a class and the way its audio features are passed.

"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

if TYPE_CHECKING:  # its import takes seconds, which a process that builds no host need not spend
    from transformers import PreTrainedModel

__all__ = [
    "AUDIO_TOKEN_ID",
    "LEGACY",
    "LEGACY_PATHS",
    "VOCAB_SIZE",
    "WIDTH",
    "PlainHost",
    "Prompt",
    "TinyHost",
    "encoder",
    "legacy",
    "padded",
    "text",
]

VOCAB_SIZE = 64
WIDTH = 32
MEL_BINS = 8
PAD_ID = 0
AUDIO_TOKEN_ID = 60
FIRST_TEXT_ID, LAST_TEXT_ID = 1, 49  # text never holds a special id
MAX_CLIP_TOKENS = 16  # longer audio does not fit one feature row

LEGACY = transformers.__version__.startswith("4.")
"""4.57, the oldest that is supported. Families have changed one by one since; only oldest and newest are tested."""
LEGACY_PATHS = {"layers_path": "language_model.model.layers", "multimodal_path": ""} if LEGACY else {}
"""There, most families merge audio in the top-level module, above a language model with a head of its own."""

CAPABILITIES = {
    "static_cache": "generate(cache_implementation='static')",
    "checkpointing": "gradient checkpointing",
    "hidden_states": "output_hidden_states that shows what a forward hook returned",
    "several_clips": "several clips in a prompt",
    "batches": "a batch whose clips don't affect each other",
    "clips_on_a_cache": "generate() that uses a second turn's clips on the KV cache of the first",
    "input_grads": "a frozen host after enable_input_require_grads(), which re-entrant checkpointing needs",
}
"""What some hosts can't do, with or without a memory."""


@dataclass(frozen=True)
class Prompt:
    """One row of a batch before padding.

    Attributes:
        ids: (seq_len,) int64, placeholders already expanded to one id per audio token.
        feature_rows: the rows of the host's feature tensor, (mel_bins, frames) float32; one per clip, or per window.
        filler: (seq_len,) bool, placeholders without audio; None: there are none.
    """

    ids: Tensor
    feature_rows: tuple[Tensor, ...]
    filler: Tensor | None = None

    @property
    def audio(self) -> Tensor:
        """(seq_len,) bool, where audio is."""
        placeholders = self.ids == AUDIO_TOKEN_ID
        return placeholders if self.filler is None else placeholders & ~self.filler

    @property
    def audio_tokens(self) -> int:
        return int(self.audio.sum())


@dataclass(frozen=True)
class TinyHost:
    """How to build one family and make its inputs.

    Attributes:
        name: the config's model_type.
        model_class: name of the class in transformers, with the language modelling head.
        config: number of decoder layers -> config.
        features: rows of (mel_bins, frames) and the model's dtype -> keyword arguments of `forward`.
        feature_argument: the keyword that carries the audio features.
        layers_path: dotted path of the decoder layers' `ModuleList`.
        multimodal_path: dotted path of the module that merges audio into the embeddings.
        window_tokens: audio comes in windows of this many tokens, one feature row each; None: a row is a whole clip.
        time_marker_every: the processor writes a time marker, a text token, after this many of a clip's audio tokens.
        clip_fills: a clip takes this many audio tokens however short it is; the host itself pads its features.
        pads_clips: only as many of these tokens as requested have audio.
        token_types: name of the processor's output that is 3 at audio and 0 at text, (batch, seq_len).
        stream_idx: where hidden states are (streams, batch, seq_len, width), the stream that the next layer attends to.
        beside_embeddings: model and input_ids -> what `forward` needs beside the inputs_embeds of those ids.
        float32_modules: dotted paths of the modules that raise in float64.
        keeps_clips_together: generate() repeats all clips of a prompt for its beams; most hosts repeat each in place.
        decodes_placeholder: False where the host itself raises when the placeholder id is generated.
        cannot: what the host itself can't do, from `CAPABILITIES`; a test on the host without memory proves each.
    """

    name: str
    model_class: str
    config: Callable[[int], Any]
    features: Callable[[Sequence[Tensor], torch.dtype], dict[str, Tensor]]
    feature_argument: str = "input_features"
    layers_path: str = "model.language_model.layers"
    multimodal_path: str = "model"
    window_tokens: int | None = None
    time_marker_every: int | None = None
    frames_per_token: int = 4
    clip_fills: int | None = None
    pads_clips: bool = False
    token_types: str | None = None
    stream_idx: int | None = None
    beside_embeddings: Callable[[PreTrainedModel, Tensor], dict[str, Tensor]] = lambda _model, _ids: {}
    float32_modules: tuple[str, ...] = ()
    keeps_clips_together: bool = False
    decodes_placeholder: bool = True
    cannot: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.cannot <= CAPABILITIES.keys(), self.cannot

    @property
    def exists(self) -> bool:
        """Whether this version of transformers has the family."""
        return hasattr(transformers, self.model_class)

    def build(self, dtype: torch.dtype = torch.float32, num_layers: int = 2, seed: int = 0) -> PreTrainedModel:
        """A model in eval mode with weights large enough that every position depends on every earlier one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model_class)(self.config(num_layers))
            _spread(model)
        if not self.decodes_placeholder:
            model.generation_config.suppress_tokens = [
                AUDIO_TOKEN_ID
            ]  # a trained model never generates it, this one may
        return model.to(dtype).eval()

    def clip_tokens(self, requested: int) -> int:
        """How many audio tokens a clip of the requested length takes on this host."""
        if self.window_tokens is None:
            return self.clip_fills or requested
        return -(-requested // self.window_tokens) * self.window_tokens

    def prompt(self, clips: Sequence[int], *, text: Sequence[int] = (3, 2, 4), seed: int = 0) -> Prompt:
        """A random prompt: text, then clips with text between them, then text.

        Args:
            clips: requested audio tokens of each clip, see `clip_tokens`; or of the parts of one clip, where the
                host can't take several.
            text: number of text tokens before the first clip, between clips and after the last.
        """
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> Tensor:
            return torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID + 1, (count,), generator=generator)

        before, between, after = text
        parts, rows, has_audio = [words(before)], [], []
        if clips and "several_clips" in self.cannot:
            clips = [sum(clips)]
        for index, requested in enumerate(clips):
            if index:
                parts.append(words(between))
            tokens = self.clip_tokens(requested)
            has_audio.append(torch.arange(tokens) < (requested if self.pads_clips else tokens))
            for run in torch.full((tokens,), AUDIO_TOKEN_ID).split(self.time_marker_every or tokens):
                parts.append(run)
                if len(run) == self.time_marker_every:
                    parts.append(words(1))
            row_tokens = self.window_tokens or requested
            if row_tokens > MAX_CLIP_TOKENS:
                raise ValueError(f"a clip of {requested} tokens does not fit the {MAX_CLIP_TOKENS} of one feature row")
            rows += [
                torch.randn(MEL_BINS, row_tokens * self.frames_per_token, generator=generator)
                for _ in range(tokens // row_tokens if self.window_tokens else 1)
            ]
        parts.append(words(after))
        ids = torch.cat(parts)
        filler = torch.zeros_like(ids, dtype=torch.bool)
        if has_audio:
            filler[ids == AUDIO_TOKEN_ID] = ~torch.cat(has_audio)
        return Prompt(ids, tuple(rows), filler)

    def collate(
        self, model: nn.Module, prompts: Sequence[Prompt], padding_side: str = "left"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Pads prompts to one batch.

        Returns:
            the keyword arguments of `forward` and `generate`, and the true audio mask (batch, seq_len) bool.
        """
        seq_len = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), seq_len), PAD_ID)
        attention_mask, audio_mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start = seq_len - len(prompt.ids) if padding_side == "left" else 0
            ids[row, start : start + len(prompt.ids)] = prompt.ids
            attention_mask[row, start : start + len(prompt.ids)] = 1
            audio_mask[row, start : start + len(prompt.ids)] = prompt.audio
        inputs = {"input_ids": ids, "attention_mask": attention_mask}
        rows = list(itertools.chain.from_iterable(prompt.feature_rows for prompt in prompts))
        if rows:
            inputs |= self.features(rows, next(model.parameters()).dtype)
        if self.token_types:
            inputs[self.token_types] = 3 * (ids == AUDIO_TOKEN_ID)
        return inputs, audio_mask

    def make_inputs(
        self,
        model: nn.Module,
        clips_per_prompt: Sequence[Sequence[int]],
        *,
        text: Sequence[int] = (3, 2, 4),
        padding_side: str = "left",
        seed: int = 0,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`prompt` and `collate` in one: row i is `prompt(clips_per_prompt[i], text=text, seed=1000 * seed + i)`."""
        prompts = [self.prompt(clips, text=text, seed=1000 * seed + i) for i, clips in enumerate(clips_per_prompt)]
        return self.collate(model, prompts, padding_side)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.layers_path)

    def stream(self, hidden_states: Tensor) -> Tensor:
        """What is (batch, seq_len, width) of a layer's hidden states."""
        return hidden_states if self.stream_idx is None else hidden_states[self.stream_idx]


class PlainHost(nn.Module):
    """A host without config, ids or features: nothing can be detected, so the user must pass everything."""

    def __init__(self, width: int = WIDTH, num_layers: int = 3, seed: int = 0, returns_tuple: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(_PlainBlock(width, returns_tuple) for _ in range(num_layers))
        self.head = nn.Linear(width, VOCAB_SIZE)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _spread(self)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """(batch, seq_len, width) -> (batch, seq_len, VOCAB_SIZE)."""
        hidden_states = inputs_embeds
        for block in self.blocks:
            out = block(hidden_states)
            hidden_states = out[0] if isinstance(out, tuple) else out
        return self.head(hidden_states)


class _PlainBlock(nn.Module):
    def __init__(self, width: int, returns_tuple: bool):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        # The causal mean makes later positions depend on earlier ones, as attention would.
        steps = torch.arange(1, hidden_states.shape[1] + 1, dtype=hidden_states.dtype)[:, None]
        hidden_states = hidden_states + torch.tanh(self.mix(hidden_states.cumsum(1) / steps))
        return (hidden_states, None) if self.returns_tuple else hidden_states


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Replace the usual 0.02 initialisation, with which a tiny random model answers almost the same to any input."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name:
            fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()  # experts are stacked
            parameter.normal_(std=fan_in**-0.5 if "embed_tokens" not in name else 1.0)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)


def legacy(*capabilities: str) -> frozenset[str]:
    """What a host can't do in 4.57, and can in the newest transformers."""
    return frozenset(capabilities if LEGACY else ())


def text(num_layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
        "eos_token_id": None,
        **more,
    }


def encoder(**more: Any) -> dict[str, Any]:
    return {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": MEL_BINS,
        "max_source_positions": 2 * MAX_CLIP_TOKENS,
        **more,
    }


def padded(rows: Sequence[Tensor], frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (mel_bins, any) -> features (rows, mel_bins, frames) and their mask (rows, frames)."""
    features = torch.zeros(len(rows), MEL_BINS, frames)
    mask = torch.zeros(len(rows), frames, dtype=torch.long)
    for index, row in enumerate(rows):
        features[index, :, : row.shape[1]] = row
        mask[index, : row.shape[1]] = 1
    return features.to(dtype), mask

"""DeSTA2.5-Audio: the placeholder is used for a clip and for its transcript; generation bypasses forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from tests.hosts.remote.base import Inputs, RemoteHost, TinyEncoder, spans
from tests.hosts.tiny import AUDIO_TOKEN_ID, MEL_BINS, PAD_ID, Prompt, text

PROMPT_SIZE = 64


class DeSTA25Config(PretrainedConfig):
    model_type = "desta25"

    def __init__(self, llm_config: dict[str, Any] | None = None, prompt_size: int = PROMPT_SIZE, **kwargs: Any):
        super().__init__(**kwargs)
        self.prompt_size = prompt_size
        self.llm_config = LlamaConfig(**(llm_config or {}))


class WhisperPerception(nn.Module):
    """A clip of any length becomes `prompt_size` audio tokens."""

    def __init__(self, config: DeSTA25Config):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.prompt_size, MEL_BINS))
        self.connector = TinyEncoder(frames_per_token=1)

    def forward(self, input_features: Tensor, transcription_embeddings_list: list[Tensor]) -> tuple[Tensor, list[int]]:
        pooled = input_features.mean(-1, keepdim=True) * 4 + self.queries.T
        return self.connector(pooled), [len(self.queries)] * len(pooled)


class DeSTA25AudioModel(PreTrainedModel):
    config_class = DeSTA25Config

    def __init__(self, config: DeSTA25Config):
        super().__init__(config)
        self.llm_model = LlamaForCausalLM(config.llm_config)
        self.perception = WhisperPerception(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        batch_features: Tensor,
        batch_transcription_ids: list[Tensor],
        batch_start_positions: list[tuple[int, Any]],
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs_embeds = self._prepare_inputs_for_llm(
            input_ids, attention_mask, batch_features, batch_transcription_ids, batch_start_positions
        )
        return self.llm_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels)

    def _prepare_inputs_for_llm(
        self, input_ids, attention_mask, batch_features, batch_transcription_ids, batch_start_positions
    ) -> Tensor:
        embed = self.llm_model.model.embed_tokens
        transcripts = [embed(ids.squeeze(0)) for ids in batch_transcription_ids]
        inputs_embeds = embed(input_ids)
        if len(batch_start_positions):
            audio, lengths = self.perception(input_features=batch_features, transcription_embeddings_list=transcripts)
            assert len(audio) == len(lengths) == len(transcripts) == len(batch_start_positions)
            for (row, start), clip, transcript in zip(batch_start_positions, audio, transcripts, strict=True):
                both = torch.cat((clip, transcript))
                inputs_embeds[row, start : start + len(both)] = both
        return inputs_embeds

    def _generate_step(self, inputs: Inputs, pad_token_id: int, max_new_tokens: int = 512, **options: Any) -> Tensor:
        inputs_embeds = self._prepare_inputs_for_llm(
            input_ids=inputs["context_input_ids"],
            attention_mask=inputs["context_attention_mask"],
            batch_features=inputs["batch_features"],
            batch_transcription_ids=inputs["batch_transcription_ids"],
            batch_start_positions=inputs["context_batch_start_positions"],
        )
        return self.llm_model.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=inputs["context_attention_mask"],
            pad_token_id=pad_token_id,
            max_new_tokens=max_new_tokens,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class DestaHost(RemoteHost):
    def prompt(self, clips: Sequence[int], **options: Any) -> Prompt:
        """The requested tokens are those of the transcript; `PROMPT_SIZE` audio tokens come before them."""
        prompt = super().prompt(clips, **options)
        repeats = torch.ones_like(prompt.ids)
        repeats[[start for _, start, _ in spans((prompt.ids == AUDIO_TOKEN_ID)[None])]] += PROMPT_SIZE
        return Prompt(prompt.ids.repeat_interleave(repeats), prompt.feature_rows)


def _config(num_layers: int) -> DeSTA25Config:
    return DeSTA25Config(llm_config=text(num_layers))


def _features(rows: Sequence[Tensor], dtype: torch.dtype) -> Inputs:
    return {"batch_features": torch.stack([row.mean(1, keepdim=True).expand(-1, 8) for row in rows]).to(dtype)}


def _place(inputs: Inputs, mask: Tensor) -> tuple[Inputs, Tensor]:
    clips, audio = spans(mask), torch.zeros_like(mask)
    for row, start, _ in clips:
        audio[row, start : start + PROMPT_SIZE] = True
    # The row is an int, the start a tensor: padding, a tensor, is added to it.
    inputs["batch_start_positions"] = [(row, torch.tensor(start)) for row, start, _ in clips]
    inputs["batch_transcription_ids"] = [torch.arange(1, 1 + length - PROMPT_SIZE)[None] for *_, length in clips]
    inputs.setdefault("batch_features", torch.zeros(0, MEL_BINS, 8))
    return inputs, audio


def _generate(model: DeSTA25AudioModel, inputs: Inputs, max_new_tokens: int = 3, **options: Any) -> Tensor:
    names = ("input_ids", "attention_mask", "batch_start_positions")
    context = {f"context_{name}" if name in names else name: value for name, value in inputs.items()}
    options = {"do_sample": False, **options}
    return model._generate_step(context, pad_token_id=PAD_ID, max_new_tokens=max_new_tokens, **options)


DESTA25 = DestaHost(
    name="desta25",
    model_class=DeSTA25AudioModel,
    config=_config,
    features=_features,
    place=_place,
    generate=_generate,
    feature_argument="batch_features",
    layers_path="llm_model.model.layers",
    multimodal_path="",
    generates_at="llm_model",
)

"""Ultravox 0.5 and later: spans per clip, and generate() of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel, PretrainedConfig

from tests.hosts.remote.base import Inputs, RemoteHost, TinyEncoder, spans
from tests.hosts.tiny import MAX_CLIP_TOKENS, WIDTH, legacy, padded, text


class UltravoxConfig(PretrainedConfig):
    model_type = "ultravox"

    def __init__(self, text_config: dict[str, Any] | None = None, hidden_size: int = 3 * WIDTH, **kwargs: Any):
        self.hidden_size = hidden_size  # the projector's, not the language model's
        self.text_config = LlamaConfig(**(text_config or {}))
        self.vocab_size = self.text_config.vocab_size
        super().__init__(**kwargs)


class UltravoxModel(LlamaPreTrainedModel, GenerationMixin):
    config_class = UltravoxConfig

    def __init__(self, config: UltravoxConfig):
        super().__init__(config)
        self.multi_modal_projector = TinyEncoder(frames_per_token=4)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        audio_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_token_start_idx: Tensor | None = None,
        audio_lens: Tensor | None = None,
        audio_token_len: Tensor | None = None,
        audio_batch_size: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if audio_values is not None and len(audio_values) > 0:
            audio_embeds = self.multi_modal_projector(audio_values)
            clip = 0
            for row, clips in enumerate(audio_batch_size):
                for _ in range(clips):
                    start, length = audio_token_start_idx[clip], audio_token_len[clip]
                    inputs_embeds[row][start : start + length] = audio_embeds[clip][:length]
                    clip += 1
        # Not called, so that the language model's own hooks never run.
        return self.language_model.forward(
            inputs_embeds=inputs_embeds,
            labels=labels,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        audio_values: Tensor | None = None,
        audio_token_start_idx: Tensor | None = None,
        audio_token_len: Tensor | None = None,
        audio_lens: Tensor | None = None,
        audio_batch_size: Tensor | None = None,
        **kwargs: Any,
    ) -> Inputs:
        inputs = self.language_model.prepare_inputs_for_generation(input_ids, **kwargs)
        # Its own code asks cache_position, which transformers 5 passes no more.
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        if audio_values is not None and cached <= audio_token_start_idx.max():
            inputs["audio_values"] = audio_values
            inputs["audio_token_start_idx"] = audio_token_start_idx - cached
            inputs["audio_token_len"] = audio_token_len
            inputs["audio_batch_size"] = audio_batch_size
            inputs["audio_lens"] = audio_lens
        return inputs


def _config(num_layers: int) -> UltravoxConfig:
    return UltravoxConfig(text_config=text(num_layers))


def _features(rows: Sequence[Tensor], dtype: torch.dtype) -> Inputs:
    audio_values, mask = padded(rows, 4 * MAX_CLIP_TOKENS, dtype)
    return {"audio_values": audio_values, "audio_lens": mask.sum(1)}


def _place(inputs: Inputs, mask: Tensor) -> tuple[Inputs, Tensor]:
    clips = torch.tensor(spans(mask)).reshape(-1, 3)
    if len(clips):
        inputs["audio_token_start_idx"] = clips[:, 1]
        inputs["audio_token_len"] = clips[:, 2].int()
        inputs["audio_batch_size"] = clips[:, 0].bincount(minlength=len(mask))
    return inputs, mask


def _generate(model: UltravoxModel, inputs: Inputs, **options: Any) -> Tensor:
    return model.generate(**inputs, **{"max_new_tokens": 3, "do_sample": False, **options})


ULTRAVOX = RemoteHost(
    name="ultravox",
    model_class=UltravoxModel,
    config=_config,
    features=_features,
    place=_place,
    generate=_generate,
    feature_argument="audio_values",
    layers_path="language_model.model.layers",
    multimodal_path="",
    cannot=legacy("hidden_states"),  # its language model's limit
)

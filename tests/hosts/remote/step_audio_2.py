"""Step-Audio 2: a clip follows each `<audio_start>`; no KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.hosts.remote.base import Inputs, RemoteHost, TinyEncoder, spans
from tests.hosts.tiny import MAX_CLIP_TOKENS, WIDTH, padded, text

AUDIO_START_ID = 151688
VOCAB_SIZE = AUDIO_START_ID + 1


class StepAudio2Config(PretrainedConfig):
    model_type = "step_audio_2"

    def __init__(self, text_config: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.text_config = Qwen2Config(**(text_config or {}))


class Encoder(TinyEncoder):
    def forward(self, wavs: Tensor, wav_lens: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(wavs), (wav_lens + 1) // 2 // 2


class StepAudio2ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = StepAudio2Config
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: StepAudio2Config):
        super().__init__(config)
        self.model = Qwen2Model(config.text_config)
        self.encoder = Encoder(frames_per_token=8)
        self.lm_head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        wavs: Tensor | None = None,
        wav_lens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        hidden_states = self.model.embed_tokens(input_ids)
        if wavs is not None:
            out, feat_lens = self.encoder(wavs, wav_lens)
            feat_lens = (feat_lens - 1) // 2 + 1
            for clip, (row, start) in enumerate((input_ids == AUDIO_START_ID).nonzero()):
                start = start + 1
                hidden_states[row][start : start + feat_lens[clip]] = out[clip][: feat_lens[clip]]
        hidden_states = self.model(inputs_embeds=hidden_states, attention_mask=attention_mask)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Inputs:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if kwargs.get("past_key_values") is not None:
            return inputs | {"past_key_values": kwargs["past_key_values"]}
        return inputs | {"wavs": kwargs.get("wavs"), "wav_lens": kwargs.get("wav_lens")}


def _config(num_layers: int) -> StepAudio2Config:
    return StepAudio2Config(text_config=text(num_layers, vocab_size=VOCAB_SIZE))


def _features(rows: Sequence[Tensor], dtype: torch.dtype) -> Inputs:
    wavs, mask = padded(rows, 8 * MAX_CLIP_TOKENS, dtype)
    return {"wavs": wavs, "wav_lens": mask.sum(1).int()}


def _place(inputs: Inputs, mask: Tensor) -> tuple[Inputs, Tensor]:
    for row, start, _ in spans(mask):
        inputs["input_ids"][row, start - 1] = AUDIO_START_ID
    return inputs, mask


def _generate(model: StepAudio2ForCausalLM, inputs: Inputs, **options: Any) -> Tensor:
    return model.generate(**inputs, **{"max_new_tokens": 3, "do_sample": False, **options})


@dataclass(frozen=True, kw_only=True)
class StepHost(RemoteHost):
    def build(self, *args: Any, **kwargs: Any) -> StepAudio2ForCausalLM:
        model = super().build(*args, **kwargs)
        model.generation_config.use_cache = False  # else it ignores the audio in generate(), as a test shows
        return model


STEP_AUDIO_2 = StepHost(
    name="step_audio_2",
    model_class=StepAudio2ForCausalLM,
    config=_config,
    features=_features,
    place=_place,
    generate=_generate,
    feature_argument="wavs",
    layers_path="model.layers",
    multimodal_path="",
    frames_per_token=8,
)

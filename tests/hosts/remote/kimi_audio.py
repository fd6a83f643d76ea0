"""Kimi-Audio: two streams of ids, a mask argument, layers that return tuples, and a loop of its own for generation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from tests.hosts.remote.base import Inputs, RemoteHost, TinyEncoder, spans
from tests.hosts.tiny import VOCAB_SIZE, WIDTH, text

MEDIA_BEGIN, MEDIA_END, BLANK = 57, 58, 59


class KimiAudioConfig(Qwen2Config):
    """As in its own code, model_type is not set here: it comes from the checkpoint's config.json."""

    def __init__(self, kimia_mimo_layers: int = 1, kimia_mimo_transformer_from_layer_index: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.kimia_mimo_layers = kimia_mimo_layers
        self.kimia_mimo_transformer_from_layer_index = kimia_mimo_transformer_from_layer_index


class MoonshotDecoderLayer(nn.Module):
    """Qwen2's layer: a tuple comes out, with the keys and values that go in again as the cache."""

    def __init__(self, config: KimiAudioConfig):
        super().__init__()
        self.block = Qwen2DecoderLayer(config, layer_idx=0)
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
    ) -> tuple[Any, ...]:
        cache, past = DynamicCache(), 0
        if past_key_value is not None:
            cache.update(*past_key_value, 0)
            past = past_key_value[0].shape[2]
        new = hidden_states.shape[1]
        out = self.block(
            hidden_states,
            attention_mask=torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None],
            position_ids=position_ids,
            past_key_values=cache,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
        )
        hidden_states = out[0] if isinstance(out, tuple) else out
        return (hidden_states, (cache.layers[0].keys, cache.layers[0].values)) if use_cache else (hidden_states,)


class MoonshotKimiaModel(Qwen2PreTrainedModel):
    config_class = KimiAudioConfig

    def __init__(self, config: KimiAudioConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoonshotDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size)
        self.mimo_layers = nn.ModuleList(MoonshotDecoderLayer(config) for _ in range(config.kimia_mimo_layers))
        self.mimo_norm = Qwen2RMSNorm(config.hidden_size)
        self.vq_adaptor = TinyEncoder(frames_per_token=4)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        text_input_ids: Tensor | None = None,
        whisper_input_feature: list[Tensor] | Tensor | None = None,
        is_continuous_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...]:
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1])[None]
        hidden_states = self.embed_tokens(input_ids)
        if whisper_input_feature is not None:
            clips = whisper_input_feature if isinstance(whisper_input_feature, list) else [whisper_input_feature]
            begins, ends = (input_ids == MEDIA_BEGIN).nonzero(), (input_ids == MEDIA_END).nonzero()
            # One row for all clips of the batch, as in its own code: it has batches of one only.
            whisper = torch.zeros_like(hidden_states[0])
            for (_, begin), (_, end), clip in zip(begins, ends, clips, strict=True):
                whisper[begin + 1 : end] = self.vq_adaptor(clip)[0, : end - begin - 1]
            both = (hidden_states + whisper) * 2**0.5
            hidden_states = torch.where(is_continuous_mask[:, :, None], both, hidden_states)
        hidden_states = hidden_states + self.embed_tokens(text_input_ids)
        presents, branch = [], None
        for index, layer in enumerate((*self.layers, *self.mimo_layers)):
            if index == len(self.layers):
                text_states, hidden_states = hidden_states, branch
            hidden_states, present = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=None if past_key_values is None else past_key_values[index],
                use_cache=True,
            )
            presents.append(present)
            if index == self.config.kimia_mimo_transformer_from_layer_index:
                branch = hidden_states.clone()
        return self.norm(text_states), self.mimo_norm(hidden_states), tuple(presents)


class MoonshotKimiaForCausalLM(Qwen2PreTrainedModel):
    config_class = KimiAudioConfig

    def __init__(self, config: KimiAudioConfig):
        super().__init__(config)
        self.model = MoonshotKimiaModel(config)
        self.lm_head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.mimo_output = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        text_input_ids: Tensor | None = None,
        whisper_input_feature: list[Tensor] | Tensor | None = None,
        is_continuous_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[tuple[Tensor, Tensor]] | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...]:
        hidden_states, mimo_hidden_states, presents = self.model(
            input_ids=input_ids,
            text_input_ids=text_input_ids,
            whisper_input_feature=whisper_input_feature,
            is_continuous_mask=is_continuous_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=return_dict,
        )
        return self.mimo_output(mimo_hidden_states), self.lm_head(hidden_states), presents


def _config(num_layers: int) -> KimiAudioConfig:
    return KimiAudioConfig.from_dict({"model_type": "kimi_audio", **text(num_layers)})


def _features(rows: Sequence[Tensor], dtype: torch.dtype) -> Inputs:
    return {"whisper_input_feature": [row[None].to(dtype) for row in rows]}


def _place(inputs: Inputs, mask: Tensor) -> tuple[Inputs, Tensor]:
    ids = inputs["input_ids"]
    text_input_ids = ids.masked_fill(mask, BLANK)
    audio_ids = torch.where(mask, 50 + torch.arange(ids.shape[1]) % 7, torch.full_like(ids, BLANK))
    for row, start, length in spans(mask):
        audio_ids[row, start - 1] = MEDIA_BEGIN
        audio_ids[row, start + length] = MEDIA_END
    placed = {"input_ids": audio_ids, "text_input_ids": text_input_ids, "is_continuous_mask": mask}
    return placed | {name: inputs[name] for name in inputs if name == "whisper_input_feature"}, mask


def _generate(model: MoonshotKimiaForCausalLM, inputs: Inputs, max_new_tokens: int = 3) -> Tensor:
    """Greedy text, as in `KimiAudio._generate_loop`: `forward` is called directly, past the model's own hooks."""
    call, generated = {**inputs, "past_key_values": None}, []
    position = inputs["input_ids"].shape[1]
    for step in range(max_new_tokens):
        _, text_logits, past_key_values = model.forward(**call, return_dict=False)
        token = text_logits[:, -1].argmax(-1, keepdim=True)
        generated.append(token)
        call = {
            "input_ids": torch.full_like(token, BLANK),
            "text_input_ids": token,
            "whisper_input_feature": None,
            "is_continuous_mask": None,
            "position_ids": torch.tensor([[position + step]]),
            "past_key_values": past_key_values,
        }
    return torch.cat(generated, dim=1)


KIMI_AUDIO = RemoteHost(
    name="kimi_audio",
    model_class=MoonshotKimiaForCausalLM,
    config=_config,
    features=_features,
    place=_place,
    generate=_generate,
    feature_argument="whisper_input_feature",
    layers_path="model.layers",
    multimodal_path="model",
    batch_sides=(),
)

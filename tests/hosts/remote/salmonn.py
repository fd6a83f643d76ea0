"""SALMONN: a plain module around a LoRA language model, to which it passes only embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.hosts.remote.base import Inputs, RemoteHost, TinyEncoder, spans
from tests.hosts.tiny import padded, text

BOS_ID = 56
SPEECH_TOKENS = 8  # any clip is padded to 30 s first


class SALMONN(nn.Module):
    def __init__(self, llama_config: LlamaConfig):
        super().__init__()
        lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"])
        self.llama_model = get_peft_model(LlamaForCausalLM(llama_config), lora)
        self.speech_llama_proj = TinyEncoder(frames_per_token=4)

    def encode(self, samples: Inputs) -> tuple[Tensor, Tensor]:
        """Embeddings (batch, seq_len, width) of start token, text, speech and text, and their attention mask."""
        embed = self.llama_model.model.model.embed_tokens
        before, after = samples["before"], samples["after"]
        bos = torch.full((len(before), 1), BOS_ID)
        speech = self.speech_llama_proj(samples["spectrogram"])
        embeds = torch.cat((embed(bos), embed(before), speech, embed(after)), dim=1)
        ones = torch.ones(len(before), embeds.shape[1] - after.shape[1], dtype=torch.long)
        return embeds, torch.cat((ones, samples["after_attention_mask"]), dim=1)

    def forward(self, samples: Inputs) -> Inputs:
        embeds, attention_mask = self.encode(samples)
        return {"loss": self.llama_model(inputs_embeds=embeds, attention_mask=attention_mask, return_dict=True).logits}

    def generate(self, samples: Inputs, generate_cfg: Inputs) -> Tensor:
        embeds, attention_mask = self.encode(samples)
        return self.llama_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **generate_cfg)


def _features(rows: Sequence[Tensor], dtype: torch.dtype) -> Inputs:
    return {"spectrogram": padded(rows, 4 * SPEECH_TOKENS, dtype)[0]}


def _place(inputs: Inputs, mask: Tensor) -> tuple[Inputs, Tensor]:
    (_, start, length), *_ = spans(mask)
    ids, stop = inputs["input_ids"], start + length
    samples = {
        "before": ids[:, :start],
        "spectrogram": inputs["spectrogram"],
        "after": ids[:, stop:],
        "after_attention_mask": inputs["attention_mask"][:, stop:],
    }
    return {"samples": samples}, torch.cat((torch.zeros_like(mask[:, :1]), mask), dim=1)


def _generate(model: SALMONN, inputs: Inputs, **options: Any) -> Tensor:
    return model.generate(**inputs, generate_cfg={"max_new_tokens": 3, "do_sample": False, "num_beams": 4, **options})


SALMONN_HOST = RemoteHost(
    name="salmonn",
    model_class=SALMONN,
    config=lambda num_layers: LlamaConfig(**text(num_layers)),
    features=_features,
    place=_place,
    generate=_generate,
    layers_path="llama_model.base_model.model.model.layers",
    forward_at="llama_model",
    generates_at="llama_model",
    batch_sides=("right",),
    max_clips=1,
    clip_fills=SPEECH_TOKENS,
)

"""A tiny random Qwen2.5-Omni, whose prompts may have pictures and films beside the sound."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mal_adapter.demo import HOST_FOLDER
from tests.vllm.hosts import QUESTION, WIDTH, clip, text_sizes

__all__ = ["Scene", "save_omni", "scene"]

TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
SMALL = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}  # in pixels, of a picture


def save_omni(folder: Path) -> Path:
    """A Qwen2.5-Omni of a thinker alone, with the tokenizer of the package's host."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5OmniConfig,
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = AutoTokenizer.from_pretrained(HOST_FOLDER, extra_special_tokens=TOKENS)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    features = WhisperFeatureExtractor(feature_size=80, hop_length=160, chunk_length=30, return_attention_mask=True)
    template = (Path(HOST_FOLDER) / "chat_template.jinja").read_text()
    seen = (Qwen2VLImageProcessor(size=SMALL), Qwen2VLVideoProcessor(size=SMALL))
    Qwen2_5OmniProcessor(*seen, features, tokenizer, chat_template=template).save_pretrained(folder)
    features.save_pretrained(folder)
    thinker = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 80,
            "d_model": WIDTH,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": WIDTH,
            "output_dim": WIDTH,
            "initializer_range": 0.1,
        },
        vision_config={
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
            "initializer_range": 0.1,
        },
        text_config={
            **text_sizes(len(tokenizer), pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        },
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(thinker)
    tensors = {f"thinker.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = Qwen2_5OmniConfig(thinker_config=thinker.to_dict(), enable_audio_output=False).to_dict()
    config = {**config, "architectures": ["Qwen2_5OmniModel"]}  # as the real checkpoint has it
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


@dataclasses.dataclass(frozen=True)
class Scene:
    """A prompt of sound, pictures and films.

    Attributes:
        text: The prompt, with a placeholder for each.
        data: `image`, `video` and `audio`: lists of arrays.
        together: Whether the sound is that of the film.
    """

    text: str
    data: dict[str, list[Any]]
    together: bool

    def for_vllm(self) -> dict[str, Any]:
        """As `vllm.LLM` takes it."""
        data = {**self.data, "audio": [(samples, 16_000) for samples in self.data.get("audio", [])]}
        kwargs = {"use_audio_in_video": True} if self.together else {}
        return {
            "prompt": self.text,
            "multi_modal_data": {name: items for name, items in data.items() if items},
            "mm_processor_kwargs": kwargs,
        }

    def for_transformers(self, processor: Any) -> Any:
        """As the inputs of a model in transformers."""
        names = {"image": "images", "video": "videos", "audio": "audio"}
        data = {names[name]: items for name, items in self.data.items()}
        return processor(
            text=self.text, **data, sampling_rate=16_000, use_audio_in_video=self.together, return_tensors="pt"
        )


def scene(*parts: str) -> Scene:
    """A prompt of "image", "video" and "audio" in this order, or of "both", which is a film with its sound."""
    generator = np.random.default_rng(0)
    made = {
        "image": lambda: generator.integers(0, 256, (64, 80, 3), dtype=np.uint8),
        "video": lambda: generator.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8),
        "audio": lambda: clip(len(parts), 4.0 if "both" in parts else 0.6).numpy(),
    }
    places = {
        "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    }
    places["both"] = places["video"]
    content = "".join(f"{places[part]}\n" for part in parts)
    data = {name: [make()] for name, make in made.items() if name in parts or ("both" in parts and name != "image")}
    text = f"<|im_start|>user\n{content}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    return Scene(text, data, "both" in parts)

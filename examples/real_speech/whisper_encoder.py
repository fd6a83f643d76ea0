"""The encoder of a Whisper checkpoint: transformers' folders and Hub ids, and CTranslate2's folders."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Encoder", "load_encoder", "read_ctranslate2"]

_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_HEAD_DIM = 64  # of every Whisper


@dataclass(frozen=True)
class Encoder:
    """An encoder's weights, float32, named as in transformers from `conv1.weight` on.

    Attributes:
        weights: name -> tensor.
        layers: number of layers.
        heads: attention heads of each.
    """

    weights: dict[str, Tensor]
    layers: int
    heads: int

    @property
    def width(self) -> int:
        return self.weights["conv1.weight"].shape[0]

    @property
    def mel_bins(self) -> int:
        return self.weights["conv1.weight"].shape[1]


def load_encoder(name: str) -> Encoder:
    """Load the encoder of a Whisper.

    Args:
        name: A folder or Hub id of transformers, or a folder of CTranslate2 (as faster-whisper uses): its `model.bin`,
            which may be in parts `model.bin.part1`, `model.bin.part2`, …
    """
    folder = Path(name)
    parts = [folder / "model.bin"] if (folder / "model.bin").exists() else _parts(folder)
    if parts:
        return _from_ctranslate2(read_ctranslate2(b"".join(part.read_bytes() for part in parts)))
    from transformers import WhisperModel

    model = WhisperModel.from_pretrained(name, dtype=torch.float32)
    config = model.config
    weights = {key: value.detach() for key, value in model.encoder.state_dict().items()}
    return Encoder(weights, config.encoder_layers, config.encoder_attention_heads)


def read_ctranslate2(data: bytes) -> dict[str, NDArray[Any]]:
    """The variables of a CTranslate2 `model.bin`; 8-bit weights are scaled back to float32."""
    place = 0

    def take(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return int(value)

    def text() -> str:
        nonlocal place
        length = take("H")
        place += length
        return data[place - length : place - 1].decode()  # ends in a null character

    version = take("I")
    if version < 5:
        raise ValueError(f"this is CTranslate2's format {version}; expected 5 or newer, so convert the model again")
    text(), take("I")  # the model's kind, and its revision
    variables = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        variables[name] = np.frombuffer(data, _TYPES[kind], size // int(_TYPES[kind][-1]), place).reshape(shape)
        place += size
    for name in [name for name in variables if name.endswith("_scale")]:
        scaled = variables[name.removesuffix("_scale")]
        variables[name.removesuffix("_scale")] = scaled / variables[name].reshape(-1, *[1] * (scaled.ndim - 1))
    return variables


def _parts(folder: Path) -> list[Path]:
    found = folder.glob("model.bin.part*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("model.bin.part")))


def _from_ctranslate2(variables: dict[str, NDArray[Any]]) -> Encoder:
    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(variables[f"encoder/{name}"], np.float32))

    weights: dict[str, Tensor] = {}

    def put(ours: str, theirs: str, weight: str = "weight", bias: str = "bias") -> None:
        weights[f"{ours}.weight"], weights[f"{ours}.bias"] = tensor(f"{theirs}/{weight}"), tensor(f"{theirs}/{bias}")

    layers = len(
        {name.split("/")[1] for name in variables if name.startswith("encoder/layer_") and name.count("/") > 2}
    )
    for layer in range(layers):
        ours, theirs = f"layers.{layer}", f"layer_{layer}"
        put(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm", "gamma", "beta")
        # queries, keys and values are one matrix; Whisper's keys have no bias
        stacked = tensor(f"{theirs}/self_attention/linear_0/weight").chunk(3)
        biases = tensor(f"{theirs}/self_attention/linear_0/bias").chunk(3)
        for name, weight, bias in zip("qkv", stacked, biases, strict=True):
            weights[f"{ours}.self_attn.{name}_proj.weight"] = weight
            if name != "k":
                weights[f"{ours}.self_attn.{name}_proj.bias"] = bias
        put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
        put(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", "gamma", "beta")
        put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
        put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    for convolution in ("conv1", "conv2"):
        put(convolution, convolution)
    put("layer_norm", "layer_norm", "gamma", "beta")
    weights["embed_positions.weight"] = tensor("position_encodings/encodings")
    return Encoder(weights, layers, weights["conv1.weight"].shape[0] // _HEAD_DIM)

"""The package's host and its memory in shapes that vLLM takes, with the same answers.

    python examples/vllm_host.py FOLDER        # writes FOLDER/host and FOLDER/adapter

vLLM's attention on a CPU needs heads of 32, 64, 80 ... numbers, and its Qwen2-Audio 3000 frames of sound; the package's
host has heads of 24, and 300 frames. No training is needed, since twice the width computes the same:

- A hidden state x becomes [x, x]. A norm of it is [norm(x), norm(x)], so that a layer may read the first half only, and
  writes its output twice.
- Heads are filled up with zeros, and two heads of zeros are added: 4 heads of 24 are 6 of 32. Queries grow by
  sqrt(32 / 24), since attention divides by the square root of a head's width.
- The angle of pair i is base^(-i / 12) with heads of 24 and base^(-i / 16) with heads of 32; so the base is raised to
  the power 16 / 12.
- The sound is padded to 60 seconds instead of 6, and attention does not see the padding.

Sessions of one adapter are not sessions of the other: a state names the fingerprint of its adapter.
"""

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mal_adapter import MemoryAdapter
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER

WIDTH, HEADS, HEAD = 96, 4, 24
NEW_HEADS, NEW_HEAD = 6, 32
LONGER = 10  # times as many frames


def write(adapter: Path, host: Path) -> None:
    """Write the pair."""
    shutil.copytree(HOST_FOLDER, host, dirs_exist_ok=True)
    tensors = load_file(Path(HOST_FOLDER) / "model.safetensors")
    save_file({name: rewritten(name, tensor) for name, tensor in tensors.items()}, host / "model.safetensors", PYTORCH)
    change(host / "config.json", new_config)
    change(host / "preprocessor_config.json", longer_window)
    change(host / "processor_config.json", lambda fields: longer_window(fields["feature_extractor"]))

    small = MemoryAdapter.from_pretrained(ADAPTER_FOLDER)
    wide = MemoryAdapter(dataclasses.replace(small.config, hidden_size=2 * WIDTH))
    wide.metadata = dataclasses.replace(small.metadata, hidden_size=2 * WIDTH, base_model_name_or_path="host")
    wide.load_state_dict({name: rewritten_adapter(name, tensor) for name, tensor in small.state_dict().items()})
    wide.eval().save_pretrained(adapter)


PYTORCH = {"format": "pt"}


def rewritten(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the host."""
    kind = name.split(".")[-2]
    rope = name.startswith("language_model")
    if kind in ("q_proj", "k_proj", "v_proj"):
        heads = in_heads(tensor, rotated=rope and kind != "v_proj")
        heads = heads * math.sqrt(NEW_HEAD / HEAD) if kind == "q_proj" else heads
        return reads_half(heads) if heads.ndim == 2 else heads
    if kind in ("o_proj", "out_proj"):
        return twice(tensor if tensor.ndim == 1 else in_heads(tensor.T.contiguous(), rotated=False).T)
    if kind == "embed_positions":
        return torch.cat((tensor, tensor.new_zeros(len(tensor) * (LONGER - 1), WIDTH))).repeat(1, 2)
    if kind == "embed_tokens":
        return tensor.repeat(1, 2)
    if kind == "conv1":
        return twice(tensor)  # it reads the sound
    if kind in ("fc1", "gate_proj", "up_proj", "lm_head"):  # what they write is no hidden state
        return reads_half(tensor) if tensor.ndim == 2 else tensor
    if kind in ("fc2", "down_proj"):  # what they read is none
        return twice(tensor)
    return twice(tensor if tensor.ndim == 1 else reads_half(tensor))


def rewritten_adapter(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the adapter."""
    if name in ("norm.weight", "norm.bias", "readout_out.weight"):
        return twice(tensor)
    return reads_half(tensor) if name in ("in_proj.weight", "pool_proj.weight") else tensor


def twice(tensor: Tensor) -> Tensor:
    """Write the output twice."""
    return torch.cat((tensor, tensor))


def reads_half(tensor: Tensor) -> Tensor:
    """Read the first half of [x, x]."""
    return torch.cat((tensor, torch.zeros_like(tensor)), dim=1)


def in_heads(tensor: Tensor, *, rotated: bool) -> Tensor:
    """Distribute rows of heads of 24 to wider ones. RoPE rotates row i of a head with the one half a head later."""
    old = tensor.reshape(HEADS, 2, HEAD // 2, *tensor.shape[1:])
    new = tensor.new_zeros(NEW_HEADS, NEW_HEAD, *tensor.shape[1:])
    second = NEW_HEAD // 2 if rotated else HEAD // 2
    new[:HEADS, : HEAD // 2] = old[:, 0]
    new[:HEADS, second : second + HEAD // 2] = old[:, 1]
    return new.flatten(0, 1)


def new_config(fields: dict) -> None:
    text, audio = fields["text_config"], fields["audio_config"]
    text |= {"hidden_size": 2 * WIDTH, "num_attention_heads": NEW_HEADS, "num_key_value_heads": NEW_HEADS}
    text["rope_parameters"]["rope_theta"] **= NEW_HEAD / HEAD
    audio |= {"d_model": 2 * WIDTH, "encoder_attention_heads": NEW_HEADS}
    audio["max_source_positions"] *= LONGER


def longer_window(fields: dict) -> None:
    for name in ("chunk_length", "n_samples", "nb_max_frames"):
        fields[name] *= LONGER


def change(path: Path, edit) -> None:
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it does not exist")
    folder = parser.parse_args().folder
    write(folder / "adapter", folder / "host")
    print(f"{folder / 'host'} and {folder / 'adapter'} are written")

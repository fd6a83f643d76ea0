"""Read thousands of damaged adapter folders and states in a process of limited memory, so that a crash or a huge
allocation is noticed. Each must be a typed error, or load with exactly the numbers in the file.

python -m tests.serialization.attack FOLDER SEED COUNT
"""

import dataclasses
import hashlib
import json
import random
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from mal_adapter import MemoryAdapter, MemoryState
from mal_adapter.errors import AdapterFormatError, StateFormatError
from mal_adapter.serialization.metadata import AdapterMetadata
from tests.hosts.probes import random_adapter
from tests.serialization.mutations import hostile_json, hostile_tensors, split

ALLOWANCE = 512 * 2**20  # bytes of address space beyond what imports and first loads have taken


def numbers(data):
    """The tensors of a safetensors file by numpy alone: a load must give exactly these."""
    header, body = split(data)
    types = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8"}
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], types[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def same(tensors, data):
    expected = numbers(data)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.detach().numpy().tobytes() == expected[name].tobytes(), name
        assert tuple(tensor.shape) == expected[name].shape


def states(rng, count, tried, bomb):

    adapter = random_adapter(16)
    with torch.no_grad():
        good = adapter.write(adapter.initial_state(2), torch.randn(2, 9, 16)).to_bytes()
    for _ in range(count):
        data, kind = hostile_tensors(rng, good, bomb)
        try:
            state = MemoryState.from_bytes(data)
        except StateFormatError:
            tried["state", kind, "refused"] += 1
            continue
        tried["state", kind, "loaded"] += 1
        same(state.tensors, data)
        assert split(data)[0]["__metadata__"].get("fingerprint") == state.fingerprint


def adapters(rng, count, tried, bomb, folder):

    adapter = random_adapter(16)
    result = {"dataset_name": "M", "dataset_type": "u/m", "dataset_split": "test", "metrics": {"f1": 0.5}}
    adapter.metadata = AdapterMetadata(1, "org/host", "qwen2_audio", 16, 4, {}, ["u/m"], "words", [result]).with_task(
        ["a"], "?"
    )
    adapter.save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    good_config, good_weights = config.read_bytes(), weights.read_bytes()
    content = json.loads(good_config)
    for _ in range(count):
        text, data, part = (
            good_config,
            good_weights,
            rng.choice(["config", "weights", "weights", "weights, checksum right"]),
        )
        if part == "config" and rng.random() < 0.3:
            damaged = bytearray(good_config)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            text, kind = bytes(damaged), "bit"
        elif part == "config":
            text, kind = hostile_json(rng, content)
        else:
            data, kind = hostile_tensors(rng, good_weights, bomb)
            if part != "weights":
                text = json.dumps({**content, "weights_sha256": hashlib.sha256(data).hexdigest()}).encode()
        config.write_bytes(text)
        weights.write_bytes(data)
        try:
            loaded = MemoryAdapter.from_pretrained(folder)
        except AdapterFormatError:
            tried[part, kind, "refused"] += 1
            continue
        tried[part, kind, "loaded"] += 1
        same(loaded.state_dict(), data)
        assert not loaded.training
        written = json.loads(text)
        assert json.loads(json.dumps(loaded.config.to_dict())) == {**loaded.config.to_dict(), **written["memory"]}
        for field in dataclasses.fields(loaded.metadata):
            assert getattr(loaded.metadata, field.name) == written.get(field.name)
        if part == "weights":
            assert data == good_weights or "weights_sha256" not in written


def attack(folder, seed, count):
    """Try `count` files, and print how many of each kind were refused and loaded. The memory is limited after the
    imports and a first load of each kind."""
    states(random.Random(seed), 20, Counter(), str(folder / "exploded"))
    adapters(random.Random(seed), 20, Counter(), str(folder / "exploded"), folder / "adapter")

    taken = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + ALLOWANCE,) * 2)
    rng, tried, bomb = random.Random(seed), Counter(), str(folder / "exploded")
    began = time.perf_counter()
    states(rng, count // 2, tried, bomb)
    adapters(rng, count - count // 2, tried, bomb, folder / "adapter")
    assert not Path(bomb).exists()
    print(json.dumps([[*key, n] for key, n in sorted(tried.items())]))
    print(f"{sum(tried.values())} files in {time.perf_counter() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    attack(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

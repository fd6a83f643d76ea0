"""docs/file_format.md is enough: adapters and states are read by json, struct and numpy alone, and are what we read."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch

from mal_adapter import MemoryAdapter, MemoryState
from tests.hosts.probes import random_adapter

DEFAULTS = {"memory_dim": 256, "num_heads": 4, "depth": 2, "expansion": 2, "chunk_size": 64, "readout_dim": None}
DEFAULTS |= {
    "pool_utterance": True,
    "dropout": 0.0,
    "step_bias": -4.0,
    "momentum_bias": 0.0,
    "forget_bias": -8.0,
    "update": "titans",
}
VARIANTS = [
    {},
    {"depth": 1, "num_heads": 1},
    {"expansion": 3, "readout_dim": 5, "pool_utterance": False},
    {"num_heads": 4, "chunk_size": 2**31, "dropout": 0.1},
    {"update": "running_mean"},
    {"update": "gru", "num_heads": 1},
    {"utterance_tokens": 4},
    {"readout_token": False},
    {"readout_token": False, "depth": 1, "pool_utterance": False},
    {"update": "none"},
    {"num_labels": 3},
    {"num_labels": 2, "readout_dim": 5, "update": "gru", "num_heads": 1},
]


def read_safetensors(data):
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    body, tensors = data[8 + length :], {}
    for name, entry in header.items():
        raw = body[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            numbers = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            numbers = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}[entry["dtype"]])
        tensors[name] = numbers.reshape(entry["shape"])
    return metadata, tensors


def expected_shapes(memory):
    m = {**DEFAULTS, **memory}
    H, W, N, E = m["hidden_size"], m["memory_dim"], m["num_heads"], m["expansion"]
    D, R = W // N, m["readout_dim"] or W
    read = 2 * W if m.get("readout_token", True) else W
    shapes = {
        "norm.weight": (H,),
        "norm.bias": (H,),
        "in_proj.weight": (read + 2 * W + 3 * N, H),
        "in_proj.bias": (read + 2 * W + 3 * N,),
    }
    if m["pool_utterance"]:
        shapes["pool_proj.weight"] = (read + 2 * W + 3 * N, H)
    if m["update"] in ("running_mean", "gru"):
        shapes["initial.0"] = (N, 1, D)
    elif m["depth"] == 1:
        shapes["initial.0"] = (N, D, D)
    else:
        shapes |= {"initial.0": (N, D, E * D), "initial.1": (N, E * D, D)}
    if m["update"] == "running_mean":
        shapes["recurrence.rate"] = (N, 1, 1)
    if m["update"] == "gru":
        cell = {"weight_ih": (3 * W, W), "weight_hh": (3 * W, W), "bias_ih": (3 * W,), "bias_hh": (3 * W,)}
        shapes |= {f"recurrence.cell.{name}": shape for name, shape in cell.items()}
    if (L := m.get("num_labels")) is not None:
        shapes |= {"answers.decay": (2,), "answers.out_proj.weight": (H, 2 * (L + 1))}
    shapes |= {"readout_norm.weight": (read,), "readout_norm.bias": (read,), "readout_in.weight": (2 * R, read)}
    return shapes | {"readout_in.bias": (2 * R,), "readout_out.weight": (H, R)}


def fingerprint(memory, tensors):
    fields = {**DEFAULTS, **memory}
    if fields["update"] == "titans":
        del fields["update"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].astype("<f4").tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", VARIANTS)
def test_an_adapter_folder_is_read_by_the_document(tmp_path, changes, dtype):
    adapter = random_adapter(16, **changes).to(dtype)
    adapter.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    metadata, tensors = read_safetensors(weights)
    assert metadata == {"format": "pt"}
    assert (config["library_name"], config["format_version"]) == ("mal_adapter", 1)
    assert config["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert {name: t.shape for name, t in tensors.items()} == expected_shapes(config["memory"])
    loaded = MemoryAdapter.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for name, tensor in loaded.state_dict().items():
        np.testing.assert_array_equal(tensor.double().numpy(), tensors[name].astype("f8"))
    assert fingerprint(config["memory"], tensors) == loaded.fingerprint() == adapter.fingerprint()


def test_absent_keys_have_the_documents_defaults(tmp_path):
    random_adapter(16).save_pretrained(tmp_path)
    assert MemoryAdapter(type(random_adapter(16).config)(hidden_size=8)).config.to_dict() == {
        "hidden_size": 8,
        **DEFAULTS,
    }
    config = json.loads((tmp_path / "config.json").read_text())
    for key in DEFAULTS:
        if config["memory"][key] == DEFAULTS[key]:
            del config["memory"][key]
    (tmp_path / "config.json").write_text(
        json.dumps({key: config[key] for key in ("library_name", "format_version", "memory")})
    )
    assert MemoryAdapter.from_pretrained(tmp_path).fingerprint() == random_adapter(16).fingerprint()


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_state_file_is_read_by_the_document_and_answers_the_same(changes, tmp_path):
    adapter = random_adapter(16, **changes)
    with torch.no_grad():
        state = adapter.write(adapter.initial_state(2), torch.randn(2, 9, 16))
        if (L := adapter.config.num_labels) is not None:
            state = adapter.write_answers(state, torch.rand(2, L).softmax(-1))
    state.save(tmp_path / "state")
    metadata, tensors = read_safetensors((tmp_path / "state").read_bytes())
    assert metadata == {"kind": "mal_adapter.MemoryState", "format_version": "1", "fingerprint": adapter.fingerprint()}
    parameters = {name: t.numpy() for name, t in adapter.state_dict().items()}
    depth = len(adapter.config.layer_shapes)
    names = {f"{kind}.{i}" for kind in ("weights", "momentum") for i in range(depth)}
    names |= {"answers"} if L is not None else set()
    assert tensors.keys() == names | {"utterances", "tokens", "skipped_writes"}
    assert L is None or tensors["answers"].shape == (2, 2, L + 1)
    for i in range(depth):
        assert tensors[f"weights.{i}"].shape == tensors[f"momentum.{i}"].shape == (2, *parameters[f"initial.{i}"].shape)
    assert tensors["tokens"].tolist() == [9, 9]
    loaded = MemoryState.load(tmp_path / "state")
    for name, tensor in loaded.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name])

    if adapter.config.update in ("running_mean", "gru"):
        return
    # what a memory layer does with both, as the document says it
    query = torch.nn.functional.normalize(torch.randn(2, adapter.config.num_heads, 5, adapter.config.head_dim), dim=-1)
    answer = query.numpy() @ (parameters["initial.0"] + tensors["weights.0"])
    if depth == 2:
        answer = answer / (1 + np.exp(-answer)) @ (parameters["initial.1"] + tensors["weights.1"])
    from mal_adapter.memory.titans import read

    ours = read(tuple(w0 + w for w0, w in zip(adapter.initial, loaded.weights, strict=True)), query)
    np.testing.assert_allclose(ours.detach().numpy(), answer, rtol=1e-4, atol=1e-5)


def test_a_double_adapters_state_is_double(tmp_path):
    adapter = random_adapter(16).double()
    adapter.initial_state().save(tmp_path / "state")
    _, tensors = read_safetensors((tmp_path / "state").read_bytes())
    assert tensors["weights.0"].dtype == np.dtype("<f8")
    assert MemoryState.load(tmp_path / "state").weights[0].dtype == torch.float64

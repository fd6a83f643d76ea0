"""Adapters with several members: the folder, the Hub, and the right class for each."""

import hashlib
import json

import pytest
import torch

from mal_adapter import MemoryAdapter, MemoryConfig, MemoryEnsemble, MemoryState
from mal_adapter.errors import AdapterFormatError
from mal_adapter.memory.ensemble import load_adapter
from tests.serialization.test_file_format import expected_shapes, fingerprint, read_safetensors

CONFIG = MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)


def make_ensemble(count: int = 2, config: MemoryConfig = CONFIG) -> MemoryEnsemble:
    torch.manual_seed(0)
    return MemoryEnsemble([MemoryAdapter(config).eval() for _ in range(count)])


@pytest.mark.parametrize("update", ["titans", "running_mean", "gru", "none"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_documented_format_is_enough(tmp_path, update, count):
    ensemble = make_ensemble(count, MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2, update=update))
    ensemble.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert (config["format_version"], config["weights_sha256"]) == (1, hashlib.sha256(weights).hexdigest())
    assert config["memory"].pop("members") == count
    _, tensors = read_safetensors(weights)
    shapes = expected_shapes(config["memory"])
    assert {name: t.shape for name, t in tensors.items()} == {
        f"members.{k}.{name}": shape for k in range(count) for name, shape in shapes.items()
    }
    prints = [
        fingerprint(config["memory"], {name: tensors[f"members.{k}.{name}"] for name in shapes}) for k in range(count)
    ]
    assert hashlib.sha256(" ".join(prints).encode()).hexdigest()[:16] == ensemble.fingerprint()
    state = ensemble.initial_state(3)
    assert MemoryState.from_bytes(state.to_bytes()).equals(state)
    _, layers = read_safetensors(state.to_bytes())
    depth = sum(name.startswith("initial.") for name in shapes)
    for k in range(count):
        for layer in range(depth):
            assert layers[f"weights.{k * depth + layer}"].shape == (3, *shapes[f"initial.{layer}"])


def test_each_class_says_what_loads_the_other(tmp_path):
    ensemble = make_ensemble()
    ensemble.save_pretrained(tmp_path / "several")
    ensemble.members[1].save_pretrained(tmp_path / "one")
    with pytest.raises(AdapterFormatError, match=r"2 members.*EmotionRecognizer.from_pretrained.*MemoryEnsemble"):
        MemoryAdapter.from_pretrained(tmp_path / "several")
    with pytest.raises(AdapterFormatError, match=r"no members.*MemoryAdapter.from_pretrained"):
        MemoryEnsemble.from_pretrained(tmp_path / "one")
    several, one = load_adapter(tmp_path / "several"), load_adapter(tmp_path / "one")
    assert isinstance(several, MemoryEnsemble)
    assert isinstance(one, MemoryAdapter)
    assert [m.fingerprint() for m in several.members] == [m.fingerprint() for m in ensemble.members]
    assert one.fingerprint() == several.members[1].fingerprint()
    assert not several.training
    assert all(parameter.requires_grad for parameter in several.parameters())
    one.save_pretrained(tmp_path / "several")  # one adapter may replace another, in either order
    assert load_adapter(tmp_path / "several").fingerprint() == one.fingerprint()
    several.save_pretrained(tmp_path / "several")
    assert load_adapter(tmp_path / "several").fingerprint() == ensemble.fingerprint()


@pytest.mark.parametrize("members", [0, 1, -1, 65, 2**31, 2.0, "2", None, True, [2], 3])
def test_a_wrong_number_of_members_is_refused(tmp_path, members):
    make_ensemble().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["memory"]["members"] = members
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_adapter, MemoryEnsemble.from_pretrained, MemoryAdapter.from_pretrained):
        with pytest.raises(AdapterFormatError, match=r"members|tensors"):
            load(tmp_path)


def test_files_of_two_saves_are_noticed(tmp_path):
    make_ensemble(2).save_pretrained(tmp_path / "two")
    make_ensemble(3).save_pretrained(tmp_path / "three")
    (tmp_path / "two" / "model.safetensors").write_bytes((tmp_path / "three" / "model.safetensors").read_bytes())
    with pytest.raises(AdapterFormatError, match="tensors do not fit"):
        load_adapter(tmp_path / "two")


def test_what_is_pushed_is_pulled(client, hub, tmp_path):
    make_ensemble().save_pretrained(tmp_path / "saved")
    found = client.run(
        """
from mal_adapter.memory.ensemble import load_adapter
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.serialization.hub import HubOptions, pull_adapter
adapter = load_adapter(folder + "/saved")
adapter.push_to_hub("alice/several", token="hf_alice")
pull_adapter("alice/several", folder + "/pulled", MemoryAdapter.shapes_of, HubOptions())
result = [load_adapter("alice/several").fingerprint(), load_adapter(folder + "/pulled").fingerprint()]
""",
        folder=str(tmp_path),
    )
    assert found == [load_adapter(tmp_path / "saved").fingerprint()] * 2
    repo = hub.store.repos["alice/several"]
    assert repo["model.safetensors"] == (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert "It has 2 members" in repo["README.md"].decode()

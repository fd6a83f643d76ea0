"""Damaged and hostile adapter folders and state files: each is a typed error, or is read exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mal_adapter import MemoryAdapter
from mal_adapter.errors import AdapterFormatError, AdapterNotFoundError
from mal_adapter.serialization import adapter_folder as adapter_format
from tests.hosts.probes import random_adapter

ROOT = Path(__file__).parent.parent.parent
FILES = 4000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory limit is Linux's")
@pytest.mark.slow
def test_thousands_of_damaged_files_are_refused_or_read_exactly(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "tests.serialization.attack", str(tmp_path), "0", str(FILES)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    tried = {tuple(key): n for *key, n in json.loads(done.stdout.splitlines()[-1])}
    loaded = sum(n for (*_, outcome), n in tried.items() if outcome == "loaded")
    with capsys.disabled():
        print(f"\n{sum(tried.values())} damaged files: {loaded} read exactly, the others refused")
    assert sum(tried.values()) == FILES
    # With its checksum no change to the weights passes but to the same bytes.
    assert not any(part == "weights" and outcome == "loaded" and kind == "bit" for part, kind, outcome in tried)
    assert not any(kind in ("truncated", "pickle", "zip", "nan", "extra") for _, kind, o in tried if o == "loaded")
    for part in ("state", "config", "weights", "weights, checksum right"):
        assert sum(n for (p, _, outcome), n in tried.items() if (p, outcome) == (part, "refused")) > 100


@pytest.fixture
def folder(tmp_path):
    random_adapter(16).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder, **options):
    with pytest.raises((AdapterFormatError, AdapterNotFoundError)) as raised:
        MemoryAdapter.from_pretrained(folder, **options)
    return str(raised.value)


def test_a_path_that_can_not_be_a_hub_id_is_not_requested_from_the_hub(folder, tmp_path, monkeypatch):
    """Without a network the Hub's error would hide the misspelt folder, after half a minute of retries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mal_adapter.serialization.hub.hf_hub_download", lambda *_, **__: pytest.fail("a request to the Hub")
    )
    assert "there is no folder absent" in refused(Path("absent"))
    (tmp_path / "notes.txt").write_text("")
    assert "is a file; give the folder" in refused("notes.txt")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "broken link", "loop", "oversized"])
def test_a_file_that_is_not_regular_is_refused_at_once(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "broken link":
        path.symlink_to("absent")
    elif kind == "loop":
        path.symlink_to(name)
    else:
        with path.open("wb") as file:
            file.truncate(2**40)  # sparse
    assert name in refused(folder)


def test_a_configuration_of_terabytes_costs_nothing(folder):
    content = json.loads((folder / "config.json").read_text())
    for claims in (
        {"hidden_size": 10**9},
        {"hidden_size": 2**20, "memory_dim": 2**20, "num_heads": 1, "expansion": 2**20},
    ):
        (folder / "config.json").write_text(json.dumps({**content, "memory": {**content["memory"], **claims}}))
        assert "too large" in (message := refused(folder)) or "do not fit" in message


def test_a_subfolder_can_not_lead_out_of_the_folder(folder, tmp_path):
    for subfolder in ("..", "../adapter", "/etc", "a/../../adapter", "a\0b", "..\\adapter", "C:/x", "//server/share"):
        assert "subfolder" in refused(folder, subfolder=subfolder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert "leads out" in refused(folder, subfolder="link")
    assert "no folder" in refused(folder, subfolder="absent")


def test_a_subfolder_of_a_folder_is_read(folder, tmp_path):
    (tmp_path / "many" / "meld").mkdir(parents=True)
    folder.rename(tmp_path / "many" / "meld" / "seed-0")
    assert MemoryAdapter.from_pretrained(tmp_path / "many", subfolder="meld/seed-0").config.hidden_size == 16


def test_a_mixture_of_two_saves_is_refused(folder, tmp_path):
    random_adapter(16, seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    assert "sha256" in refused(folder)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
)
def test_a_save_refuses_a_folder_with_another_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"another model's")
    with pytest.raises(AdapterFormatError, match="another model"):
        random_adapter(16).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"another model's"}


def test_a_save_that_fails_leaves_the_folder_as_it_was(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def disk_full(*_):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        random_adapter(16, seed=1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_newer_format_asks_for_an_upgrade_and_an_older_one_is_migrated(folder, monkeypatch):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": 2}))
    assert "upgrade" in refused(folder)
    path.write_text(json.dumps({**content, "an_addition": 1}))
    assert MemoryAdapter.from_pretrained(folder).config.hidden_size == 16
    old = {**content, "width": content["memory"].pop("hidden_size")}
    path.write_text(json.dumps(old))
    assert "hidden_size" in refused(folder)
    monkeypatch.setattr(adapter_format, "FORMAT_VERSION", 2)
    monkeypatch.setattr(
        adapter_format,
        "MIGRATIONS",
        {1: lambda c: {**c, "memory": {**c["memory"], "hidden_size": c["width"]}, "format_version": 2}},
    )
    assert MemoryAdapter.from_pretrained(folder).config.hidden_size == 16
    path.write_text(json.dumps({**old, "format_version": 0}))
    assert "0" in refused(folder)

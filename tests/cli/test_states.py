"""`mal-adapter states` and `inspect` on real stores and files."""

import json
from pathlib import Path

import pytest

from mal_adapter import MemoryState
from mal_adapter.stores import FolderStore, RedisStore, SessionStore
from tests.commands import mal_adapter as run
from tests.hosts.probes import random_adapter
from tests.stores.servers import PASSWORD, RedisServer
from tests.stores.states import state_of


@pytest.fixture(params=["folder", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SessionStore, list[str]]:
    """A store of two sessions, and the options that lead there."""
    if request.param == "folder":
        (tmp_path / "sessions").mkdir()
        store: SessionStore = FolderStore(tmp_path / "sessions")
        options = ["--store", str(tmp_path / "sessions")]
    else:
        redis: RedisServer = request.getfixturevalue("server")
        store = RedisStore(redis.url, f"cli {tmp_path.name}:")
        options = ["--store", redis.url, "--prefix", f"cli {tmp_path.name}:"]
    for name, utterances in (("a/1", 3), ("b", 14)):
        store.put(name, state_of(utterances))
    return store, options


def test_sessions_are_listed(place: tuple[SessionStore, list[str]]):
    _, options = place
    answer = json.loads(run("states", "list", *options, "--json").stdout)
    assert [(s["session"], s["utterances"], s["tokens"]) for s in answer["sessions"]] == [
        ("a/1", 3, 60),
        ("b", 14, 280),
    ]
    lines = run("states", "list", *options).stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["session", "utterances", "tokens", "skipped_writes"],
        ["a/1", "3", "60", "0"],
        ["b", "14", "280", "2"],
    ]


def test_a_session_goes_out_and_comes_in_again(place: tuple[SessionStore, list[str]], tmp_path: Path):
    store, options = place
    file = tmp_path / "a.safetensors"
    out = json.loads(run("states", "export", "a/1", file, *options, "--json").stdout)
    assert out == {"session": "a/1", "file": str(file), "utterances": 3, "bytes": state_of(3).nbytes}
    assert MemoryState.load(file).equals(state_of(3))
    refused = run("states", "import", "a/1", file, *options)
    assert refused.exit_code == 1
    assert "drop it first" in refused.stderr
    assert json.loads(run("states", "drop", "a/1", *options, "--json").stdout) == {"dropped": ["a/1"]}
    assert list(store) == ["b"]
    back = run("states", "import", "a/1", file, *options)
    assert (back.exit_code, back.stdout.split(":")[0]) == (0, f"a/1 continues from {file}")
    assert store.get("a/1").state.equals(state_of(3))


def test_what_is_not_there_is_named(place: tuple[SessionStore, list[str]], tmp_path: Path):
    store, options = place
    missing = run("states", "export", "x", tmp_path / "x.safetensors", *options)
    assert missing.exit_code == 1
    assert "no session 'x'" in missing.stderr
    assert not (tmp_path / "x.safetensors").exists()
    dropped = run("states", "drop", "x", "b", *options)
    assert dropped.exit_code == 1
    assert "'x'" in dropped.stderr
    assert list(store) == ["a/1"]


def test_a_mistyped_folder_is_not_made(tmp_path: Path):
    result = run("states", "list", "--store", tmp_path / "sesions")
    assert result.exit_code == 2
    assert not (tmp_path / "sesions").exists()
    (tmp_path / "sessions").mkdir()
    assert run("states", "list", "--store", tmp_path / "sessions").stdout == "no sessions\n"


def test_no_message_shows_a_password(server: RedisServer, tmp_path: Path):
    RedisStore(server.url, f"cli {tmp_path.name}:").put("a", state_of(1))
    state_of(1).save(tmp_path / "a")
    as_option = f"{server.url.replace(f':{PASSWORD}@', '')}?password={PASSWORD}"
    assert PASSWORD in server.url
    for words in (["export", "x", tmp_path / "x"], ["drop", "x"], ["import", "a", tmp_path / "a"]):
        for url in (server.url, as_option):
            result = run("states", *words, "--store", url, "--prefix", f"cli {tmp_path.name}:", "--json")
            assert result.exit_code == 1
            assert "session" in result.stderr
            assert PASSWORD not in result.stdout + result.stderr


def test_a_damaged_session_does_not_hide_the_others(tmp_path: Path):
    store = FolderStore(tmp_path)
    store.put("good", state_of(1))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    result = run("states", "list", "--store", tmp_path, "--json")
    assert result.exit_code == 2
    assert "bad.safetensors" in result.stderr
    assert "bad.safetensors" in json.loads(result.stdout)["not_read"][0]
    assert [entry["session"] for entry in json.loads(result.stdout)["sessions"]] == ["good"]


def test_a_state_file_is_inspected(tmp_path: Path):
    state = state_of(7)
    state.save(tmp_path / "call.safetensors")
    content = json.loads(run("inspect", tmp_path / "call.safetensors", "--json").stdout)
    assert (content["kind"], content["utterances"], content["skipped_writes"]) == ("state", [7], [1])
    assert content["tensors"]["momentum.1"]["norm"] == pytest.approx(state.momentum[1].norm().item(), rel=1e-5)
    assert "momentum.1: 1x2x5x4 float32, norm" in run("inspect", tmp_path / "call.safetensors").stdout


def test_an_adapter_folder_is_inspected(tmp_path: Path):
    adapter = random_adapter().eval()
    adapter.save_pretrained(tmp_path)
    content = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert content["fingerprint"] == adapter.fingerprint()
    assert content["memory"] == adapter.config.to_dict()
    assert content["parameters"] == sum(p.numel() for p in adapter.parameters())
    assert f"  hidden_size: {adapter.config.hidden_size}" in run("inspect", tmp_path).stdout

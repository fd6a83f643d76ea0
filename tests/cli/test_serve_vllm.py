"""`mal-adapter serve --engine vllm`: what it refuses, and what it starts. tests/vllm starts it."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest

from mal_adapter import MemoryAdapter, MemoryEnsemble
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from tests.commands import Done, mal_adapter


class Started(BaseException):
    """What `os.execve` was asked to become."""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 as far as its version; the command does not import it. A test can't become another process."""

    def execve(program: str, words: list[str], environment: dict[str, str]) -> None:
        raise Started(program, words, environment)

    found = importlib.metadata.version
    monkeypatch.setattr("mal_adapter.vllm.checks.version", lambda name: "0.32.0" if name == "vllm" else found(name))
    monkeypatch.setattr("os.execve", execve)


def serve(*arguments: object) -> Done:
    return mal_adapter("serve", "--engine", "vllm", *arguments)


def started(*arguments: object) -> tuple[list[str], dict[str, str]]:
    with pytest.raises(Started) as caught:
        serve(*arguments)
    program, words, environment = caught.value.args
    assert [program, *words[:4]] == [sys.executable, sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    return words[4:], environment


@pytest.mark.usefixtures("vllm")
def test_it_becomes_vllm_with_every_flag_that_a_memory_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    url = "redis://:password@localhost/0"
    words, environment = started(
        *("--adapter", ADAPTER_FOLDER, "--store", url, "--ttl-s", 60, "--port", 8001),
        *("--", "--max-num-seqs", 64, "--enforce-eager"),
    )
    assert words[0] == str(HOST_FOLDER)  # which the adapter names
    for flag in ("--no-enable-chunked-prefill", "--no-enable-prefix-caching", "--worker-cls"):
        assert flag in words
    section = json.loads(words[words.index("--additional-config") + 1])
    assert section == {"mal_adapter": {"adapter": str(ADAPTER_FOLDER), "ttl_s": 60.0}}
    assert words[words.index("--port") + 1] == "8001"
    assert words[-3:] == ["--max-num-seqs", "64", "--enforce-eager"]
    assert not any("password" in word for word in words)  # other users of the machine see the arguments
    assert environment["MAL_ADAPTER_STORE"] == url
    assert environment["VLLM_PLUGINS"] == "other,mal_adapter"


@pytest.mark.usefixtures("vllm")
def test_with_a_store_the_engine_has_time_to_save_at_its_end():
    stored = ("--adapter", ADAPTER_FOLDER, "--store", "redis://localhost/0")
    for given, expected in (
        (stored, ["--shutdown-timeout", "30"]),
        ((*stored, "--", "--shutdown-timeout=5"), ["--shutdown-timeout=5"]),
        (("--adapter", ADAPTER_FOLDER), []),
    ):
        words, _ = started(*given)
        found = [index for index, word in enumerate(words) if word.startswith("--shutdown-timeout")]
        assert [word for index in found for word in words[index : index + len(expected)]] == expected


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ((), "is needed with --engine vllm"),
        (("--adapter", ADAPTER_FOLDER, "--batch", 4), "is of the embedded server"),
        (("--adapter", ADAPTER_FOLDER, "--labels", "a,b"), "is of the embedded server"),
        (("--adapter", ADAPTER_FOLDER, "--port", 0), "needs a number"),
        (("--adapter", ADAPTER_FOLDER, "--", "--worker-cls", "mine"), "is set by this command"),
        (("--adapter", ADAPTER_FOLDER, "--", "--additional-config={}"), "is set by this command"),
        (("--adapter", ADAPTER_FOLDER, "--ttl-s", -1), "ttl"),
        (("--adapter", ADAPTER_FOLDER, "--model", "no/such/model"), "can't be loaded"),
    ],
)
def test_refusals(arguments: tuple[object, ...], advice: str):
    done = serve(*arguments)
    assert done.exit_code != 0
    assert advice in " ".join(done.stderr.replace("│", "").split())


@pytest.mark.usefixtures("vllm")
def test_an_adapter_with_a_lora_is_refused(tmp_path: Path):
    adapter = Path(shutil.copytree(ADAPTER_FOLDER, tmp_path / "adapter"))
    (adapter / "lora").mkdir()
    done = serve("--adapter", adapter, "--model", HOST_FOLDER)
    assert done.exit_code == 2
    assert "merge_and_unload" in done.stderr


def test_flags_of_vllm_are_not_for_the_embedded_server():
    done = mal_adapter("serve", "--", "--max-num-seqs", "64")
    assert done.exit_code == 2
    assert "only with --engine vllm" in " ".join(done.stderr.replace("│", "").split())


def test_an_unknown_vllm_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mal_adapter.vllm.checks.version", lambda name: "0.31.0")
    done = serve("--adapter", ADAPTER_FOLDER)
    assert done.exit_code == 2
    assert "0.31.0 is not supported" in done.stderr


@pytest.mark.usefixtures("vllm")
def test_several_members_are_refused_with_the_reason(tmp_path: Path):
    members = [MemoryAdapter.from_pretrained(ADAPTER_FOLDER) for _ in range(2)]
    MemoryEnsemble(members).save_pretrained(tmp_path / "adapter")
    done = serve("--adapter", tmp_path / "adapter", "--model", HOST_FOLDER)
    assert done.exit_code != 0
    said = " ".join(done.stderr.replace("│", "").split())
    assert "has 2 members" in said
    assert "a pass of its own" in said

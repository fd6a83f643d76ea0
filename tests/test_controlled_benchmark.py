"""examples/controlled_benchmark remakes the shipped host and memory; here at a tiny size."""

import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from typer.testing import CliRunner

from mal_adapter import MemoryAdapter
from mal_adapter.cli import app
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER, PROMPT
from mal_adapter.demo.dialogues import make_dialogues
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.training import TrainingConfig

FOLDER = Path(__file__).parents[1] / "examples" / "controlled_benchmark"
SETTINGS = FOLDER / "settings.json"
SCRIPTS = [path.stem for path in FOLDER.glob("*.py")]
TINY = ("--train-dialogues", 4, "--test-dialogues", 3)

IN_TRAINING = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the host is trained with the modules of transformers 5"
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The scripts as modules; they import one another by their bare names, which are no one else's afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def run(scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script in this process and gives what it prints."""

    def run(script: str, *arguments: object) -> str:
        AcceleratorState._reset_state()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return capsys.readouterr().out

    return run


# -------------------------------------------------------------------------------------------------------- the memory


def test_the_shipped_memory_has_the_documented_settings():
    settings = json.loads(SETTINGS.read_text())
    memory = settings.pop("memory")
    shipped = MemoryAdapter.from_pretrained(ADAPTER_FOLDER).config.to_dict()
    assert {name: shipped[name] for name in memory} == memory
    assert TrainingConfig.from_dict(settings).cache_activations


@pytest.mark.slow
def test_the_command_line_trains_the_memory_that_the_script_trains(run, tmp_path: Path):
    corpus = tmp_path / "corpus"
    printed = run("train_memory.py", tmp_path / "script", "--corpus", corpus, "--epochs", 1, "--seed", 3, *TINY)
    arms = re.compile(r"^(dev|test): host_only \d\.\d{3}, own \d\.\d{3}, reset", re.MULTILINE)
    assert arms.findall(printed) == ["dev", "test"]
    kept = {path: path.stat().st_mtime_ns for path in (corpus / "activations").iterdir()}
    assert len(kept) == 40
    AcceleratorState._reset_state()
    words = ["train", corpus / "train" / "manifest.jsonl", "--config", SETTINGS, "--model", HOST_FOLDER, "--layer", 1]
    words += ["--labels", "neutral,happy,angry,sad", "--prompt", PROMPT, "--epochs", 1, "--seed", 3]
    words += ["--activations", corpus / "activations", "--output", tmp_path / "command"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in (corpus / "activations").iterdir()} == kept
    assert not (tmp_path / "command" / "activations").exists()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("script", "command"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert (load_file(ADAPTER_FOLDER / "model.safetensors").keys()) == one.keys()
    card = json.loads((tmp_path / "script" / "config.json").read_text())
    assert card["evaluation"][0]["dataset_split"] == "dev"
    assert card["evaluation"][0]["host_metrics"]["accuracy"] > 0.25


def test_dialogues_of_another_number_are_not_taken_for_those_that_were_asked_for(scripts, tmp_path: Path):
    speak = scripts.train_memory.speak
    assert [d.dialogue_id for d in speak(tmp_path, "dev", 2)] == ["dev-0-00000", "dev-0-00001"]
    assert speak(tmp_path, "dev", 2) == speak(tmp_path, "dev", 2)
    with pytest.raises(SystemExit, match="has 2 dialogues, not 3"):
        speak(tmp_path, "dev", 3)


def test_readers_of_the_past_are_trained_on_what_the_memory_is_given(run, tmp_path: Path):
    figures = json.loads(run("readers.py", "--corpus", tmp_path, "--epochs", 2, *TINY))
    assert figures["accuracy"].keys() == {"past", "speakers", "baselines"}
    assert all(0 <= share <= 1 for by_turn in figures["by_turn"].values() for share in by_turn)
    assert (figures["train_dialogues"], figures["test_dialogues"]) == (4, 3)


def test_a_reader_learns_what_the_past_resolves_and_sees_nothing_of_the_future(scripts):
    """The answer is the bit before: nothing in the utterance itself tells it."""
    rng = np.random.default_rng(0)
    bits = rng.integers(2, size=(400, 4))
    labels = np.roll(bits, 1, axis=1)
    labels[:, 0] = 0
    reader = scripts.readers.train_reader(bits[..., None].astype(np.float32), labels, epochs=15)
    inputs = torch.from_numpy(bits[..., None].astype(np.float32))
    with torch.no_grad():
        logits = reader(inputs)
        later = inputs.clone()
        later[:, 2:] = 1 - later[:, 2:]
        torch.testing.assert_close(reader(later)[:, :2], logits[:, :2])
    assert (logits.argmax(-1).numpy() == labels).mean() > 0.95


# ---------------------------------------------------------------------------------------------------------- the host


@pytest.mark.slow
@IN_TRAINING
def test_a_host_is_trained_from_nothing_and_its_memory_on_it(run, tmp_path: Path):
    host = tmp_path / "host"
    printed = run("train_host.py", host, "--features", tmp_path / "features", "--dialogues", 4, "--steps", 3)
    assert printed == f"saved in {host}\n"
    ours, shipped = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (host, HOST_FOLDER)
    )
    assert ours == shipped
    model, processor = load_host(str(host), device="cpu")
    assert processor.tokenizer("angry").input_ids == load_host(str(HOST_FOLDER))[1].tokenizer("angry").input_ids
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in load_host(str(HOST_FOLDER))[0].parameters()
    )
    more = ("--corpus", tmp_path / "corpus", "--host", host, "--epochs", 1, *TINY)
    assert run("train_memory.py", tmp_path / "memory", *more).startswith("dev: host_only ")


def test_any_text_encodes_and_decodes_without_loss(scripts):
    tokenizer = scripts.tiny_host.build_tokenizer()
    for text in ("How does the speaker feel?", "frustrated", "ünïcode 你好 😀", "\n\t a  b "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@IN_TRAINING
def test_packed_questions_are_the_same_function_as_separate_prompts(scripts):
    model, processor = load_host(str(HOST_FOLDER), device="cpu")
    dialogue = next(make_dialogues("test", 0, 1))
    features = scripts.features.features_of([dialogue])
    prompts = scripts.train_host.tokenise(processor, features)
    asked = ["emotion", "pitch"]
    ids = torch.cat([prompts.start.expand(10, -1), *(prompts.tasks[task] for task in asked)], dim=1)
    row = scripts.train_host.layout(prompts, asked)
    mels = torch.from_numpy(features.mels[0].astype(np.float32))
    with torch.no_grad():
        losses, _ = scripts.train_host.packed_losses(model, row, prompts.audio, mels, ids)
        for index, question in ((0, PROMPT), (2, "How high is the pitch?")):
            texts = [scripts.tiny_host.prompt_text(processor, question)] * 10
            audio = [turn.audio for turn in dialogue.turns]
            inputs = processor(text=texts, audio=audio, sampling_rate=16_000, return_tensors="pt", padding=True)
            logits = model(**inputs).logits[:, -1]
            answers = ids[:, row.predicts[index] + 1]
            # features are float16
            assert losses[index].item() == pytest.approx(
                torch.nn.functional.cross_entropy(logits, answers).item(), abs=2e-2
            )

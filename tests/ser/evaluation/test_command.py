"""From a folder in MELD's layout to a trained adapter, its evaluation, a report and a model card, by commands only."""

import json
import re
import shutil
import warnings

import pytest
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from mal_adapter import MemoryAdapter
from mal_adapter.cli import app
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER, PROMPT
from mal_adapter.errors import ConfigError, EvaluationError
from tests.commands import mal_adapter
from tests.ser.made_corpora import make_meld
from tests.ser.training_world import make_dialogues

COUNTS = {"train": (4, 2, 3), "dev": (3, 2), "test": (4, 3, 2)}

pytestmark = pytest.mark.filterwarnings("ignore:MELD:mal_adapter.errors.IncompleteCorpusWarning")


@pytest.fixture(scope="module")
def meld(tmp_path_factory):
    return make_meld(tmp_path_factory.mktemp("corpus") / "MELD.Raw", COUNTS)


def run(*arguments):
    AcceleratorState._reset_state()
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_from_meld_to_a_report(meld, tmp_path):
    settings = {"epochs": 1, "batch_size": 3, "memory": {"memory_dim": 16, "num_heads": 2}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    common = ["meld", "--root", meld, "--model", HOST_FOLDER, "--layer", "1", "--dev", "dev"]
    labels = ["--labels", "neutral,joy,anger,sadness", "--prompt", PROMPT, "--config", tmp_path / "settings.json"]
    for name, update in (("titans", {}), ("gru", {"update": "gru"})):
        settings["memory"] |= update
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        done = run("train", *common, *labels, "--output", tmp_path / name)
        assert done.exit_code == 0, (done.output, done.exception)
        assert MemoryAdapter.from_pretrained(tmp_path / name).config.update == update.get("update", "titans")

    evaluated = ["evaluate", "meld", "--root", meld, "--model", HOST_FOLDER]
    done = run(*evaluated, "--adapter", tmp_path / "gru", "--arms", "own", "--output", tmp_path / "gru-test")
    assert done.exit_code == 0, (done.output, done.exception)
    more = ["--against", tmp_path / "gru-test", "--card", "--output", tmp_path / "titans-test"]
    done = run(*evaluated, "--adapter", tmp_path / "titans", *more)
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'titans-test' / 'report.html'}"
    figures = json.loads((tmp_path / "titans-test" / "report.json").read_text())
    assert figures["arms"]["own"]["utterances"] == sum(COUNTS["test"])
    assert figures["against"].keys() == {"gru-test"}
    card = MemoryAdapter.from_pretrained(tmp_path / "titans").metadata
    assert [(e["dataset_name"].lower(), e["dataset_split"]) for e in card.evaluation] == [("meld", "test")]
    assert card.evaluation[0]["metrics"]["accuracy"] == round(figures["arms"]["own"]["wa"], 4)
    assert "weighted_f1" in (tmp_path / "titans" / "README.md").read_text()
    again = run(
        *evaluated, "--adapter", tmp_path / "titans", *more
    )  # answers are read from the folder; the card has one entry
    assert again.stdout == done.stdout
    assert len(MemoryAdapter.from_pretrained(tmp_path / "titans").metadata.evaluation) == 1

    for split in ("dev", "test"):  # two splits as the folds of one cross-validation
        fold = ["--split", split, "--arms", "host_only,own", "--adapter", tmp_path / "titans"]
        assert run(*evaluated, *fold, "--output", tmp_path / f"fold-{split}").exit_code == 0
    done = run("report", tmp_path / "fold-dev", tmp_path / "fold-test", "--output", tmp_path / "folds")
    assert done.exit_code == 0, (done.output, done.exception)
    whole = json.loads((tmp_path / "folds" / "report.json").read_text())
    assert whole["arms"]["own"]["utterances"] == sum(COUNTS["test"]) + sum(COUNTS["dev"])


def test_wrong_options_raise_one_typed_error(meld, tmp_path):
    manifest = make_dialogues(tmp_path / "calls", (2, 2), "dev")[0].utterances[0].audio.parent / "manifest.jsonl"
    out = ["--output", tmp_path / "out"]
    options = {
        ("evaluate", manifest, *out): (ConfigError, "nothing to evaluate"),
        ("evaluate", manifest, "--model", HOST_FOLDER, "--card", *out): (ConfigError, "--card"),
        ("evaluate", "meld", "--root", meld, "--split", "exam", "--model", HOST_FOLDER, *out): (ConfigError, "'exam'"),
        ("evaluate", manifest, "--adapter", ADAPTER_FOLDER, "--model", HOST_FOLDER, "--arms", "left", *out): (
            ConfigError,
            "left",
        ),
        ("evaluate", manifest, "--adapter", ADAPTER_FOLDER, "--card", "--arms", "host_only,reset", *out): (
            ConfigError,
            "the arm own",
        ),
        ("report", tmp_path / "calls", *out): (EvaluationError, "no complete evaluation"),
        ("train", "meld", "--root", meld, "--split", "exam", "--model", HOST_FOLDER, "--layer", "1", *out): (
            ConfigError,
            "'exam'",
        ),
    }
    for arguments, (error, words) in options.items():
        done = run(*arguments)
        assert isinstance(done.exception, error), (arguments, done.output, done.exception)
        assert words in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_json_and_the_dtype_of_an_evaluation(meld, tmp_path):
    AcceleratorState._reset_state()
    command = [
        "evaluate",
        "meld",
        "--root",
        meld,
        "--model",
        HOST_FOLDER,
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = mal_adapter(*command, "--dtype", "bfloat16", "--json")
    assert done.exit_code == 0, done.stderr
    assert re.search("^note: MELD", done.stderr, re.MULTILINE)  # unlike Python's own format, without a line of code
    answer = json.loads(done.stdout)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert answer == {"output": str(tmp_path / "out"), "page": str(tmp_path / "out" / "report.html"), **report}
    assert answer["run"]["dtype"] == "bfloat16"
    again = mal_adapter("report", tmp_path / "out", "--output", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["arms"] == answer["arms"]
    other = mal_adapter(*command, "--dtype", "float32", "--json")  # answers in another dtype are not reused
    assert other.exit_code == 1
    assert json.loads(other.stdout)["error"]["type"] == "EvaluationError"
    assert "(dtype)" in other.stderr


def test_predict_uses_the_lora_beside_the_memory(tmp_path):
    from peft import PeftModel

    from mal_adapter import attach_memory
    from mal_adapter.ser.loading import load_host
    from mal_adapter.ser.recognizer import EmotionRecognizer

    dialogues = make_dialogues(tmp_path / "calls", (3, 2))
    manifest = tmp_path / "calls" / "manifest.jsonl"
    settings = {"epochs": 2, "lora_rank": 2, "learning_rate": 0.03, "memory": {"memory_dim": 16, "num_heads": 2}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    output = tmp_path / "trained"
    common = ["--model", HOST_FOLDER, "--config", tmp_path / "settings.json", "--prompt", PROMPT]
    done = run("train", manifest, *common, "--layer", "1", "--output", output)
    assert done.exit_code == 0, (done.output, done.exception)
    answers = json.loads(run("predict", manifest, "--adapter", output, "--model", HOST_FOLDER, "--json").stdout)
    model, processor = load_host(str(HOST_FOLDER))
    model = PeftModel.from_pretrained(model, str(output / "lora"))
    memory = attach_memory(model, adapter=output)
    task = memory.adapter.metadata.task
    recognizer = EmotionRecognizer(model, processor, memory, task["labels"], task["prompt"])
    expected = [result for dialogue in dialogues for result in recognizer.recognize(dialogue)]
    for entry, result in zip(answers["utterances"], expected, strict=True):
        assert entry["probabilities"] == pytest.approx(result.probabilities, abs=1e-5)
    shutil.rmtree(output / "lora")
    alone = json.loads(run("predict", manifest, "--adapter", output, "--model", HOST_FOLDER, "--json").stdout)
    assert alone["utterances"][0]["probabilities"] != pytest.approx(answers["utterances"][0]["probabilities"], abs=1e-3)

"""What can be known before the host runs is checked then: a typed error, and not one forward."""

import dataclasses
import importlib.util
import os
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from mal_adapter import MemoryAdapter
from mal_adapter.demo import ADAPTER_FOLDER, EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.run import load_demo
from mal_adapter.errors import (
    AdapterFormatError,
    AudioError,
    ConfigError,
    EvaluationError,
    HostError,
    LabelError,
    MetricsError,
    MissingDependencyError,
    SessionError,
    SharedSpeakersWarning,
    TrainingError,
    UninformativeDataWarning,
)
from mal_adapter.ser.dialogue import Dialogue, write_manifest
from mal_adapter.ser.evaluation import AUDIT, Evaluation, evaluate
from mal_adapter.ser.evaluation.report import write_report
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.suitability import warn_of_shared_speakers
from mal_adapter.ser.training import TrainingConfig, train_memory
from tests.commands import mal_adapter
from tests.ser.training_world import make_dialogues, make_recognizer


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("calls"), (3, 2, 2))


@pytest.fixture(scope="module")
def demo():
    return EmotionRecognizer(*load_demo(), EMOTIONS, PROMPT)


@pytest.fixture(scope="module")
def trainee():
    return make_recognizer()


@pytest.fixture
def forwards(demo, trainee):
    """The forwards that are run during a test, of whichever host."""
    counted = []
    handles = [r.model.register_forward_pre_hook(lambda *_: counted.append(1)) for r in (demo, trainee)]
    yield counted
    for handle in handles:
        handle.remove()


def changed(dialogues, **fields):
    """The dialogues with fields of all utterances replaced; a function gets the utterance and its place."""
    return [
        Dialogue(
            d.dialogue_id,
            tuple(
                dataclasses.replace(u, **{n: v(u, k) if callable(v) else v for n, v in fields.items()})
                for k, u in enumerate(d.utterances)
            ),
        )
        for d in dialogues
    ]


def renamed(dialogue, name):
    turns = tuple(dataclasses.replace(u, dialogue_id=name) for u in dialogue.utterances)
    return Dialogue(name, turns)


def gone(dialogues):
    return changed(dialogues, audio=lambda u, k: u.audio.with_name("gone") / u.audio.name)


BOTH = {
    "no emotions": (lambda ds: changed(ds, emotion=None), LabelError, "no emotions at all"),
    "unknown emotions": (lambda ds: changed(ds, emotion="bored"), LabelError, r"'bored' \(7\)"),
    "no dialogues": (lambda ds: [], ConfigError, "there are no"),
    "an id twice": (lambda ds: [*ds, ds[0]], ConfigError, "have the id"),
    "no sound files": (gone, AudioError, r"sound files of all labelled .*\(7\)"),
    "a dictionary of splits": (lambda ds: {"train": ds}, ConfigError, "hold a str"),
    "utterances": (lambda ds: ds[0].utterances, ConfigError, "hold a Utterance"),
}


@pytest.mark.parametrize("case", BOTH)
def test_unusable_dialogues_are_refused_first(demo, trainee, dialogues, forwards, tmp_path, case):
    make, error, words = BOTH[case]
    with pytest.raises(error, match=words):
        evaluate(demo, make(dialogues), output=tmp_path / "out")
    with pytest.raises(error, match=words):
        train_memory(trainee, make(dialogues), output=tmp_path / "out")
    if case != "no dialogues":
        with pytest.raises(error, match=words):
            train_memory(trainee, dialogues, make(dialogues), output=tmp_path / "out")
    assert forwards == []
    assert not (tmp_path / "out").exists()


def test_all_problems_are_in_one_error(demo, trainee, dialogues, forwards, tmp_path):
    bad = changed(dialogues, emotion=None)
    with pytest.raises(ConfigError) as caught:
        evaluate(demo, bad, output=tmp_path / "out", arms=["swapped"], batch_size=0, history=2.5, seed="x")
    for words in ("5 problems: (1)", "'own'", "batch_size=0", "history=2.5", "seed='x'", "(5) no utterance"):
        assert words in str(caught.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(LabelError) as caught:
        train_memory(trainee, bad, gone(dialogues), output=tmp_path / "file", log_with="nothing")
    for words in (
        "4 problems",
        "training dialogues has",
        "of the dev dialogues (7) are missing",
        "'nothing'",
        "is a file",
    ):
        assert words in str(caught.value)
    assert forwards == []


@pytest.mark.parametrize("value", ["8", 2.5, 0, -1, None, True])
def test_invalid_numbers_are_refused_first(demo, dialogues, forwards, tmp_path, value):
    for name in ("batch_size", "history"):
        with pytest.raises(ConfigError, match=name):
            evaluate(demo, dialogues, output=tmp_path / "out", **{name: value})
    with pytest.raises(ConfigError, match="batch_size"):
        demo.recognize_many(dialogues, batch_size=value)
    assert forwards == []


def test_arms_without_their_requirements_are_refused_first(demo, dialogues, forwards, tmp_path):
    monologues = changed(dialogues, speaker="?")
    for given, arms, words in (
        (monologues, ["own", "oracle_speakers"], "no dialogue has two speakers"),
        (dialogues[:1], None, "at least two"),
        (dialogues, "left", "arms are left"),
        (dialogues, ["swapped"], "'own'"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate(demo, given, output=tmp_path / "out", arms=arms)
    with pytest.raises(ConfigError, match="need a memory"):
        evaluate(demo.without_memory(), dialogues, output=tmp_path / "out", arms=AUDIT)
    assert forwards == []


def test_without_memory_is_evaluated_as_the_host_alone(demo, dialogues, tmp_path):
    assert evaluate(demo.without_memory(), dialogues[:1], output=tmp_path / "out").run["arms"] == ["host_only"]
    assert evaluate(demo, dialogues[:1], output=tmp_path / "one", arms="host_only").run["arms"] == ["host_only"]


def test_an_open_session_or_a_detached_memory_is_refused_first(demo, trainee, dialogues, forwards, tmp_path):
    for recognizer, work in (
        (demo, lambda: evaluate(demo, dialogues, output=tmp_path / "out")),
        (trainee, lambda: train_memory(trainee, dialogues, output=tmp_path / "out")),
    ):
        with recognizer.memory.session("mine"), pytest.raises(SessionError, match="open already"):
            work()
    with pytest.raises(ConfigError, match="without_memory"):
        train_memory(trainee.without_memory(), dialogues, output=tmp_path / "out")
    other = make_recognizer()
    other.memory.detach()
    with pytest.raises(SessionError, match="detached"):
        EmotionRecognizer(other.model, other.processor, other.memory)
    with pytest.raises(SessionError, match="detached"):
        train_memory(other, dialogues, output=tmp_path / "out")
    with pytest.raises(SessionError, match="detached"):
        evaluate(other, dialogues, output=tmp_path / "out")
    assert forwards == []
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_is_refused_first(demo):
    with torch.device("meta"):
        empty = type(demo.model)(demo.model.config)
    with pytest.raises(HostError, match="meta device"):
        EmotionRecognizer(empty, demo.processor)


def test_ids_are_checked_before_the_first_of_a_list_is_run(demo, trainee, dialogues, forwards, tmp_path):
    with pytest.raises(ConfigError, match="two dialogues have the id"):
        demo.recognize_many([*dialogues, dialogues[0]])
    strange = [*dialogues, renamed(dialogues[0], "call-\udce9")]
    with pytest.raises(SessionError, match="not valid Unicode"):
        demo.recognize_many(strange)
    with pytest.raises(SessionError, match="not valid Unicode"):
        train_memory(trainee, strange, output=tmp_path / "out")
    assert forwards == []
    assert len(list(demo.without_memory().recognize_many(strange[-1:]))) == 3
    lazily = demo.recognize_many(iter([*dialogues, dialogues[0]]), batch_size=1)
    assert next(lazily).utterance.dialogue_id == dialogues[0].dialogue_id


def folders(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "was-removed")
    return [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "nowhere", tmp_path / ("x" * 300)]


def test_a_folder_that_can_not_be_written_to_is_refused_first(demo, trainee, dialogues, forwards, tmp_path):
    for output in folders(tmp_path):
        with pytest.raises(EvaluationError, match="folder"):
            evaluate(demo, dialogues, output=output)
        with pytest.raises(AdapterFormatError, match="folder"):
            train_memory(trainee, dialogues, output=output)
        with pytest.raises(EvaluationError, match="folder"):
            write_report(output, [])
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(EvaluationError, match="can not be written to"):
            evaluate(demo, dialogues, output=tmp_path / "locked" / "out")
    assert forwards == []
    assert (tmp_path / "file").read_text() == "x"


def test_a_training_never_overwrites_another_one(trainee, dialogues, forwards, tmp_path):
    shutil.copytree(ADAPTER_FOLDER, tmp_path / "adapter")
    for resume in (False, True):
        with pytest.raises(TrainingError, match="has an adapter"):
            train_memory(trainee, dialogues, output=tmp_path / "adapter", resume=resume)
    shutil.copytree(HOST_FOLDER, tmp_path / "host")
    with pytest.raises(AdapterFormatError):
        train_memory(trainee, dialogues, output=tmp_path / "host")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("---\nlicense: [mit\n---\n# My notes\n")
    with pytest.raises(AdapterFormatError, match=r"README\.md"):
        train_memory(trainee, dialogues, output=tmp_path / "notes")
    assert forwards == []
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["README.md"]
    MemoryAdapter.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"log_with": "wandbb"}, ConfigError, "wandbb"),
        ({"training_data": 5}, AdapterFormatError, "training_data"),
        ({"datasets": "user/meld"}, ConfigError, "user/meld"),
        ({"datasets": [5]}, ConfigError, "datasets"),
        ({"datasets": ["user/meld", "/var/hf/images/"]}, ConfigError, "/var/hf/images/"),
        ({"config": {"epochs": 1}}, ConfigError, "TrainingConfig"),
        ({"config": TrainingConfig(class_weights={"bored": 2.0})}, ConfigError, "bored"),
        ({"config": TrainingConfig(class_weights=dict.fromkeys(EMOTIONS, 0.0))}, ConfigError, "zero"),
    ],
)
def test_settings_that_would_fail_later_are_refused_first(
    trainee, dialogues, forwards, tmp_path, arguments, error, words
):
    with pytest.raises(error, match=words):
        train_memory(trainee, dialogues, output=tmp_path / "out", **arguments)
    assert forwards == []
    assert not (tmp_path / "out").exists()


def test_weights_of_labels_that_do_not_occur_have_no_effect(trainee, dialogues, forwards, tmp_path):
    known = {u.emotion for d in dialogues for u in d.utterances}
    weights = {name: float(name not in known) for name in EMOTIONS}
    assert any(weights.values())
    with pytest.raises(ConfigError, match="zero for every label that"):
        train_memory(trainee, dialogues, output=tmp_path / "out", config=TrainingConfig(class_weights=weights))
    assert forwards == []


def without(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "mal_adapter.extras.find_spec", lambda name, *rest: None if name in packages else find(name, *rest)
    )


def test_missing_packages_are_named_first_and_together(trainee, dialogues, forwards, tmp_path, monkeypatch):
    without(monkeypatch, "peft", "jinja2", "matplotlib")
    with pytest.raises(MissingDependencyError, match="peft"):
        train_memory(trainee, dialogues, output=tmp_path / "out", config=TrainingConfig(lora_rank=2))
    done = mal_adapter("evaluate", "test.jsonl", "--model", "/nowhere", "--output", tmp_path / "out")
    assert "matplotlib, jinja2, which are not installed: pip install 'mal-adapter[train]'" in done.stderr
    with pytest.raises(MissingDependencyError, match="jinja2"):
        write_report(tmp_path / "out", [])
    assert forwards == []
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_is_not_installed_is_a_missing_package(trainee, dialogues, forwards, tmp_path, monkeypatch):
    monkeypatch.setattr("mal_adapter.ser.training.arguments.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        train_memory(trainee, dialogues, output=tmp_path / "out", log_with="wandb")
    assert forwards == []


def test_a_precision_that_this_process_can_not_change_to_is_typed(trainee, dialogues, forwards, tmp_path):
    from accelerate import Accelerator

    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16")
    with pytest.raises(ConfigError, match="mixed_precision='no'"):
        train_memory(trainee, dialogues, output=tmp_path / "out")
    AcceleratorState._reset_state()
    assert forwards == []


# ------------------------------------------------------------------------------------------ nothing is read back


def singles(dialogues):
    """Each utterance as a dialogue of its own, as a corpus without conversations is read."""
    return [
        Dialogue(f"{d.dialogue_id}-{k}", (dataclasses.replace(u, dialogue_id=f"{d.dialogue_id}-{k}"),))
        for d in dialogues
        for k, u in enumerate(d.utterances)
    ]


def first_labelled(dialogues):
    return changed(dialogues, emotion=lambda u, k: u.emotion if k == 0 else None)


FAST = TrainingConfig(epochs=1, batch_size=8)


@pytest.mark.parametrize(
    ("make", "words"), [(singles, "one utterance each"), (first_labelled, "first utterances alone")]
)
def test_dialogues_in_which_the_memory_is_never_read_give_a_warning(demo, trainee, dialogues, tmp_path, make, words):
    AcceleratorState._reset_state()
    trainee.memory.adapter.load_state_dict(make_recognizer().memory.adapter.state_dict())
    with pytest.warns(UninformativeDataWarning, match=f"the training dialogues .*{words}"):
        train_memory(trainee, make(dialogues), output=tmp_path / "out", config=FAST)
    with pytest.warns(UninformativeDataWarning, match=f"the dev dialogues .*{words}"):
        train_memory(trainee, dialogues, make(dialogues), output=tmp_path / "dev", config=FAST)
    with pytest.warns(UninformativeDataWarning, match=f"the dialogues .*{words}"):
        evaluate(demo, make(dialogues), output=tmp_path / "eval", arms=["host_only", "own"])
    evaluate(
        demo, make(dialogues), output=tmp_path / "bare", arms=["host_only"]
    )  # no memory is asked about: no warning


def with_speakers(dialogues, names, prefix=""):
    """The dialogues with two of `names` each."""
    return [
        Dialogue(
            f"{prefix}{d.dialogue_id}",
            tuple(
                dataclasses.replace(u, dialogue_id=f"{prefix}{d.dialogue_id}", speaker=names[(n + k % 2) % len(names)])
                for k, u in enumerate(d.utterances)
            ),
        )
        for n, d in enumerate(dialogues)
    ]


@pytest.mark.parametrize(
    ("train", "dev", "host", "words"),
    [
        (["Ann", "Bo", "Cy"], ["Bo", "Dee"], None, ["training and the dev dialogues have the speakers Bo in common"]),
        (["Ann", "Bo", "Cy"], ["Dee", "Eve"], ["Zoe", "Cy", "Ann "], ["host .* speakers Ann, Cy of the training"]),
        (["Ann", "Bo", "Cy"], ["Dee", "Eve"], ["Eve"], ["host .* speakers Eve of the dev"]),
        (["Ann", "Bo", "Cy"], ["Cy", "Dee"], ["Cy"], ["in common", "Cy of the training", "Cy of the dev"]),
        (["Ann", "Bo", "Cy"], ["Dee", "Eve"], ["Zoe"], []),
        (["Ann", "Bo", "Cy"], ["Dee", "Eve"], "Ann", []),  # no list: not a record of speakers
        (["agent", "caller"], ["agent", "caller"], ["agent"], []),  # roles, the same two in every dialogue
        (["A", "B", "C", "Ann"], ["A", "B", "C"], ["A"], []),
        (["1", "2", "3"], ["3", "4"], None, ["speakers 3 in common"]),
    ],
)
def test_people_who_speak_on_both_sides_are_named(dialogues, train, dev, host, words):
    config = SimpleNamespace() if host is None else SimpleNamespace(training_speakers=host)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_shared_speakers(with_speakers(dialogues, train), with_speakers(dialogues, dev, "dev"), config)
    assert {warning.category for warning in caught} <= {SharedSpeakersWarning}
    assert [re.search(w, str(warning.message)) is not None for w, warning in zip(words, caught, strict=True)] == [
        True for _ in words
    ]


def test_a_training_warns_of_speakers_that_the_hosts_config_records(trainee, dialogues, tmp_path):
    AcceleratorState._reset_state()
    trainee.memory.adapter.load_state_dict(make_recognizer().memory.adapter.state_dict())
    trainee.model.config.training_speakers = ["Cy"]
    try:
        with pytest.warns(SharedSpeakersWarning, match="Cy of the training") as caught:
            train_memory(trainee, with_speakers(dialogues, ["Ann", "Bo", "Cy"]), output=tmp_path / "out", config=FAST)
        assert caught[0].filename == __file__
    finally:
        del trainee.model.config.training_speakers


def test_one_labelled_utterance_with_a_past_gives_no_warning(demo, dialogues, tmp_path):
    some = [*singles(dialogues[:2]), dialogues[2]]
    evaluate(demo, some, output=tmp_path / "out", arms=["host_only", "own"])
    last = changed(dialogues, emotion=lambda u, k: u.emotion if k == 1 else None)
    evaluate(demo, last, output=tmp_path / "last", arms=["host_only", "own"])


# ------------------------------------------------------------------------------------------ what only the run shows


def test_a_complete_evaluation_is_read_without_its_sound_files(demo, tmp_path):
    calls = make_dialogues(tmp_path / "calls", (2, 2))
    first = evaluate(demo, calls, output=tmp_path / "out", arms=["host_only"])
    shutil.rmtree(tmp_path / "calls")
    assert evaluate(demo, calls, output=tmp_path / "out", arms=["host_only"]).answers == first.answers


def test_files_that_exist_but_can_not_be_read_give_their_reason(demo, trainee, tmp_path):
    AcceleratorState._reset_state()
    calls = make_dialogues(tmp_path / "calls", (2, 2))
    for path in (tmp_path / "calls").glob("*.wav"):
        path.write_text("no sound")
    evaluation = evaluate(demo, calls, output=tmp_path / "out", arms=["host_only"])
    with pytest.raises(MetricsError, match=r"\.wav"):
        write_report(tmp_path / "report", [evaluation])
    with pytest.raises(TrainingError, match=r"nothing is learned: .*\.wav"):
        train_memory(trainee, calls, output=tmp_path / "trained", config=FAST)
    assert not (tmp_path / "trained" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------ commands


@pytest.fixture
def loaded(monkeypatch):
    """The models that a command loads."""
    from mal_adapter.ser import loading

    names, load = [], loading.load_host
    monkeypatch.setattr(loading, "load_host", lambda name, **options: names.append(name) or load(name, **options))
    return names


def test_commands_refuse_what_they_can_before_a_model_is_loaded(dialogues, loaded, tmp_path):
    manifest = dialogues[0].utterances[0].audio.parent / "manifest.jsonl"
    write_manifest(changed(dialogues, emotion="bored"), tmp_path / "bored.jsonl")
    write_manifest(gone(dialogues), tmp_path / "gone.jsonl")
    (tmp_path / "file").write_text("x")
    (tmp_path / "settings.json").write_text('{"memory": {"width": 64}}')
    shutil.copytree(ADAPTER_FOLDER, tmp_path / "adapter")
    judge = ["--model", HOST_FOLDER, "--adapter", ADAPTER_FOLDER, "--device", "cpu"]
    learn = ["--model", HOST_FOLDER, "--layer", "1", "--device", "cpu"]
    out = ["--output", tmp_path / "out"]
    for words, command in {
        "bored": ["evaluate", tmp_path / "bored.jsonl", *judge, *out],
        "is a file": ["evaluate", manifest, *judge, "--output", tmp_path / "file"],
        "at least two names": ["evaluate", manifest, *judge, *out, "--labels", "sad"],
        "a label set needs": ["predict", tmp_path / "gone.jsonl", manifest, *judge, "--labels", "sad"],
        "there is no such file": ["predict", tmp_path / "gone.jsonl", *judge],
        "are missing": ["train", tmp_path / "gone.jsonl", *learn, *out],
        "is a file, not a folder": ["train", manifest, *learn, "--output", tmp_path / "file"],
        "has an adapter": ["train", manifest, *learn, "--output", tmp_path / "adapter"],
        "(7)": ["train", tmp_path / "bored.jsonl", *learn, *out, "--labels", "sad,happy"],
        "arms are left": ["evaluate", manifest, *judge, *out, "--arms", "left"],
        "'width'": ["train", manifest, *learn, *out, "--config", tmp_path / "settings.json"],
        "of the dev dialogues": ["train", manifest, *learn, *out, "--dev", tmp_path / "bored.jsonl"],
    }.items():
        done = mal_adapter(*command)
        assert done.exit_code in (1, 2), (words, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert loaded == []
    assert not (tmp_path / "out").exists()


def made(name, dialogues, **changes):
    """Another system's evaluation of these dialogues."""
    answers = [
        {
            "dialogue_id": u.dialogue_id,
            "utterance_id": u.utterance_id,
            "turn": k,
            "speaker": u.speaker,
            "truth": u.emotion,
            "arms": {"own": dict.fromkeys(EMOTIONS, 0.25)},
        }
        for d in dialogues
        for k, u in enumerate(d.utterances, start=1)
    ]
    return Evaluation(name, {"labels": list(EMOTIONS), "arms": ["own"], **changes}, answers)


def test_other_systems_are_compared_with_the_dialogues_first(demo, dialogues, forwards):
    from mal_adapter.ser.evaluation.report import rival_problems

    def problems_of(*rivals):
        return [str(problem) for problem in rival_problems(dialogues, demo.labels, AUDIT, rivals)]

    assert problems_of(made("gru", dialogues)) == []
    assert problems_of(made("gru", changed(dialogues, emotion=lambda u, k: u.emotion if k else "sad")))
    (problem,) = problems_of(made("gru", dialogues[1:]))
    assert f"{dialogues[0].dialogue_id}/" in problem
    assert "not in it" in problem
    (problem,) = problems_of(made("host_only", dialogues))
    assert "'host_only'" in problem
    (problem,) = problems_of(made("gru", dialogues), made("gru", dialogues))
    assert "'gru'" in problem
    (problem,) = problems_of(made("gru", dialogues, labels=[*EMOTIONS, "bored"]))
    assert "bored" in problem
    assert forwards == []


def test_evaluate_prints_what_is_not_scored(dialogues, tmp_path):
    AcceleratorState._reset_state()
    some = [dialogues[0], *changed(dialogues[1:2], emotion="bored"), *gone(dialogues[2:])]
    write_manifest(some, tmp_path / "some.jsonl")
    done = mal_adapter(
        "evaluate", tmp_path / "some.jsonl", "--model", HOST_FOLDER, "--adapter", ADAPTER_FOLDER, "--output",
        tmp_path / "out", "--arms", "host_only,own", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "note: 2 utterances are 'bored', which is not a label" in done.stderr
    assert "note: 2 of 7 sound files are missing" in done.stderr
    assert "fewer than 6 dialogues" in done.stderr


def test_a_card_that_can_not_be_written_is_refused_first(dialogues, tmp_path):
    AcceleratorState._reset_state()
    manifest = dialogues[0].utterances[0].audio.parent / "manifest.jsonl"
    shutil.copytree(ADAPTER_FOLDER, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: [mit\n---\n")
    done = mal_adapter(
        "evaluate", manifest, "--model", HOST_FOLDER, "--adapter", tmp_path / "adapter", "--card", "--output",
        tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "README.md" in done.stderr
    assert not (tmp_path / "out").exists()

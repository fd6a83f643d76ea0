"""Evaluation: each arm has the history that it documents; stops, processes and bad files do not change answers."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from mal_adapter.demo import EMOTIONS, HOST_FOLDER, PROMPT
from mal_adapter.demo.run import load_demo
from mal_adapter.errors import ConfigError, EvaluationError
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.evaluation import AUDIT, evaluate, read_evaluation
from mal_adapter.ser.evaluation import evaluation as module
from mal_adapter.ser.evaluation.arms import ARMS
from mal_adapter.ser.evaluation.audit import _join, _other_dialogues
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.audio import load_waveform
from tests.commands import mal_adapter
from tests.ser.evaluation.made_evaluations import make_control
from tests.ser.training_world import make_dialogues

LENGTHS = (4, 2, 3)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("calls"), LENGTHS, "dev")


@pytest.fixture(scope="module")
def recognizer():
    return EmotionRecognizer(*load_demo(), EMOTIONS, PROMPT)


@pytest.fixture(scope="module")
def control(recognizer):
    return make_control(recognizer.memory.adapter)


@pytest.fixture(scope="module")
def answered(recognizer, dialogues, control, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "all"
    return evaluate(recognizer, dialogues, output=folder, arms=list(ARMS), control=control, batch_size=2)


def of_arm(evaluation, arm):
    return {(row["dialogue_id"], row["utterance_id"]): row["arms"][arm] for row in evaluation.answers}


def close(first, second):
    assert first.keys() == second.keys()
    for key, probabilities in first.items():
        assert probabilities == pytest.approx(second[key], abs=1e-5)


def expected(recognizer, sessions):
    """Utterance -> the recogniser's probabilities after the earlier utterances of its session."""
    answers = {}
    for session in sessions:
        recognizer.memory.states.pop("expected", None)
        for utterance in session:
            (answer,) = recognizer.answer([utterance], session_ids=["expected"])
            answers[utterance.dialogue_id, utterance.utterance_id] = answer.probabilities
    recognizer.memory.states.pop("expected", None)
    return answers


def test_each_arm_has_the_history_that_it_documents(recognizer, dialogues, answered):
    turns = [list(dialogue.utterances) for dialogue in dialogues]
    close(of_arm(answered, "own"), expected(recognizer, turns))
    close(of_arm(answered, "host_only"), expected(recognizer.without_memory(), turns))
    close(of_arm(answered, "reset"), expected(recognizer, [[u] for us in turns for u in us]))
    speakers = [[u for u in us if u.speaker == name] for us in turns for name in "AB"]
    close(of_arm(answered, "oracle_speakers"), expected(recognizer, speakers))
    close(of_arm(answered, "other_dialogues"), expected(recognizer, _other_dialogues(turns, 0)))
    swapped = {}
    for us, others in zip(turns, [*turns[1:], turns[0]], strict=True):
        for n, utterance in enumerate(us):
            past = expected(recognizer, [[*others[:n], utterance]])
            swapped[utterance.dialogue_id, utterance.utterance_id] = past[utterance.dialogue_id, utterance.utterance_id]
    close(of_arm(answered, "swapped"), swapped)
    assert len(recognizer.memory.states) == 0


def test_shuffled_dialogues_have_the_same_utterances_in_another_order(recognizer, dialogues, answered):
    shuffled, own = of_arm(answered, "shuffled"), of_arm(answered, "own")
    assert shuffled.keys() == own.keys()
    assert any(shuffled[key] != pytest.approx(own[key], abs=1e-3) for key in own)


def utterances_of(lengths, folder):
    """Dialogues of so many utterances each, whose sound is never read."""
    return [[Utterance(f"d{d}", str(n), "A", folder) for n in range(length)] for d, length in enumerate(lengths)]


def histories(sessions):
    """Utterance -> the utterances before it in its session."""
    return {utterance: tuple(session[:n]) for session in sessions for n, utterance in enumerate(session)}


@pytest.mark.parametrize("seed", range(5))
def test_sessions_of_other_dialogues_have_each_dialogue_once_if_there_are_enough(tmp_path, seed):
    turns = utterances_of([5] * 5, tmp_path)
    sessions = _other_dialogues(turns, seed)
    for session in sessions:
        assert [utterance.utterance_id for utterance in session] == ["0", "1", "2", "3", "4"]
        assert len({utterance.dialogue_id for utterance in session}) == 5
    assert {u for session in sessions for u in session} == {u for us in turns for u in us}


@pytest.mark.parametrize("seed", range(5))
def test_sessions_of_other_dialogues_have_each_once_where_lengths_differ(tmp_path, seed):
    turns = utterances_of(np.random.default_rng(0).integers(1, 10, 16), tmp_path)
    sessions = [session for session in _other_dialogues(turns, seed) if session]
    for session in sessions:
        assert len({utterance.dialogue_id for utterance in session}) == len(session)
    assert {u for session in sessions for u in session} == {u for us in turns for u in us}
    earlier = sum(n for session in sessions for n in range(len(session)))
    assert earlier > 0.9 * sum(n for us in turns for n in range(len(us)))


def test_the_seed_chooses_the_sessions_of_other_dialogues(tmp_path):
    turns = utterances_of([6] * 8, tmp_path)
    dealt = [histories(_other_dialogues(turns, seed)) for seed in range(5)]
    assert dealt[0] == histories(_other_dialogues(turns, 0))
    for first, second in itertools.combinations(dealt, 2):
        differing = sum(first[utterance] != second[utterance] for us in turns for utterance in us[1:])
        assert differing > 0.5 * 8 * 5  # two draws among seven other dialogues rarely agree


def test_another_seed_gives_other_answers_of_other_dialogues_only(recognizer, dialogues, answered, tmp_path):
    arms = ["own", "swapped", "other_dialogues"]
    others = [evaluate(recognizer, dialogues, output=tmp_path / str(n), arms=arms, seed=n) for n in range(1, 4)]
    for evaluation in others:
        for arm in ("own", "swapped"):
            close(of_arm(evaluation, arm), of_arm(answered, arm))
    before = of_arm(answered, "other_dialogues")
    assert any(
        of_arm(evaluation, "other_dialogues")[key] != pytest.approx(before[key], abs=1e-3)
        for evaluation in others
        for key in before
    )


def test_history_is_joined_in_order(recognizer, dialogues, answered, tmp_path):
    us = dialogues[0].utterances
    assert _join(us[:3], tmp_path / "joined.wav", 16_000)
    joined = load_waveform(Utterance("d", "0", "A", tmp_path / "joined.wav"))
    pieces = [load_waveform(u) for u in us[:3]]
    assert joined.size == sum(piece.size for piece in pieces) + 2 * 3200
    assert (joined[-pieces[2].size :] == pieces[2]).all()
    history = of_arm(answered, "history")
    close({key: history[key] for key in [(us[0].dialogue_id, us[0].utterance_id)]}, {
        (us[0].dialogue_id, us[0].utterance_id): of_arm(answered, "host_only")[us[0].dialogue_id, us[0].utterance_id]
    })  # fmt: skip
    whole = Utterance("d", "0", "A", tmp_path / "joined.wav")
    (answer,) = recognizer.without_memory().answer([whole])
    assert history[us[2].dialogue_id, us[2].utterance_id] == pytest.approx(answer.probabilities, abs=1e-5)


def test_history_that_is_too_long_for_the_host_is_shortened(recognizer, dialogues, tmp_path):
    # four utterances and three pauses are 6.4 s; the demo's host accepts 6
    one = evaluate(recognizer, dialogues[:1], output=tmp_path / "long", arms=["history"], history=3)
    two = evaluate(recognizer, dialogues[:1], output=tmp_path / "short", arms=["history"], history=2)
    assert one.answers[3]["arms"] == two.answers[3]["arms"]


def test_a_stopped_evaluation_continues(recognizer, dialogues, answered, tmp_path, monkeypatch):
    more = [
        dataclasses.replace(
            d,
            dialogue_id=f"{d.dialogue_id}-{copy}",
            utterances=tuple(dataclasses.replace(u, dialogue_id=f"{d.dialogue_id}-{copy}") for u in d.utterances),
        )
        for copy in range(2)
        for d in dialogues
    ]
    monkeypatch.setattr(module, "_GROUP", 3)
    whole = evaluate(recognizer, more, output=tmp_path / "whole")
    calls = []

    def failing(recognizer, group, *rest, **named):
        calls.append(group)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return audit(recognizer, group, *rest, **named)

    audit = module.audit
    monkeypatch.setattr(module, "audit", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate(recognizer, more, output=tmp_path / "stopped")
    with pytest.raises(EvaluationError, match="no complete"):
        read_evaluation(tmp_path / "stopped")
    resumed = evaluate(recognizer, more, output=tmp_path / "stopped")
    assert [len(group) for group in calls] == [3, 3, 3]  # the first group did not run again
    assert resumed.answers == whole.answers
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["answers.jsonl", "evaluation.json"]
    again = evaluate(recognizer, more, output=tmp_path / "stopped")
    assert len(calls) == 3
    assert again.answers == whole.answers


@pytest.mark.parametrize("count", [1, 2, 16, 17, 18, 32, 33, 49])
def test_each_dialogue_is_in_one_group_and_groups_have_about_one_size(dialogues, count):
    many = [
        Dialogue(str(n), (dataclasses.replace(dialogues[0].utterances[0], dialogue_id=str(n)),)) for n in range(count)
    ]
    groups = module._groups(many)
    assert [dialogue for group in groups for dialogue in group] == many
    sizes = list(map(len, groups))
    assert len(sizes) == math.ceil(count / 16)
    assert max(sizes) - min(sizes) <= 1


def test_a_complete_evaluation_keeps_the_versions_that_made_it(recognizer, dialogues, tmp_path):
    evaluate(recognizer, dialogues[:1], output=tmp_path / "one", arms=["host_only"])
    path = tmp_path / "one" / "evaluation.json"
    path.write_text(path.read_text().replace(version("torch"), "1.0"))
    assert (
        evaluate(recognizer, dialogues[:1], output=tmp_path / "one", arms=["host_only"]).run["versions"]["torch"]
        == "1.0"
    )


def test_a_folder_with_other_content_is_refused(recognizer, dialogues, answered, tmp_path):
    evaluate(recognizer, dialogues, output=tmp_path / "one", arms=["host_only"])
    with pytest.raises(EvaluationError, match="arms"):
        evaluate(recognizer, dialogues, output=tmp_path / "one", arms=["own"])
    with pytest.raises(EvaluationError, match="dialogues"):
        evaluate(recognizer, dialogues[:2], output=tmp_path / "one", arms=["host_only"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(EvaluationError, match="not empty"):
        evaluate(recognizer, dialogues, output=tmp_path / "mine", arms=["host_only"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "one" / "answers.jsonl").write_text("{")
    with pytest.raises(EvaluationError, match="can't be read"):
        read_evaluation(tmp_path / "one")


def test_an_utterance_that_cannot_be_read_is_left_out_of_all_arms(recognizer, dialogues, control, tmp_path):
    gone = dataclasses.replace(dialogues[0].utterances[1], audio=tmp_path / os.fsdecode(b"gone\xe9.wav"))
    first = Dialogue(dialogues[0].dialogue_id, (dialogues[0].utterances[0], gone, *dialogues[0].utterances[2:]))
    evaluation = evaluate(
        recognizer, [first, *dialogues[1:]], output=tmp_path / "out", arms=list(ARMS), control=control
    )
    rows = {(row["dialogue_id"], row["utterance_id"]): row for row in evaluation.answers}
    assert len(rows) == sum(LENGTHS)
    broken = rows.pop((gone.dialogue_id, gone.utterance_id))
    assert "gone?.wav" in broken["error"]
    assert "arms" not in broken
    assert all(row["arms"].keys() == ARMS.keys() for row in rows.values())
    turns = [[u for u in us.utterances if u is not gone] for us in (first, *dialogues[1:])]
    own = {key: row["arms"]["own"] for key, row in rows.items()}
    close(own, expected(recognizer, turns))


@pytest.mark.parametrize(
    ("arms", "count", "words"),
    [
        (["own", "wrong"], 3, "expected"),
        ([], 3, "none"),
        (["host_only", "host_only"], 3, "different"),
        (["swapped"], 3, "own"),
        (["own", "swapped"], 1, "two"),
        (["host_only"], 0, "no dialogues"),
    ],
)
def test_arms_that_cannot_run_are_refused(recognizer, dialogues, tmp_path, arms, count, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(recognizer, dialogues[:count], output=tmp_path / "out", arms=arms)
    assert not (tmp_path / "out").exists()


def test_without_a_memory_only_the_host_alone_is_evaluated(recognizer, dialogues, answered, tmp_path):
    plain = EmotionRecognizer(recognizer.model, recognizer.processor, None, EMOTIONS, PROMPT)
    with recognizer.memory.disabled():
        evaluation = evaluate(plain, dialogues, output=tmp_path / "host_only")
    close(of_arm(evaluation, "host_only"), of_arm(answered, "host_only"))
    assert evaluation.run["fingerprint"] is None
    with pytest.raises(ConfigError, match="need a memory"):
        evaluate(plain, dialogues, output=tmp_path / "all", arms=AUDIT)


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(dialogues, recognizer, tmp_path):
    from mal_adapter.demo import ADAPTER_FOLDER

    manifest = dialogues[0].utterances[0].audio.parent / "manifest.jsonl"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["evaluate", str(manifest), "--model", str(HOST_FOLDER)]
    command += ["--adapter", str(ADAPTER_FOLDER), "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*launch, "-m", "mal_adapter.cli", *command, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = mal_adapter(*command, tmp_path / "one")
    assert alone.exit_code == 0, alone.stderr
    assert done.stdout.count("report: ") == alone.stdout.count("report: ") == 1
    one, two = (read_evaluation(tmp_path / name) for name in ("one", "two"))
    assert one.answers == two.answers
    assert json.loads(Path(tmp_path, "two", "report.json").read_text())["arms"].keys() == set(AUDIT)

"""Hear labelled dialogues with a memory, without it and with wrong ones, on any number of processes, and keep it all.

evaluation = evaluate(recognizer, corpus.splits["test"], output="evaluation")
write_report("evaluation", [evaluation])        # from mal_adapter.ser.evaluation.report
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mal_adapter.errors import ConfigError, EvaluationError, MalAdapterError, raise_problems
from mal_adapter.memory.config import check_integer
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.evaluation.audit import ARMS, WRONG_PASTS, Answer, audit
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.names import composed_all
from mal_adapter.ser.progress import progress_bar
from mal_adapter.ser.provenance import digest_of, versions
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Prediction
from mal_adapter.ser.suitability import id_problems, label_problems, sound_problems, warn_of_no_past
from mal_adapter.serialization.atomic import folder_problem, write_atomically
from mal_adapter.serialization.strict_json import parse_json
from mal_adapter.serialization.text import in_unicode

__all__ = ["AUDIT", "Evaluation", "evaluate", "read_evaluation"]

FORMAT_VERSION = 1
RUN_NAME, ANSWERS_NAME, PARTS_NAME = "evaluation.json", "answers.jsonl", "parts"

#: The arms heard unless others are asked for. What needs another prompt or the true speakers is asked for by name.
AUDIT = ("host_only", "own", *WRONG_PASTS, "shuffled")

#: The most dialogues among which memories are swapped and utterances mixed; one process hears them together.
_GROUP = 16


@dataclass(frozen=True)
class Evaluation:
    """What was heard.

    Args:
        name: to tell it from others; its folder's name.
        run: what was evaluated and how, as in `evaluation.json`.
        answers: as in `answers.jsonl`: a dict per utterance with `dialogue_id`, `utterance_id`, `turn` (from 1),
            `speaker`, `truth` (a label or None), and either `error` or `arms` (arm -> label -> probability) and
            `surprise` (None without memory).
    """

    name: str
    run: dict[str, Any]
    answers: list[dict[str, Any]]

    @property
    def labels(self) -> LabelSet:
        """The possible answers."""
        return LabelSet(tuple(self.run["labels"]))


def evaluate(
    recognizer: EmotionRecognizer,
    dialogues: Sequence[Dialogue],
    *,
    output: str | os.PathLike[str],
    arms: Sequence[str] | None = None,
    history: int = 3,
    batch_size: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Hears dialogues once per arm of the audit and keeps all answers in `output`.

    An evaluation that was stopped goes on when it is called again; one that is complete is read. Under `accelerate
    launch` each process hears a part of the dialogues.

    What is mutated: `output`; the memory's sessions of the same names are forgotten.

    Args:
        recognizer: with a memory, or without one for the arms "host_only" and "history".
        dialogues: with different ids; utterances without a label of the recogniser's are heard and not judged.
        output: a folder for `evaluation.json` and `answers.jsonl`.
        arms: of `ARMS`; `AUDIT` unless given, and "host_only" alone without a memory.
        history: how many utterances the arm "history" joins in front of each.
        batch_size: utterances in one forward.
        seed: of the random orders.

    Returns:
        All answers, on every process.

    What can be known before the host runs is checked first, and all of it is in one error. Where no labelled utterance
    has another one before it, an `UninformativeDataWarning` says that no memory can make a difference.

    Raises:
        ConfigError: an arm is not known, or needs a memory, more dialogues or speakers; a dialogue id is repeated; or a
            number is no integer or too small.
        LabelError: not one utterance has one of the labels.
        AudioError: the sound files of all labelled utterances are missing.
        SessionError: the memory is detached, or the caller's block has a session open.
        EvaluationError: `output` can't be written to, or holds an evaluation of something else.
    """
    dialogues = list(dialogues)
    chosen = (arms,) if isinstance(arms, str) else None if arms is None else tuple(arms)
    if chosen is None:
        chosen = AUDIT if recognizer.reads_memory else ("host_only",)
    folder = Path(output)
    problems = _problems(recognizer, dialogues, chosen, {"batch_size": batch_size, "history": history, "seed": seed})
    if problem := folder_problem(folder):
        problems.append(EvaluationError(problem))
    if not problems and not (folder / ANSWERS_NAME).exists():  # else all is done, and read
        problems = sound_problems(dialogues, recognizer.labels)
    raise_problems(problems)
    if set(chosen) != {"host_only"}:
        warn_of_no_past(dialogues, recognizer.labels)
    if recognizer.memory is not None:
        with recognizer.memory.session(
            write=False
        ):  # raises where none can be opened, before the arm host_only has run
            pass
    run = _identity(recognizer, dialogues, chosen, history, seed)
    state = PartialState()
    if state.is_main_process:
        _begin(folder, run)
    state.wait_for_everyone()
    if not (folder / ANSWERS_NAME).exists():
        groups = _groups(dialogues)
        parts = [folder / PARTS_NAME / f"{number:06d}-of-{len(groups):06d}.jsonl" for number in range(len(groups))]
        own = range(state.process_index, len(groups), state.num_processes)
        missing = [number for number in own if not parts[number].exists()]
        with progress_bar(
            desc="evaluating",
            total=len(chosen) * sum(len(dialogue.utterances) for n in missing for dialogue in groups[n]),
            unit="answer",
            shown=state.is_main_process,
        ) as bar:
            for number in missing:
                lines = _hear(recognizer, groups[number], chosen, batch_size, history, seed, bar.update)
                write_atomically(parts[number], lines.encode(errors="replace"))  # a path need not be Unicode
        state.wait_for_everyone()
        if state.is_main_process:
            write_atomically(folder / ANSWERS_NAME, b"".join(part.read_bytes() for part in parts))
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / PARTS_NAME, ignore_errors=True)
    return read_evaluation(folder)


def read_evaluation(folder: str | os.PathLike[str]) -> Evaluation:
    """Reads what `evaluate` has left in a folder.

    Raises:
        EvaluationError: there is none, it is not complete, or not understood.
    """
    folder = Path(folder)
    try:
        run = composed_all(parse_json((folder / RUN_NAME).read_bytes()))
        answers = [composed_all(parse_json(line)) for line in (folder / ANSWERS_NAME).read_bytes().splitlines()]
        if run["format_version"] != FORMAT_VERSION:
            raise EvaluationError(f"{folder} is of format {run['format_version']}, this version reads {FORMAT_VERSION}")
        return Evaluation(folder.absolute().name, run, answers)
    except FileNotFoundError as error:
        raise EvaluationError(f"{folder} holds no complete evaluation; `mal-adapter evaluate` writes one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"the evaluation in {folder} can't be read: {error}") from error


def _problems(
    recognizer: EmotionRecognizer, dialogues: list[Dialogue], arms: Sequence[str], settings: Mapping[str, object]
) -> list[MalAdapterError]:
    """What is wrong with the arguments, all of it."""
    problems = _arm_problems(recognizer, dialogues, arms)
    for name, value in settings.items():
        try:
            check_integer(name, value, 0 if name == "seed" else 1)
        except ConfigError as error:
            problems.append(error)
    # Each arm names its sessions by itself, so that a dialogue's id need not be one of a session.
    if ids := id_problems(dialogues, reads_memory=False, needed=True):
        return problems + ids
    return problems + label_problems(dialogues, recognizer.labels)


def _arm_problems(
    recognizer: EmotionRecognizer, dialogues: list[Dialogue], arms: Sequence[str]
) -> list[MalAdapterError]:
    if not arms or len(set(arms)) != len(arms) or not set(arms) <= set(ARMS):
        return [ConfigError(f"arms are {', '.join(arms) or 'none'}; expected different ones of {', '.join(ARMS)}")]
    problems: list[MalAdapterError] = []
    if not recognizer.reads_memory and (needed := sorted(set(arms) - {"host_only", "history"})):
        problems.append(ConfigError(f"the arms {', '.join(needed)} need a memory, and this recogniser has none"))
    if "swapped" in arms and "own" not in arms:
        problems.append(ConfigError("the arm 'swapped' reads what 'own' writes; ask for both"))
    if len(dialogues) == 1 and {"swapped", "other_dialogues"} & set(arms):
        problems.append(
            ConfigError("memories are swapped between dialogues; give at least two, or leave out swapped and mixed")
        )
    speakers = [{getattr(u, "speaker", None) for u in getattr(d, "utterances", ())} for d in dialogues]
    if "oracle_speakers" in arms and max(map(len, speakers), default=0) == 1:
        problems.append(
            ConfigError(
                "the arm 'oracle_speakers' gives each true speaker a memory, and no dialogue has two speakers, so "
                "that it would "
                "repeat 'own'; name the speakers, or leave out told"
            )
        )
    return problems


def _identity(
    recognizer: EmotionRecognizer, dialogues: list[Dialogue], arms: Sequence[str], history: int, seed: int
) -> dict[str, Any]:
    config, memory = recognizer.model.config, recognizer.memory
    return {
        "format_version": FORMAT_VERSION,
        "host": in_unicode(getattr(config, "_name_or_path", "") or config.model_type),
        "model_type": config.model_type,
        "dtype": str(recognizer.model.dtype).removeprefix("torch."),
        "memory": None if memory is None else memory.adapter.config.to_dict(),
        "layer_idx": None if memory is None else memory.layer_idx,
        "fingerprint": None if memory is None else memory.adapter.fingerprint(),
        "labels": list(recognizer.labels),
        "prompt": recognizer.prompt,
        "arms": list(arms),
        "history": history if "history" in arms else None,
        "seed": seed,
        "dialogues": digest_of(dialogues),
        "versions": versions(),
    }


def _begin(folder: Path, run: dict[str, Any]) -> None:
    """Claims the folder, or finds that it is this evaluation's."""
    path = folder / RUN_NAME
    if path.exists():
        try:
            there = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path} can't be read: {error}; evaluate into another folder") from error
        differs = [name for name in run if not isinstance(there, dict) or there.get(name) != run[name]]
        if differs and differs != ["versions"]:  # those stay: answers that are there were made by them
            raise EvaluationError(f"{folder} holds another evaluation ({', '.join(differs)}); use another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise EvaluationError(f"{folder} is not empty and holds no evaluation; use another folder")
    (folder / PARTS_NAME).mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, (json.dumps(run, indent=2) + "\n").encode())


def _groups(dialogues: list[Dialogue]) -> list[list[Dialogue]]:
    """As few as there can be, and all of about one size: among a few dialogues there is little to swap and mix."""
    count = math.ceil(len(dialogues) / _GROUP)
    return [dialogues[len(dialogues) * n // count : len(dialogues) * (n + 1) // count] for n in range(count)]


def _hear(
    recognizer: EmotionRecognizer,
    group: list[Dialogue],
    arms: Sequence[str],
    batch_size: int,
    history: int,
    seed: int,
    on_answers: Callable[[int], object],
) -> str:
    """The lines of `answers.jsonl` for these dialogues."""
    heard, surprise = audit(
        recognizer, group, arms, batch_size=batch_size, history=history, seed=seed, on_answers=on_answers
    )
    lines = []
    for dialogue in group:
        for turn, utterance in enumerate(dialogue.utterances, start=1):
            key = utterance.dialogue_id, utterance.utterance_id
            emotion = utterance.emotion
            known = emotion is not None and emotion in recognizer.labels
            line = {
                "dialogue_id": key[0],
                "utterance_id": key[1],
                "turn": turn,
                "speaker": utterance.speaker,
                "truth": recognizer.labels.lookup(emotion) if known and emotion is not None else None,
                **_told({arm: answers[key] for arm, answers in heard.items()}),
            }
            if "arms" in line:
                line["surprise"] = surprise.get(key)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _told(answers: dict[str, Answer]) -> dict[str, Any]:
    probabilities = {}
    for arm, answer in answers.items():
        if not isinstance(answer, Prediction):
            return {"error": str(answer.error)}
        probabilities[arm] = answer.probabilities
    return {"arms": probabilities}

"""Evaluate a recogniser on labelled dialogues, arm by arm, on any number of processes; all answers are kept on disk.

evaluation = evaluate(recognizer, corpus.splits["test"], output="evaluation")
write_report("evaluation", [evaluation])        # from mal_adapter.ser.evaluation.report
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mal_adapter.errors import EvaluationError, raise_problems
from mal_adapter.memory.ensemble import AnyAdapter
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.evaluation.activations import SharedActivations
from mal_adapter.ser.evaluation.arguments import argument_problems
from mal_adapter.ser.evaluation.arms import AUDIT
from mal_adapter.ser.evaluation.audit import Answer, audit
from mal_adapter.ser.evaluation.control import load_control
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.names import composed_all
from mal_adapter.ser.progress import progress_bar
from mal_adapter.ser.provenance import digest_of, versions
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Prediction
from mal_adapter.ser.suitability import sound_problems, warn_of_no_past
from mal_adapter.serialization.atomic import folder_problem, write_atomically
from mal_adapter.serialization.strict_json import parse_json
from mal_adapter.serialization.text import in_unicode

__all__ = ["Evaluation", "evaluate", "read_evaluation"]

FORMAT_VERSION = 1
RUN_NAME, ANSWERS_NAME, PARTS_NAME = "evaluation.json", "answers.jsonl", "parts"

#: The most dialogues of a group. One process runs a group, and the arms take other pasts from the same group.
_GROUP = 16


@dataclass(frozen=True)
class Evaluation:
    """The answers of an evaluation.

    Args:
        name: The name of its folder; the report names the evaluation so.
        run: What was evaluated and how, as in `evaluation.json`.
        answers: As in `answers.jsonl`: a dict per utterance with `dialogue_id`, `utterance_id`, `turn` (from 1),
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
    control: AnyAdapter | str | os.PathLike[str] | None = None,
    arms: Sequence[str] | None = None,
    history: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    activations: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Recognise dialogues once per arm and keep all answers in `output`.

    The encoder and the layers up to the memory's run once per utterance, for all arms but "history". Their output is on
    disk in the host's dtype, seq_len · hidden_size numbers per utterance, for at most 16 dialogues per process at a
    time. If a host can't run from it, each arm runs the whole host; this is logged once.

    Call it again to continue an evaluation that was stopped; a complete one is read from `output`. Under `accelerate
    launch` each process runs a part of the dialogues. Arguments and data are checked before the host runs, and one
    error lists all problems.

    What is mutated: the folder `output`. The memory forgets its sessions with ids such as "audit/0".

    Args:
        recognizer: Needs a memory, except for the arms "host_only" and "history".
        dialogues: With different ids. Utterances whose emotion is not one of the recogniser's labels are part of the
            history and are not scored.
        output: A folder for `evaluation.json` and `answers.jsonl`.
        control: The adapter of the arm "control": a folder, a Hub id or a loaded one, trained as the memory was, but
            with `MemoryConfig(update="none")`. Without it, no verdict can tell the memory's gain from that of the
            read-out.
        arms: Some of `mal_adapter.ser.evaluation.arms.ARMS`. Default: `AUDIT`, and "control" if one is given; without a
            memory, "host_only" alone.
        history: How many utterances the arm "history" joins in front of each.
        batch_size: Utterances in one forward.
        seed: Chooses the random orders of the arms "shuffled" and "other_dialogues".
        activations: A folder for the output of the memory's layer, of all dialogues, which is left there. Evaluations
            and trainings with the same host, layer, prompt and sound files can share it. Unless given, it is a
            temporary one in `output`.

    Returns:
        All answers, on every process.

    Raises:
        ConfigError: An arm is unknown, or needs a memory, a control, more dialogues or more speakers; `control` is not
            that of this memory; a dialogue id is repeated; or a number is not an integer or too small.
        AdapterNotFoundError, AdapterFormatError, HubError: The control can't be loaded.
        LabelError: No utterance has one of the labels.
        AudioError: The sound files of all labelled utterances are missing.
        SessionError: The memory is detached, or the caller has a session open.
        EvaluationError: `output` can't be written to, or holds another evaluation.

    Warns:
        UninformativeDataWarning: No labelled utterance has an earlier one in its dialogue, so no memory can make a
            difference.
    """
    dialogues = list(dialogues)
    chosen = (arms,) if isinstance(arms, str) else None if arms is None else tuple(arms)
    control = None if control is None else load_control(control)
    if chosen is None:
        audited = ("host_only", "control", *AUDIT[1:]) if control is not None else AUDIT
        chosen = audited if recognizer.reads_memory else ("host_only",)
    folder = Path(output)
    settings = {"batch_size": batch_size, "history": history, "seed": seed}
    problems = argument_problems(recognizer, dialogues, chosen, control, activations, settings)
    if problem := folder_problem(folder):
        problems.append(EvaluationError(problem))
    if not problems and not (folder / ANSWERS_NAME).exists():  # otherwise the answers are read, and no sound is needed
        problems = sound_problems(dialogues, recognizer.labels)
    raise_problems(problems)
    if set(chosen) != {"host_only"}:
        warn_of_no_past(dialogues, recognizer.labels)
    if recognizer.memory is not None:
        with recognizer.memory.session(write=False):  # raises SessionError before any arm has run
            pass
    run = _identity(recognizer, dialogues, chosen, history, seed)
    run["control"] = None if control is None else control.fingerprint()
    state = PartialState()
    if state.is_main_process:
        _begin(folder, run)
    state.wait_for_everyone()
    if not (folder / ANSWERS_NAME).exists():
        groups = _groups(dialogues)
        parts = [folder / PARTS_NAME / f"{number:06d}-of-{len(groups):06d}.jsonl" for number in range(len(groups))]
        shared = None
        if activations is not None or len(set(chosen) - {"history"}) > 1:
            temporary = folder / PARTS_NAME / f"activations-{state.process_index}"
            shared = SharedActivations(
                recognizer,
                temporary if activations is None else Path(activations),
                batch_size=batch_size,
                keep=activations is not None,
                log=state.is_main_process,
            )
        own = range(state.process_index, len(groups), state.num_processes)
        missing = [number for number in own if not parts[number].exists()]
        with progress_bar(
            desc="evaluating",
            total=len(chosen) * sum(len(dialogue.utterances) for n in missing for dialogue in groups[n]),
            unit="answer",
            shown=state.is_main_process,
        ) as bar:
            for number in missing:
                with nullcontext(recognizer) if shared is None else shared.of(groups[number]) as fast:
                    lines = _answer_lines(fast, groups[number], chosen, batch_size, history, seed, control, bar.update)
                write_atomically(parts[number], lines.encode(errors="replace"))  # a path need not be Unicode
        state.wait_for_everyone()
        if state.is_main_process:
            write_atomically(folder / ANSWERS_NAME, b"".join(part.read_bytes() for part in parts))
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / PARTS_NAME, ignore_errors=True)
    return read_evaluation(folder)


def read_evaluation(folder: str | os.PathLike[str]) -> Evaluation:
    """Read an evaluation from the folder that `evaluate` wrote.

    Raises:
        EvaluationError: The folder holds no complete evaluation, or it can't be read.
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


def _identity(
    recognizer: EmotionRecognizer, dialogues: list[Dialogue], arms: Sequence[str], history: int, seed: int
) -> dict[str, Any]:
    config, memory = recognizer.model.config, recognizer.memory
    return {
        "format_version": FORMAT_VERSION,
        "host": in_unicode(getattr(config, "_name_or_path", "") or config.model_type),
        "model_type": config.model_type,
        "dtype": str(recognizer.model.dtype).removeprefix("torch."),
        "memory": None if memory is None else memory.adapter.section,
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
    """Create the folder for this evaluation, or check that it already belongs to it."""
    path = folder / RUN_NAME
    if path.exists():
        try:
            there = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path} can't be read: {error}; evaluate into another folder") from error
        differs = [name for name in run if not isinstance(there, dict) or there.get(name) != run[name]]
        if differs and differs != ["versions"]:  # the old versions stay: they made the answers that are there
            raise EvaluationError(f"{folder} holds another evaluation ({', '.join(differs)}); use another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise EvaluationError(f"{folder} is not empty and holds no evaluation; use another folder")
    (folder / PARTS_NAME).mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, (json.dumps(run, indent=2) + "\n").encode())


def _groups(dialogues: list[Dialogue]) -> list[list[Dialogue]]:
    """As few groups as possible, of about one size: a small group would offer few other dialogues."""
    count = math.ceil(len(dialogues) / _GROUP)
    return [dialogues[len(dialogues) * n // count : len(dialogues) * (n + 1) // count] for n in range(count)]


def _answer_lines(
    recognizer: EmotionRecognizer,
    group: list[Dialogue],
    arms: Sequence[str],
    batch_size: int,
    history: int,
    seed: int,
    control: AnyAdapter | None,
    on_answers: Callable[[int], object],
) -> str:
    """Run the arms on these dialogues; returns their lines of `answers.jsonl`."""
    found, surprise = audit(
        recognizer,
        group,
        arms,
        batch_size=batch_size,
        history=history,
        seed=seed,
        control=control,
        on_answers=on_answers,
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
                **_arms_or_error({arm: answers[key] for arm, answers in found.items()}),
            }
            if "arms" in line:
                line["surprise"] = surprise.get(key)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _arms_or_error(answers: dict[str, Answer]) -> dict[str, Any]:
    probabilities = {}
    for arm, answer in answers.items():
        if not isinstance(answer, Prediction):
            return {"error": str(answer.error)}
        probabilities[arm] = answer.probabilities
    return {"arms": probabilities}

"""The state audit: recognise the same utterances in every arm, with their own past and with others.

A gain comes from the dialogue's own history only if its own state beats each state of another past.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import soundfile
from scipy.optimize import linear_sum_assignment

from mal_adapter.errors import AudioError, AudioTooLongError, HostError
from mal_adapter.memory.ensemble import AnyAdapter
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Failure, Prediction

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["Answer", "Answers", "audit"]

Key: TypeAlias = tuple[str, str]  # dialogue id, utterance id
Answer: TypeAlias = Prediction | Failure
Answers: TypeAlias = dict[str, dict[Key, Answer]]
"""Arm -> utterance -> answer."""

_PAUSE_S = 0.2  # between the utterances of a joined history


def audit(
    recognizer: EmotionRecognizer,
    dialogues: Sequence[Dialogue],
    arms: Sequence[str],
    *,
    batch_size: int,
    history: int,
    seed: int,
    control: AnyAdapter | None = None,
    on_answers: Callable[[int], object] = lambda count: None,
) -> tuple[Answers, dict[Key, float]]:
    """Recognise a group of dialogues once per arm.

    What is mutated: the recogniser's memory; it holds none of the sessions afterwards.

    Args:
        recognizer: Needs a memory, except for the arms "host_only" and "history".
        dialogues: The group. The arms "swapped" and "other_dialogues" take the other past from the same group.
        arms: Some of `ARMS`.
        batch_size: Utterances in one forward.
        history: How many earlier utterances the arm "history" joins; fewer where the host does not accept so much
            audio.
        seed: Chooses the random orders of "shuffled" and "other_dialogues".
        control: The adapter of the arm "control".
        on_answers: Called with the number of new answers, for a progress bar.

    Returns:
        The answers, and for each utterance the norm of the surprise (S in Titans) that it left in its dialogue's own
        memory.
    """
    found: Answers = {}
    surprise: dict[Key, float] = {}
    turns = [list(dialogue.utterances) for dialogue in dialogues]
    for arm in arms:
        if arm == "swapped":
            continue  # runs beside "own", whose states it reads
        if arm == "own":
            found |= _own(recognizer, turns, batch_size, surprise, on_answers, swapped="swapped" in arms)
        elif arm == "control" and control is not None:
            found[arm] = _without_past(recognizer, control, [u for us in turns for u in us], batch_size, on_answers)
        elif arm == "reset":
            found[arm] = _side_by_side(recognizer, [[u] for us in turns for u in us], batch_size, on_answers)
        elif arm == "host_only":
            found[arm] = _side_by_side(recognizer.without_memory(), turns, batch_size, on_answers)
        elif arm == "history":
            found[arm] = {}
            for key, answer in _with_history(recognizer.without_memory(), turns, history):
                found[arm][key] = answer
                on_answers(1)
        else:
            found[arm] = _side_by_side(recognizer, _LAYOUTS[arm](turns, seed), batch_size, on_answers)
    return found, surprise


def _other_dialogues(turns: list[list[Utterance]], seed: int) -> list[list[Utterance]]:
    """Deal the utterances of each turn to sessions, so that few sessions have two utterances of one dialogue.

    With at least as many dialogues as turns, none has. Each utterance follows about as many others as in its own
    dialogue, as far as other dialogues are as long. `seed` chooses among all sessions that are equally good.
    """
    rng = np.random.default_rng(seed)
    sessions: list[list[Utterance]] = [[] for _ in turns]
    own = np.zeros((len(turns), len(turns)))  # utterances of each dialogue (row) in each session
    for turn in range(max(map(len, turns))):
        present = [number for number, us in enumerate(turns) if turn < len(us)]
        longest_first = -np.array([len(session) for session in sessions])
        # One utterance of its own dialogue outweighs all lengths together, and one of length all random numbers.
        costs = own[present] * (1 + turn * len(turns)) + longest_first
        costs += rng.random(costs.shape) / (2 * len(turns))
        for number, session in zip(present, linear_sum_assignment(costs)[1], strict=True):
            sessions[session].append(turns[number][turn])
            own[number, session] += 1
    return sessions


def _shuffled(turns: list[list[Utterance]], seed: int) -> list[list[Utterance]]:
    # One generator per dialogue, seeded with its id, so that its order does not depend on the group.
    return [random.Random(f"{seed} {us[0].dialogue_id}").sample(us, len(us)) for us in turns]


def _oracle_speakers(turns: list[list[Utterance]], seed: int) -> list[list[Utterance]]:
    """One session per dialogue and speaker."""
    sessions: dict[tuple[int, str], list[Utterance]] = {}
    for number, us in enumerate(turns):
        for utterance in us:
            sessions.setdefault((number, utterance.speaker), []).append(utterance)
    return list(sessions.values())


_LAYOUTS: dict[str, Callable[[list[list[Utterance]], int], list[list[Utterance]]]] = {
    "other_dialogues": _other_dialogues,
    "shuffled": _shuffled,
    "oracle_speakers": _oracle_speakers,
}


def _own(
    recognizer: EmotionRecognizer,
    turns: list[list[Utterance]],
    batch_size: int,
    surprise: dict[Key, float],
    on_answers: Callable[[int], object],
    *,
    swapped: bool,
) -> Answers:
    """The arm "own" and, if `swapped`, that one: it reads the next dialogue's memory before that writes the turn."""
    found: Answers = {arm: {} for arm in ("own", *(("swapped",) if swapped else ()))}
    ids = [f"audit/{number}" for number in range(len(turns))]
    states = _memory_of(recognizer).states
    states.forget(ids)
    for turn in range(max(map(len, turns))):
        parts = list(_parts([n for n, us in enumerate(turns) if turn < len(us)], batch_size))
        for rows in parts if swapped else ():
            others = [ids[(n + 1) % len(ids)] for n in rows]
            answers = recognizer.answer([turns[n][turn] for n in rows], session_ids=others, write=False)
            found["swapped"].update((_key(answer.utterance), answer) for answer in answers)
            on_answers(len(answers))
        for rows in parts:
            answers = recognizer.answer([turns[n][turn] for n in rows], session_ids=[ids[n] for n in rows])
            found["own"].update((_key(answer.utterance), answer) for answer in answers)
            on_answers(len(answers))
            for n, answer in zip(rows, answers, strict=True):
                if isinstance(answer, Prediction):
                    momentum = states[ids[n]].momentum
                    surprise[_key(answer.utterance)] = sum(float(s.square().sum()) for s in momentum) ** 0.5
    states.forget(ids)
    return found


def _side_by_side(
    recognizer: EmotionRecognizer,
    sessions: Sequence[Sequence[Utterance]],
    batch_size: int,
    on_answers: Callable[[int], object],
) -> dict[Key, Answer]:
    """Recognise the utterances of each session in order, each session with a memory of its own."""
    found: dict[Key, Answer] = {}
    for first in range(0, len(sessions), batch_size):
        part = {f"audit/{first + n}": list(us) for n, us in enumerate(sessions[first : first + batch_size])}
        _forget(recognizer, part)
        for turn in range(max(map(len, part.values()))):
            ids = [session_id for session_id, us in part.items() if turn < len(us)]
            answers = recognizer.answer([part[session_id][turn] for session_id in ids], session_ids=ids)
            found.update((_key(answer.utterance), answer) for answer in answers)
            on_answers(len(answers))
        _forget(recognizer, part)
    return found


def _without_past(
    recognizer: EmotionRecognizer,
    control: AnyAdapter,
    utterances: list[Utterance],
    batch_size: int,
    on_answers: Callable[[int], object],
) -> dict[Key, Answer]:
    """Recognise each utterance with `control` in place of the memory's adapter, and with an empty memory."""
    found: dict[Key, Answer] = {}
    with _memory_of(recognizer).using(control):
        for first in range(0, len(utterances), batch_size):
            part = utterances[first : first + batch_size]
            for answered in recognizer.answer_from(part, [None] * len(part)):
                if isinstance(answered.result, HostError):
                    raise answered.result
                found[_key(answered.result.utterance)] = answered.result
            on_answers(len(part))
    return found


def _with_history(
    recognizer: EmotionRecognizer, turns: list[list[Utterance]], history: int
) -> Iterator[tuple[Key, Answer]]:
    """Recognise each utterance with up to `history` earlier ones joined in front, as many as the host accepts."""
    with tempfile.TemporaryDirectory(prefix="mal_adapter-history-") as folder:
        joined = Path(folder, "joined.wav")
        for us in turns:
            for turn, utterance in enumerate(us):
                answer: Answer = recognizer.answer([utterance])[0]
                for count in range(min(history, turn), 0, -1) if isinstance(answer, Prediction) else ():
                    if not _join(us[turn - count : turn + 1], joined, recognizer.sampling_rate):
                        continue
                    whole = Utterance(utterance.dialogue_id, utterance.utterance_id, utterance.speaker, joined)
                    longer = recognizer.answer([whole])[0]
                    if isinstance(longer, Prediction):
                        answer = longer
                        break
                    if not isinstance(longer.error, AudioTooLongError):
                        break
                yield _key(utterance), answer


def _join(utterances: Sequence[Utterance], path: Path, sampling_rate: int) -> bool:
    """Join the audio of the utterances in order, without those that can't be read; False if only the last one can."""
    pause = np.zeros(round(_PAUSE_S * sampling_rate), dtype=np.float32)
    pieces = []
    for utterance in utterances:
        try:
            pieces += [load_waveform(utterance, sampling_rate), pause]
        except AudioError:
            continue
    soundfile.write(path, np.concatenate(pieces[:-1]), sampling_rate, subtype="FLOAT")
    return len(pieces) > 2


def _parts(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


def _key(utterance: Utterance) -> Key:
    return utterance.dialogue_id, utterance.utterance_id


def _memory_of(recognizer: EmotionRecognizer) -> AttachedMemory:
    if recognizer.memory is None:
        raise ValueError("this recogniser has no memory")
    return recognizer.memory


def _forget(recognizer: EmotionRecognizer, session_ids: Iterable[str]) -> None:
    if recognizer.memory is not None:
        recognizer.memory.states.forget(session_ids)

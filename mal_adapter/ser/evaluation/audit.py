"""The state audit: the same utterances heard with the right memory, with wrong ones, and with what a sceptic asks for.

A memory is real only if the right state beats each state that comes from another past.
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

from mal_adapter.errors import AudioError, AudioTooLongError
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Failure, Prediction

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["Answer", "Heard", "audit"]

Key: TypeAlias = tuple[str, str]  # dialogue id, utterance id
Answer: TypeAlias = Prediction | Failure
Heard: TypeAlias = dict[str, dict[Key, Answer]]
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
    on_answers: Callable[[int], object] = lambda count: None,
) -> tuple[Heard, dict[Key, float]]:
    """Hears a group of dialogues once per arm.

    What is mutated: the recogniser's memory holds none of the sessions afterwards.

    Args:
        recognizer: with a memory, unless the arms are "host_only" and "history" alone.
        dialogues: the group; memories are swapped, and utterances mixed, among these.
        arms: of `ARMS`.
        batch_size: utterances in one forward.
        history: how many utterances before it the arm "history" joins; fewer where the host can't take them all.
        seed: of the random orders.
        on_answers: called with the number of answers that have come, for a progress bar.

    Returns:
        The answers, and for each utterance the norm of the surprise that it left in the right memory, S in Titans.
    """
    heard: Heard = {}
    surprise: dict[Key, float] = {}
    turns = [list(dialogue.utterances) for dialogue in dialogues]
    for arm in arms:
        if arm == "swapped":
            continue  # heard beside the right one, whose states it reads
        if arm == "own":
            heard |= _own(recognizer, turns, batch_size, surprise, on_answers, swapped="swapped" in arms)
        elif arm == "reset":
            heard[arm] = _side_by_side(recognizer, [[u] for us in turns for u in us], batch_size, on_answers)
        elif arm == "host_only":
            heard[arm] = _side_by_side(recognizer.without_memory(), turns, batch_size, on_answers)
        elif arm == "history":
            heard[arm] = {}
            for key, answer in _with_history(recognizer.without_memory(), turns, history):
                heard[arm][key] = answer
                on_answers(1)
        else:
            heard[arm] = _side_by_side(recognizer, _LAYOUTS[arm](turns, seed), batch_size, on_answers)
    return heard, surprise


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
        costs = (
            own[present] * (1 + turn * len(turns)) + longest_first
        )  # all lengths together weigh less than one of own
        costs += rng.random(costs.shape) / (2 * len(turns))  # all together less than one utterance of length
        for number, session in zip(present, linear_sum_assignment(costs)[1], strict=True):
            sessions[session].append(turns[number][turn])
            own[number, session] += 1
    return sessions


def _shuffled(turns: list[list[Utterance]], seed: int) -> list[list[Utterance]]:
    # One generator per dialogue, named by it: in whatever group it is heard, its order is the same.
    return [random.Random(f"{seed} {us[0].dialogue_id}").sample(us, len(us)) for us in turns]


def _oracle_speakers(turns: list[list[Utterance]], seed: int) -> list[list[Utterance]]:
    """A session per dialogue and speaker."""
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
) -> Heard:
    """The arm "own" and, with `swapped`, that one: each turn reads the next dialogue's memory before that goes on."""
    heard: Heard = {arm: {} for arm in ("own", *(("swapped",) if swapped else ()))}
    ids = [f"audit/{number}" for number in range(len(turns))]
    states = _memory_of(recognizer).states
    states.forget(ids)
    for turn in range(max(map(len, turns))):
        parts = list(_parts([n for n, us in enumerate(turns) if turn < len(us)], batch_size))
        for rows in parts if swapped else ():
            others = [ids[(n + 1) % len(ids)] for n in rows]
            answers = recognizer.answer([turns[n][turn] for n in rows], session_ids=others, write=False)
            heard["swapped"].update((_key(answer.utterance), answer) for answer in answers)
            on_answers(len(answers))
        for rows in parts:
            answers = recognizer.answer([turns[n][turn] for n in rows], session_ids=[ids[n] for n in rows])
            heard["own"].update((_key(answer.utterance), answer) for answer in answers)
            on_answers(len(answers))
            for n, answer in zip(rows, answers, strict=True):
                if isinstance(answer, Prediction):
                    momentum = states[ids[n]].momentum
                    surprise[_key(answer.utterance)] = sum(float(s.square().sum()) for s in momentum) ** 0.5
    states.forget(ids)
    return heard


def _side_by_side(
    recognizer: EmotionRecognizer,
    sessions: Sequence[Sequence[Utterance]],
    batch_size: int,
    on_answers: Callable[[int], object],
) -> dict[Key, Answer]:
    """The utterances of each session in their order, each session with a memory of its own."""
    heard: dict[Key, Answer] = {}
    for first in range(0, len(sessions), batch_size):
        part = {f"audit/{first + n}": list(us) for n, us in enumerate(sessions[first : first + batch_size])}
        _forget(recognizer, part)
        for turn in range(max(map(len, part.values()))):
            ids = [session_id for session_id, us in part.items() if turn < len(us)]
            answers = recognizer.answer([part[session_id][turn] for session_id in ids], session_ids=ids)
            heard.update((_key(answer.utterance), answer) for answer in answers)
            on_answers(len(answers))
        _forget(recognizer, part)
    return heard


def _with_history(
    recognizer: EmotionRecognizer, turns: list[list[Utterance]], history: int
) -> Iterator[tuple[Key, Answer]]:
    """Each utterance with up to `history` utterances before it in front of it, as many as the host takes."""
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
    """Writes the audio of those utterances that can be heard, the last one last; False if none but that can."""
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

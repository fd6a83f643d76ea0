"""A request's utterance in an engine, from its arrival to what became of it, and one step of several."""

import dataclasses
from collections.abc import Iterator

from mal_adapter.memory.state import MemoryState
from mal_adapter.vllm.rows import Positions

__all__ = ["Outcome", "Step", "Utterance", "waves"]


@dataclasses.dataclass
class Outcome:
    """What became of a dialogue's last utterance in this engine.

    Attributes:
        request_id: vLLM's id of the request.
        turn: As the client sent it.
        read: Whether the answer used the dialogue's memory.
        written: Whether the utterance was written.
        reason: Why not, if one of them is False.
    """

    request_id: str
    turn: int | None
    read: bool = False
    written: bool = False
    reason: str | None = None


@dataclasses.dataclass
class Utterance:
    """A request with audio in a session, until it has finished."""

    session_id: str
    audio: Positions
    arrival: int
    outcome: Outcome
    before: MemoryState | None = None  # what it read: vLLM may preempt the request, and computes it again later
    failed: bool = False  # answered without memory, and so it is when it is computed again

    def __post_init__(self) -> None:
        self.first, self.last = int(self.audio[0]), int(self.audio[-1])


@dataclasses.dataclass
class Step:
    """One step of the engine, from the scheduler's output to the commit."""

    computed: dict[str, range]
    due: dict[str, Utterance]  # those whose audio is in this step, in the order of their arrival
    current: dict[str, MemoryState | None]  # of the sessions that are due; None for a new one
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # writes of each session skipped before the step
    written: dict[str, list[Utterance]] = dataclasses.field(default_factory=dict)  # of each session


def waves(due: dict[str, Utterance]) -> Iterator[list[Utterance]]:
    """Utterances in the order of their arrival, at most one of each session at a time."""
    waiting = list(due.values())
    while waiting:
        wave: dict[str, Utterance] = {}
        later = []
        for utterance in waiting:
            if utterance.session_id in wave:
                later.append(utterance)
            else:
                wave[utterance.session_id] = utterance
        yield list(wave.values())
        waiting = later

"""What a memory in vLLM has done so far, for /metrics, the session routes and tests."""

import dataclasses

__all__ = ["HELP", "Counters"]

HELP = {
    "reads": "Utterances that read their dialogue's memory.",
    "writes": "Utterances that were written.",
    "recomputed": "Reads that were repeated after vLLM had preempted the request; they are not written again.",
    "repeated": "Utterances with the turn number of one that is already written; they read, and are not written again.",
    "conflicts": "Utterances not written: another turn was due, or another engine had continued the dialogue.",
    "split": "Utterances without memory: their audio was not computed in one step.",
    "skipped": "Writes that were not finite and were skipped.",
    "unsaved": "Writes that the store could not save at first; the engine keeps them until it can, while it has room.",
    "unavailable": "Utterances without memory: the store could not be read, or holds a state that does not fit.",
    "refused": "Requests without memory: their session or turn was not valid, or their input was streamed.",
    "errors": "Utterances without memory after an error of mal_adapter; each is in the log.",
    "waves": "Batched reads and writes; a wave has at most one utterance of each dialogue.",
}
"""Each counter's meaning."""


@dataclasses.dataclass
class Counters:
    """Numbers since the engine started; `HELP` says what each counts."""

    reads: int = 0
    writes: int = 0
    recomputed: int = 0
    repeated: int = 0
    conflicts: int = 0
    split: int = 0
    skipped: int = 0
    unsaved: int = 0
    unavailable: int = 0
    refused: int = 0
    errors: int = 0
    waves: int = 0

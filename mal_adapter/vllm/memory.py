"""The memory of one vLLM worker: what each step reads, in which order, and what is saved once it has succeeded."""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mal_adapter.errors import AudioMaskError, MalAdapterError, SessionError
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState
from mal_adapter.vllm.counters import Counters
from mal_adapter.vllm.rows import Positions, audio_positions, inside, positions_of_step, rows_of_step
from mal_adapter.vllm.sessions import StepSessions
from mal_adapter.vllm.turns import session_turn

__all__ = ["EngineMemory", "Outcome"]

log = logging.getLogger("vllm.mal_adapter")

_REMEMBERED = 1024  # dialogues whose last utterance can be repeated exactly, and whose last outcome is known


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
class _Utterance:
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
class _Step:
    """One step of the engine, from the scheduler's output to the commit."""

    computed: dict[str, range]
    due: dict[str, _Utterance]  # those whose audio is in this step, in the order of their arrival
    current: dict[str, MemoryState | None]  # of the sessions that are due; None for a new one
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # writes of each session skipped before the step
    written: dict[str, list[_Utterance]] = dataclasses.field(default_factory=dict)  # of each session


class EngineMemory:
    """Reads and writes the memory for the requests of one worker. None of its methods raises: an utterance that can't
    be processed is answered without memory, logged and counted.

    An utterance reads what the dialogue's earlier utterances have written, and then is written. Utterances of one
    dialogue in one step go in waves, in the order of their arrival; this is exact, since no layer below depends on the
    memory.

    Args:
        adapter: In eval mode, on the device of the hidden states.
        order: Returns the request ids in the order of the flat batch; called in the hooked layer.
        sessions: The states.
    """

    def __init__(self, adapter: MemoryAdapter, order: Callable[[], Sequence[str]], sessions: StepSessions) -> None:
        self.adapter = adapter
        self.sessions = sessions
        self.counters = Counters()
        self.outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self._order = order
        self._utterances: dict[str, _Utterance] = {}
        self._previous: OrderedDict[str, tuple[int, MemoryState]] = OrderedDict()  # (turn, state before it)
        self._arrivals = 0
        self._step: _Step | None = None

    @property
    def requests(self) -> int:
        """How many unfinished requests of sessions it knows."""
        return len(self._utterances)

    def begin(self, scheduled: Any) -> None:
        """A step begins; `scheduled` is vLLM's SchedulerOutput."""
        try:
            for request_id in scheduled.finished_req_ids:
                self._utterances.pop(request_id, None)
            for new in scheduled.scheduled_new_reqs:
                self._note(new)
            if not self._utterances:
                return
            computed = positions_of_step(scheduled)
            due = {request_id: u for request_id, u in self._utterances.items() if self._is_due(request_id, computed)}
            due = dict(sorted(due.items(), key=lambda item: item[1].arrival))
            self._step = _Step(computed, due, {}) if due else None
            if self._step is not None:
                self._load(self._step)
        except Exception as error:
            self._lose(self._utterances.values() if self._step is None else self._step.due.values(), error)
            self._step = None
            self.sessions.close()

    def change(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Add what the memory answers to `hidden`, in place.

        Args:
            hidden: (tokens, hidden_size) output of the hooked layer.
            residual: What vLLM adds to it later, of the same shape, or None.
        """
        step = self._step
        if step is None or not step.due:
            return
        try:
            with torch.no_grad():
                self._read_and_write(step, hidden, residual)
        except Exception as error:
            self._lose(step.due.values(), error)

    def end(self, *, succeeded: bool) -> None:
        """The step is over; what it wrote is saved if it has succeeded."""
        step, self._step = self._step, None
        if step is None:
            return
        try:
            if succeeded and step.written:
                self._commit(step)
        except Exception as error:
            self._lose([], error)
            for utterance in (u for written in step.written.values() for u in written):
                self.counters.errors += 1
                utterance.outcome.written, utterance.outcome.reason = False, f"not saved: {error}"
        finally:
            self.sessions.close()

    def forget(self, session_id: str) -> None:
        """The session's state was replaced or deleted, so its last utterance can't be repeated any more."""
        self._previous.pop(session_id, None)

    # a step's beginning ----------------------------------------------------------------------------------------------

    def _note(self, new: Any) -> None:
        try:
            self._note_request(new)
        except Exception as error:
            self.counters.errors += 1
            self._lose([], error)

    def _note_request(self, new: Any) -> None:
        audio = audio_positions(new.mm_features)
        known = self._utterances.get(new.req_id)
        if known is not None:  # preempted, as model runner V2 sends it again; or its input is streamed
            if audio is None or not torch.equal(audio, known.audio):
                self._refuse(known, "input in several parts")
            return
        try:
            turn = session_turn(new.sampling_params)
        except SessionError as error:  # admission refuses it, unless it is bypassed
            self.counters.refused += 1
            log.warning("request %s is answered without memory: %s", new.req_id, error)
            return
        if turn is None or audio is None:
            return
        outcome = Outcome(new.req_id, turn.turn)
        self._utterances[new.req_id] = _Utterance(turn.session_id, audio, self._arrivals, outcome)
        self._arrivals += 1
        _remember(self.outcomes, turn.session_id, outcome)

    def _is_due(self, request_id: str, computed: dict[str, range]) -> bool:
        utterance = self._utterances[request_id]
        if utterance.failed or request_id not in computed:
            return False
        chunk = computed[request_id]
        if chunk.stop <= utterance.first or chunk.start > utterance.last:  # a decode step, as most are
            return False
        part = inside(utterance.audio, chunk)
        if part.tokens and not part.whole:
            self.counters.split += 1
            total = len(utterance.audio)
            self._fail(utterance, f"{part.tokens} of {total} audio tokens are in one step; it needs all at once")
            return False
        return part.whole

    def _load(self, step: _Step) -> None:
        new = [u.session_id for u in step.due.values() if u.before is None]
        for session_id, found in self.sessions.open(list(dict.fromkeys(new))).items():
            if isinstance(found, str):
                lost = [u for u in step.due.values() if u.session_id == session_id and u.before is None]
                self.counters.unavailable += len(lost)
                for utterance in lost:
                    self._fail(utterance, found)
            else:
                step.current[session_id] = found
                step.skipped[session_id] = 0 if found is None else int(found.skipped_writes)
        step.due = {request_id: u for request_id, u in step.due.items() if not u.failed}

    # in the hooked layer ---------------------------------------------------------------------------------------------

    def _read_and_write(self, step: _Step, hidden: Tensor, residual: Tensor | None) -> None:
        audio = {request_id: utterance.audio for request_id, utterance in step.due.items()}
        rows = rows_of_step(self._order(), step.computed, audio)
        last = max(int(r[-1]) for r in rows.values())
        if last >= len(hidden):
            raise AudioMaskError(f"row {last} of the batch has audio, but the layer's output has {len(hidden)} rows")
        for wave in _waves(step.due):
            try:
                self._wave(step, wave, [rows[u.outcome.request_id] for u in wave], hidden, residual)
            except Exception as error:
                self._lose(wave, error)

    def _wave(
        self, step: _Step, wave: list[_Utterance], rows: list[Tensor], hidden: Tensor, residual: Tensor | None
    ) -> None:
        """One utterance of each dialogue reads and is written. Nothing is changed before everything is computed."""
        self.counters.waves += 1
        states, new = [], []
        for utterance in wave:
            before, writes = self._state_for(step, utterance)
            states.append(before)
            new.append(writes)
        flat = torch.cat(rows).to(hidden.device, non_blocking=True)
        spans = Spans([len(r) for r in rows], hidden.device)
        # In half precision the sum is rounded once, as in transformers and in the next layer's norm.
        stream = hidden.index_select(0, flat)
        if residual is not None:
            stream = stream + residual.index_select(0, flat)
        state = _stack(states, hidden.device)
        answer = self.adapter.read_tokens(state, stream, spans)
        after: list[MemoryState] = []
        if any(new):
            # What is written is the utterance as the memory made it understood, so that the next one builds on it.
            after = self.adapter.write_tokens(state, stream + answer, spans).split()
        hidden.index_add_(0, flat, answer)
        for i, utterance in enumerate(wave):
            first = utterance.before is None
            utterance.before = states[i]
            utterance.outcome.read = True
            self.counters.reads += 1
            self.counters.recomputed += not first
            if new[i]:
                step.current[utterance.session_id] = after[i]
                step.written.setdefault(utterance.session_id, []).append(utterance)

    def _state_for(self, step: _Step, utterance: _Utterance) -> tuple[MemoryState, bool]:
        """The state that an utterance reads, and whether it is to be written."""
        if utterance.before is not None:
            return utterance.before, False
        session_id, turn = utterance.session_id, utterance.outcome.turn
        current = step.current[session_id]
        state = self.adapter.initial_state(1) if current is None else current
        if turn is None:
            return state, True
        due = int(state.utterances + state.skipped_writes)
        if turn == due:
            _remember(self._previous, session_id, (turn, state))
            return state, True
        previous = self._previous.get(session_id)
        if turn == due - 1:
            self.counters.repeated += 1
            utterance.outcome.reason = f"turn {turn} is already written"
            return (state if previous is None or previous[0] != turn else previous[1]), False
        self.counters.conflicts += 1
        utterance.outcome.reason = f"turn {due} is due, not {turn}"
        log.warning("session %r: turn %d is due, not %d, which is not written", session_id, due, turn)
        return state, False

    # a step's end ----------------------------------------------------------------------------------------------------

    def _commit(self, step: _Step) -> None:
        ids = list(step.written)
        states = [state for session_id in ids if (state := step.current[session_id]) is not None]
        # On the CPU: a thousand states of a large adapter would take half a gigabyte that vLLM does not count.
        new = dict(zip(ids, MemoryState.stack(states).to("cpu").split(), strict=True))
        failed = self.sessions.save(new)
        for session_id, utterances in step.written.items():
            unsaved = failed.get(session_id)
            lost = unsaved is not None and not unsaved.kept
            skipped = int(new[session_id].skipped_writes) - step.skipped[session_id]
            reason = "the write was not finite" if skipped else None
            if unsaved is not None:
                reason = unsaved.reason
                log.warning("session %r: %s", session_id, reason)
            for utterance in utterances:
                utterance.outcome.written, utterance.outcome.reason = not lost and not skipped, reason
            self.counters.skipped += skipped
            self.counters.writes += 0 if lost else len(utterances) - skipped
            if unsaved is not None and unsaved.conflict:
                self.counters.conflicts += len(utterances)
            elif unsaved is not None:
                self.counters.unsaved += 1
            if lost:
                self.forget(session_id)

    # failures --------------------------------------------------------------------------------------------------------

    def _fail(self, utterance: _Utterance, reason: str) -> None:
        utterance.failed = True
        utterance.outcome.reason = reason
        request_id, session_id = utterance.outcome.request_id, utterance.session_id
        log.warning("request %s of session %r is answered without memory: %s", request_id, session_id, reason)

    def _refuse(self, utterance: _Utterance, reason: str) -> None:
        self.counters.refused += 1
        self._fail(utterance, reason)

    def _lose(self, utterances: "Sequence[_Utterance] | Any", error: Exception) -> None:
        """An error that nobody expects: these utterances, as far as they have not read, have no memory."""
        kind = "" if isinstance(error, MalAdapterError) else f"{type(error).__name__}: "
        log.error("mal_adapter: %s%s", kind, error, exc_info=error)
        for utterance in list(utterances):
            if not utterance.failed and not utterance.outcome.read:
                self.counters.errors += 1
                self._fail(utterance, f"{kind}{error}")


def _waves(due: dict[str, _Utterance]) -> Iterator[list[_Utterance]]:
    """Utterances in the order of their arrival, at most one of each session at a time."""
    waiting = list(due.values())
    while waiting:
        wave: dict[str, _Utterance] = {}
        later = []
        for utterance in waiting:
            if utterance.session_id in wave:
                later.append(utterance)
            else:
                wave[utterance.session_id] = utterance
        yield list(wave.values())
        waiting = later


def _stack(states: list[MemoryState], device: torch.device) -> MemoryState:
    """One state of all these dialogues, on `device`; those from the store are on the CPU and are copied at once."""
    if any(state.device != states[0].device for state in states):
        states = [state.to(device) for state in states]
    return MemoryState.stack(states).to(device)


def _remember(kept: "OrderedDict[str, Any]", session_id: str, value: object) -> None:
    kept[session_id] = value
    kept.move_to_end(session_id)
    if len(kept) > _REMEMBERED:
        kept.popitem(last=False)

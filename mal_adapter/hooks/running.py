"""What the hooks of one memory do when they run: for forwards inside a block, and for those outside."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from mal_adapter.errors import AudioMaskError, AudioOutsideSessionWarning, HostError, SkippedWriteWarning
from mal_adapter.hooks.blocks import current_block, entered
from mal_adapter.hooks.inside import Inside
from mal_adapter.hooks.outside import check_left, check_outside
from mal_adapter.hooks.session import Session
from mal_adapter.hooks.torch_internals import inside_checkpoint, runs_backward
from mal_adapter.hosts.audio_mask import bind_call, find_features
from mal_adapter.hosts.spec import HostSpec

__all__ = ["RunningHooks", "untraced"]

_CHECKPOINTED = (
    "the hooked layer is inside a checkpointed region that runs it again in backward, when its memory is another one. "
    "Checkpoint the decoder layers one by one, with gradient_checkpointing_enable() or checkpoint_wrapper"
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Exclude `function` and its callees from torch.compile."""
    excluded: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return excluded


class RunningHooks:
    """The sessions of one memory, and what its hooks do in them.

    Args:
        host: The host's description.

    Attributes:
        key: Of this memory's blocks.
        prompt_module: The module that receives ids and audio features.
    """

    prompt_module: nn.Module

    def __init__(self, host: HostSpec) -> None:
        self.host = host
        self.key = object()
        self._inside = Inside(host)
        self._unrecorded = False
        self._open: set[Session] = set()  # in any thread or task
        self._warned: set[type[Warning]] = set()

    @property
    def session(self) -> Session | None:
        """The session whose block this thread or task is in."""
        block = current_block(self.key)
        return None if block is None or block.left else block.session

    @contextmanager
    def active(self, session: Session | None) -> Iterator[None]:
        """Within this block the hooks serve `session`; None disables them."""
        if session is None:
            with entered(self.key, None):
                yield
            return
        self._open.add(session)
        try:
            with entered(self.key, session):
                yield
        finally:
            self._open.discard(session)
            session.close()
        self._warn_of_skipped(session, wait=True)  # the host may have gone on long before its device

    @untraced
    def run_begin(self, module: nn.Module) -> None:
        """A forward of a hooked module starts."""
        if (session := self.session) is not None:
            self._warn_of_skipped(session)
            session.begin(module)

    @untraced
    def run_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The prompt module is called with these arguments."""
        block = current_block(self.key)
        if block is None:  # this context still has a block that was left in another one
            self.see_outside(module, args, kwargs)
            return
        session = block.session
        if session is None:
            return
        arguments = bind_call(module, args, kwargs)
        if session.forward is None:
            if block.left:
                check_left(self.host, module, arguments, session)
            return
        self._inside.see_call(session, session.forward, module, arguments)

    @untraced
    def run_layer(self, output: Any) -> Any:
        """The hooked layer returned `output`. Returns it with the memory's residual, or None to leave it as it is."""
        block = current_block(self.key)
        session = None if block is None else block.session
        forward = None if session is None else session.forward
        if runs_backward():
            if self._unrecorded:
                raise HostError(_CHECKPOINTED)
            return None
        if session is None or (forward is None and session.closed) or (forward is not None and forward.in_checkpoint):
            return None
        if forward is None or (session.audio_mask is None and self.prompt_module not in forward.entered):
            raise AudioMaskError(
                f"the hooked layer runs, but {type(self.prompt_module).__name__}, whose arguments say where audio "
                "is, was not called: call model(...) and not model.forward(...), with PEFT 0.21 or newer around it; or "
                "pass session(audio_mask=...), or work under memory.disabled()"
            )
        first = output[0] if isinstance(output, tuple) else output
        hidden = first if self.host.stream_idx is None else first[self.host.stream_idx]
        plan = self._inside.plan_of(session, forward, hidden)
        if plan is None:
            return None
        if forward.records_grad:
            # Autograd that is off inside is a reentrant checkpoint, or a host that never trains. Backward shows which.
            self._unrecorded = not torch.is_grad_enabled()
            if inside_checkpoint() or (self._unrecorded and session.adapter.training):
                raise HostError(_CHECKPOINTED)
        changed = self._inside.read_and_write(session, forward, plan, hidden)
        if self.host.stream_idx is not None:
            changed = first.select_scatter(changed, 0, self.host.stream_idx)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    @untraced
    def run_end(self, module: nn.Module, succeeded: bool) -> None:
        """A forward of a hooked module ended."""
        block = current_block(self.key)
        if block is None or block.session is None:
            return
        session = block.session
        # always_call: this also runs after an exception, so that the failed call commits nothing
        session.end(module, succeeded=succeeded, keep_graph=session.adapter.training)
        self._warn_of_skipped(session)

    def abandon(self) -> None:
        """The running forward fails in a compiled graph, which calls no hooks after that. Nothing is committed."""
        block = current_block(self.key)
        if block is not None and block.session is not None:
            block.session.abandon()

    def _warn_of_skipped(self, session: Session, *, wait: bool = False) -> None:
        """Warn, once per memory, if a write of the session was skipped: of what the host knows, or of all if `wait`."""
        known = SkippedWriteWarning in self._warned
        if session.skipped.look(wait=wait and not known) and not known:
            self._warned.add(SkippedWriteWarning)
            warnings.warn(
                "an utterance's write was not finite and did not land; the session's memory is as before, see "
                "MemoryState.skipped_writes (warned once)",
                SkippedWriteWarning,
                stacklevel=2,
            )

    @untraced
    def see_outside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The prompt module is called outside of any block."""
        arguments, sessions = bind_call(module, args, kwargs), list(self._open)
        check_outside(self.host, module, arguments, sessions)
        if AudioOutsideSessionWarning not in self._warned and find_features(self.host, arguments) is not None:
            self._warned.add(AudioOutsideSessionWarning)
            warnings.warn(
                "audio passed outside a session, so the memory neither reads nor writes; use "
                "`with memory.session(id):`, or `with memory.disabled():` if this is intended (warned once)",
                AudioOutsideSessionWarning,
                stacklevel=2,
            )

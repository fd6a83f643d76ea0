"""The hooks of one memory: how a forward of the host finds its session, reads its memory and writes to it.

A forward inside a session goes: `begin` on the model; `prompt` on the module that receives ids and audio features,
where the audio positions are seen; `layer` on the hooked decoder layer, where the memory is read and the write
prepared; `end` on the model, which commits the write. Outside a session each returns at once.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.compiler import is_compiling

from mal_adapter.errors import (
    AudioMaskError,
    AudioOutsideSessionWarning,
    HostError,
    SkippedWriteWarning,
)
from mal_adapter.hooks.blocks import BLOCKS, current_block, entered
from mal_adapter.hooks.checkpointing import unwrap, wrap
from mal_adapter.hooks.compiled import TracedHooks
from mal_adapter.hooks.inside import Inside
from mal_adapter.hooks.outside import check_left, check_outside
from mal_adapter.hooks.session import Session
from mal_adapter.hooks.torch_internals import (
    drop_hooks_of,
    hook_owners,
    inside_checkpoint,
    no_graph_of_its_own,
    runs_backward,
)
from mal_adapter.hosts.audio_mask import bind_call, find_features
from mal_adapter.hosts.host import Host
from mal_adapter.hosts.spec import HostSpec
from mal_adapter.memory.adapter import MemoryAdapter

__all__ = ["MemoryHooks", "drop_copied_hooks", "has_memory"]

_CHECKPOINTED = (
    "the hooked layer is inside a checkpointed region that runs it again in backward, when its memory is another one. "
    "Checkpoint the decoder layers one by one, with gradient_checkpointing_enable() or checkpoint_wrapper"
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _untraced(function: _Function) -> _Function:
    """Exclude `function` and its callees from torch.compile."""
    untraced: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced


class MemoryHooks:
    """The hooks of one memory. They can be pickled and hold no tensors of a session: the hooks of a copied or unpickled
    host belong to no session."""

    def __init__(self, adapter: MemoryAdapter, host: HostSpec) -> None:
        self.adapter = adapter
        self.host = host
        self.key = object()  # of this memory's blocks
        self.copied = False
        self._inside = Inside(adapter, host)
        self._traced = TracedHooks(host)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._unrecorded = False
        self._open: set[Session] = set()  # in any thread or task
        self._warned: set[type[Warning]] = set()
        self._moving = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"adapter": self.adapter, "host": self.host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["adapter"], state["host"])  # type: ignore[misc]
        self.copied = True

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

    def register(self, host: Host, layer_idx: int) -> None:
        """Register all hooks on the host's model and on its decoder layer `layer_idx`."""
        root = host.model
        self._parent = root.get_submodule(host.layers_path.rpartition(".")[0])
        self.layers = host.layers
        self._layer_idx = layer_idx
        self.prompt_module = root.get_submodule(self.host.mask_module or "")
        # Someone may call the inner model alone, so its call begins and ends too; the outermost one counts.
        self.modules = tuple(dict.fromkeys((root, self.prompt_module, self._parent)))
        self._traced.register(self)
        for module in self.modules:
            self._handles.append(module.register_forward_pre_hook(self.begin))
            self._handles.append(module.register_forward_hook(self.end, always_call=True))
        self._handles.append(self.prompt_module.register_forward_pre_hook(self.prompt, with_kwargs=True))
        self._hook_layer()

    def remove(self) -> None:
        """Take all hooks away, in reverse order."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []
        self._traced.close()
        for module in (self._layer, self._parent):
            unwrap(module, self)

    def _hook_layer(self) -> None:
        self._layer = self.layers[self._layer_idx]
        # First in line, so that output_hidden_states and other hooks of the layer see what the next layer sees.
        self._handles.append(self._layer.register_forward_hook(self.layer, prepend=True))

    def _stay_outermost(self) -> None:
        """Move the hooks outside of what was put around the layer after attach_memory, such as torch's
        checkpoint_wrapper."""
        if self.layers[self._layer_idx] is not self._layer:
            with self._moving:
                if self.layers[self._layer_idx] is not self._layer:  # no other thread has moved them meanwhile
                    unwrap(self._layer, self)
                    self._handles.pop().remove()
                    self._hook_layer()
        for module in (self._layer, self._parent):
            wrap(module, self._layer, self)

    @no_graph_of_its_own
    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward of a hooked module starts."""
        if is_compiling():
            if self._traced.active():
                self._traced.begin(module)
            else:
                self.run_begin(module)
        elif self.key in BLOCKS.get():
            self.run_begin(module)

    @_untraced
    def run_begin(self, module: nn.Module) -> None:
        """What `begin` does, in a graph too."""
        if (session := self.session) is not None:
            self._warn_of_skipped(session)
            session.begin(module)
            self._stay_outermost()

    @no_graph_of_its_own
    def prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module that receives ids and audio features is called with these arguments."""
        if is_compiling():
            if not (self._traced.active() and self._traced.prompt(args, kwargs)):
                self.run_prompt(module, args, kwargs)
        elif self.key in BLOCKS.get():
            self.run_prompt(module, args, kwargs)
        elif self._open or AudioOutsideSessionWarning not in self._warned:
            self._prompt_outside(module, args, kwargs)

    @_untraced
    def run_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What `prompt` does, in a graph too."""
        block = current_block(self.key)
        if block is None:  # this context still has a block that was left in another one
            self._prompt_outside(module, args, kwargs)
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

    def run_outside(self, layer: nn.Module, run: Callable[[], Any]) -> Any:
        """Return what `run` returns; read and write the memory of `layer` after `run` instead of inside."""
        session = self.session  # once: the block may be left in another thread meanwhile
        forward = None if session is None else session.forward
        if forward is None:
            return run()
        with forward.checkpointing():
            output = run()
        changed = self.layer(layer, (), output)
        return output if changed is None else changed

    @no_graph_of_its_own
    def layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hooked layer returned `output`. Returns it with the memory's residual, or None to leave it as it is."""
        if is_compiling():
            if self._traced.active():
                return self._traced.layer(output)
            return self.run_layer(output)
        if self.key in BLOCKS.get() or self._unrecorded:
            return self.run_layer(output)
        return None

    @_untraced
    def run_layer(self, output: Any) -> Any:
        """What `layer` does, in a graph too."""
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
            if inside_checkpoint() or (self._unrecorded and self.adapter.training):
                raise HostError(_CHECKPOINTED)
        changed = self._inside.read_and_write(session, forward, plan, hidden)
        if self.host.stream_idx is not None:
            changed = first.select_scatter(changed, 0, self.host.stream_idx)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    @no_graph_of_its_own
    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward of a hooked module ended; `output` is None if it raised."""
        if is_compiling():
            if self._traced.active():
                self._traced.end(module)
            else:
                self.run_end(module, output is not None)
        elif self.key in BLOCKS.get():
            self.run_end(module, output is not None)

    @_untraced
    def run_end(self, module: nn.Module, succeeded: bool) -> None:
        """What `end` does, in a graph too."""
        block = current_block(self.key)
        if block is None or block.session is None:
            return
        session = block.session
        # always_call: this also runs after an exception, so that the failed call commits nothing
        session.end(module, succeeded=succeeded, keep_graph=self.adapter.training)
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

    def _prompt_outside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


def has_memory(layer: nn.Module) -> bool:
    """Whether a memory is attached to `layer`, or to what is wrapped in it."""
    return any(isinstance(owner, MemoryHooks) for module in layer.modules() for owner in hook_owners(module))


def drop_copied_hooks(root: nn.Module) -> None:
    """Remove the hooks that came along when a host with a memory was copied or unpickled; no memory owns them."""
    owners = {owner for module in root.modules() for owner in hook_owners(module) if isinstance(owner, MemoryHooks)}
    for owner in owners:
        if owner.copied:
            for module in root.modules():
                drop_hooks_of(module, owner)
                unwrap(module, owner)

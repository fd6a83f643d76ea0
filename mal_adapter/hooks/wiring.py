"""The hooks of one memory: how a forward of the host finds its session, reads its memory and writes to it.

A forward inside a session goes: `begin` on the model; `prompt` on the module that receives ids and audio features,
where the audio positions are seen; `layer` on the hooked decoder layer, where the memory is read and the write
prepared; `end` on the model, which commits the write. Outside a session each returns at once.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mal_adapter.errors import (
    AudioMaskError,
    AudioOutsideSessionWarning,
    HostError,
    SessionError,
    SkippedWriteWarning,
)
from mal_adapter.hooks.batch import audio_rows, copies_per_prompt, users_mask
from mal_adapter.hooks.blocks import BLOCKS, current_block, entered
from mal_adapter.hooks.checkpointing import unwrap, wrap
from mal_adapter.hooks.forward import Forward
from mal_adapter.hooks.session import Session
from mal_adapter.hosts.audio_mask import bind_call, find_audio_mask, find_features, is_cached
from mal_adapter.hosts.host import Host
from mal_adapter.hosts.spec import HostSpec
from mal_adapter.memory.adapter import MemoryAdapter

__all__ = ["MemoryHooks", "drop_copied_hooks", "has_memory"]

_CHECKPOINTED = (
    "the hooked layer is inside a checkpointed region that runs it again in backward, when its memory is another one. "
    "Checkpoint the decoder layers one by one, with gradient_checkpointing_enable() or checkpoint_wrapper"
)

_HOOK_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _untraced(function: _Function, *, recursive: bool = True) -> _Function:
    """Exclude `function`, and its callees if `recursive`, from torch.compile. It would be compiled again for each
    session, mode and number of audio tokens."""
    untraced: _Function = torch.compiler.disable(function, recursive=recursive)  # type: ignore[no-untyped-call]
    return untraced


def _hook(function: _Function) -> _Function:
    """A hook first checks whether a block is open. What it does then is `_untraced` with all callees, which costs half
    a microsecond; the check alone costs nothing this way."""
    return _untraced(function, recursive=False)


class MemoryHooks:
    """The hooks of one memory. They can be pickled and hold no tensors of a session: the hooks of a copied or unpickled
    host belong to no session."""

    def __init__(self, adapter: MemoryAdapter, host: HostSpec) -> None:
        self.adapter = adapter
        self.host = host
        self.key = object()  # of this memory's blocks
        self.copied = False
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

    def register(self, host: Host, layer_idx: int) -> None:
        """Register all hooks on the host's model and on its decoder layer `layer_idx`."""
        root = host.model
        self._parent = root.get_submodule(host.layers_path.rpartition(".")[0])
        self.layers = host.layers
        self._layer_idx = layer_idx
        self._prompt_module = root.get_submodule(self.host.mask_module or "")
        # Someone may call the inner model alone, so its call begins and ends too; the outermost one counts.
        for module in dict.fromkeys((root, self._prompt_module, self._parent)):
            self._handles.append(module.register_forward_pre_hook(self.begin))
            self._handles.append(module.register_forward_hook(self.end, always_call=True))
        self._handles.append(self._prompt_module.register_forward_pre_hook(self.prompt, with_kwargs=True))
        self._hook_layer()

    def remove(self) -> None:
        """Take all hooks away, in reverse order."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []
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

    @_hook
    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward of a hooked module starts."""
        if self.key in BLOCKS.get():
            self._begin(module)

    @_untraced
    def _begin(self, module: nn.Module) -> None:
        if (session := self.session) is not None:
            session.begin(module)
            self._stay_outermost()

    @_hook
    def prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module that receives ids and audio features is called with these arguments."""
        if self.key in BLOCKS.get():
            self._prompt(module, args, kwargs)
        elif self._open or AudioOutsideSessionWarning not in self._warned:
            self._prompt_outside(module, args, kwargs)

    @_untraced
    def _prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block = current_block(self.key)
        if block is None:  # this context still has a block that was left in another one
            self._prompt_outside(module, args, kwargs)
            return
        session = block.session
        if session is None:
            return
        arguments = bind_call(module, args, kwargs)
        if session.forward is None:
            if block.left and self._carries_audio(module, arguments, [session]):
                raise SessionError(
                    f"the block of session {list(session.ids)} was left before this forward began; wait for it inside "
                    "the block, open a block around it, or run it under memory.disabled()"
                )
            return
        ids, features = arguments.get("input_ids"), find_features(self.host, arguments)
        if session.audio_mask is None:
            mask = find_audio_mask(self.host, module, arguments)
            # Some hosts hand the features to decode steps too, and a generated token may be any id but the placeholder.
            if mask is None or not mask.any():
                return
            session.forward.see_audio(mask)
        else:
            detects = self.host.audio_token_id is not None or self.host.find_mask is not None
            session.forward.see_text_only(features is None and ids is not None and detects)
        tokens = arguments.get("inputs_embeds") if ids is None else ids
        cached = self.host.audio_positions == "every" and is_cached(arguments)
        cache = arguments.get("past_key_values")
        session.see_prompt(tokens, features, audio_positions=self.host.audio_positions, cache=cache, cached=cached)

    def _carries_audio(self, module: nn.Module, arguments: dict[str, Any], sessions: Iterable[Session]) -> bool:
        """Whether a forward outside the blocks of these sessions has audio that may belong to one of them."""
        if _runs_backward():  # a checkpointed region, run again
            return False
        if find_features(self.host, arguments) is not None:
            mask = find_audio_mask(self.host, module, arguments)
            return mask is not None and bool(mask.any())
        if self.host.audio_token_id is not None or self.host.find_mask is not None:
            return False
        # Only a session's own mask says where audio is: any prompt may have some, a decode step has none.
        tokens = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        return tokens is not None and tokens.shape[1] > 1 and any(s.audio_mask is not None for s in sessions)

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

    @_hook
    def layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hooked layer returned `output`. Returns it with the memory's residual, or None to leave it as it is."""
        if self.key in BLOCKS.get() or self._unrecorded:
            return self._layer_output(output)
        return None

    @_untraced
    def _layer_output(self, output: Any) -> Any:
        block = current_block(self.key)
        session = None if block is None else block.session
        forward = None if session is None else session.forward
        if _runs_backward():
            if self._unrecorded:
                raise HostError(_CHECKPOINTED)
            return None
        if session is None or (forward is None and session.closed) or (forward is not None and forward.in_checkpoint):
            return None
        if forward is None or (session.audio_mask is None and self._prompt_module not in forward.entered):
            raise AudioMaskError(
                f"the hooked layer runs, but {type(self._prompt_module).__name__}, whose arguments say where audio "
                "is, was not called: call model(...) and not model.forward(...), with PEFT 0.21 or newer around it; or "
                "pass session(audio_mask=...), or work under memory.disabled()"
            )
        first = output[0] if isinstance(output, tuple) else output
        hidden = first if self.host.stream_idx is None else first[self.host.stream_idx]
        mask = self._users_mask(session, forward, hidden)
        if mask is None:
            return None
        if forward.records_grad:
            # Autograd that is off inside is a reentrant checkpoint, or a host that never trains. Backward shows which.
            self._unrecorded = not torch.is_grad_enabled()
            if _inside_checkpoint() or (self._unrecorded and self.adapter.training):
                raise HostError(_CHECKPOINTED)
        mask = mask.to(hidden.device)
        if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
            raise AudioMaskError(
                f"the audio mask is {tuple(mask.shape)}, the hidden states {tuple(hidden.shape)}: the host changed the "
                "sequence. Let the processor expand each clip to its placeholder tokens, or pass "
                "session(audio_mask=...)"
            )
        if self.adapter.norm.weight.device != hidden.device:
            self.adapter.to(hidden.device)
        session.claim(forward)
        with_memory = self._read_and_write(session, forward, *audio_rows(hidden, mask))
        # Only audio positions are touched; everything else keeps its bits.
        changed = hidden.masked_scatter(mask[..., None], with_memory)
        if self.host.stream_idx is not None:
            changed = first.select_scatter(changed, 0, self.host.stream_idx)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _users_mask(self, session: Session, forward: Forward, hidden: Tensor) -> Tensor | None:
        if session.audio_mask is None:
            return forward.mask
        return users_mask(session.audio_mask, hidden, repeated=forward.repeated, text_only=forward.text_only)

    def _read_and_write(self, session: Session, forward: Forward, rows: Tensor, valid: Tensor) -> Tensor:
        """The hidden states at audio positions with the memory's residual, (audio tokens of all rows, hidden_size).
        Prepares the write."""
        prompts, streaming = len(session.ids), self.host.audio_positions == "every"
        if streaming and len(rows) != prompts:
            raise SessionError(
                f"the batch has {len(rows)} rows for {prompts} session ids. This host takes audio while it answers, so "
                "beams and several return sequences get different utterances; generate one sequence per prompt"
            )
        tokens = None if forward.prompt is None or forward.repeated else forward.prompt.tokens
        copies = copies_per_prompt(rows, valid, prompts, features=forward.features, tokens=tokens)
        prompt_of_row = torch.arange(prompts, device=rows.device).repeat_interleave(copies)
        new = rows.shape[1]
        rows, valid = forward.whole_utterance(rows, valid)
        if streaming:
            forward.may_continue(rows if self.adapter.training else rows.detach(), valid)
        state = forward.state.to(rows.device)
        read_from = state if copies == 1 else state.rows(prompt_of_row)
        understood = rows + self.adapter.read(read_from, rows, valid, causal=streaming)
        if session.write and not forward.repeated:
            # What is written is the utterance as the memory made it understood, so that the next one builds on it.
            forward.prepare_write(self.adapter.write(state, understood[::copies], valid[::copies], causal=streaming))
        return understood[:, -new:][valid[:, -new:]]

    @_hook
    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward of a hooked module ended; `output` is None if it raised."""
        if self.key in BLOCKS.get():
            self._end(module, output)

    @_untraced
    def _end(self, module: nn.Module, output: Any) -> None:
        block = current_block(self.key)
        if block is None or block.session is None:
            return
        session = block.session
        # always_call: after an exception this runs with output None, so that the failed call commits nothing
        skipped = session.end(module, succeeded=output is not None, keep_graph=self.adapter.training)
        if skipped and SkippedWriteWarning not in self._warned:
            self._warned.add(SkippedWriteWarning)
            warnings.warn(
                "an utterance's write was not finite and did not land; the session's memory is as before, see "
                "MemoryState.skipped_writes (warned once)",
                SkippedWriteWarning,
                stacklevel=2,
            )

    @_untraced
    def _prompt_outside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments, sessions = bind_call(module, args, kwargs), list(self._open)
        if sessions and self._carries_audio(module, arguments, sessions):
            raise SessionError(
                f"audio passed outside any block while sessions {_listed(sessions)} are open in other threads or "
                "contexts, so it is unclear whose it is. Open the block where the forward runs; or hand the context "
                "on: asyncio.to_thread(...), pool.submit(contextvars.copy_context().run, ...), an `async def` "
                "dependency of FastAPI; or say by memory.disabled() that this forward has no memory"
            )
        if AudioOutsideSessionWarning not in self._warned and find_features(self.host, arguments) is not None:
            self._warned.add(AudioOutsideSessionWarning)
            warnings.warn(
                "audio passed outside a session, so the memory neither reads nor writes; use "
                "`with memory.session(id):`, or `with memory.disabled():` if this is intended (warned once)",
                AudioOutsideSessionWarning,
                stacklevel=2,
            )


def _listed(sessions: Sequence[Session]) -> str:
    """Some of the ids of open sessions; a server may have thousands."""
    ids = [i for session in sessions[:3] for i in session.ids[:3]]
    return f"{ids}" if sum(len(s.ids) for s in sessions) <= len(ids) else f"{ids} and others"


def _runs_backward() -> bool:
    """Whether a backward runs this forward again, for a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _inside_checkpoint() -> bool:
    """Whether a torch.utils.checkpoint that is not reentrant records the current forward, known by the hook it packs
    saved tensors with."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch before 2.8
    hooks = None if top is None else top(True)
    return hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", "")


def has_memory(layer: nn.Module) -> bool:
    """Whether a memory is attached to `layer`, or to what is wrapped in it."""
    hooks = (hook for module in layer.modules() for hook in module._forward_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), MemoryHooks) for hook in hooks)


def drop_copied_hooks(root: nn.Module) -> None:
    """Remove the hooks that came along when a host with a memory was copied or unpickled; no memory owns them."""
    copied = set()
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in tuple(hooks.items()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, MemoryHooks) and owner.copied:
                    copied.add(owner)
                    # Options are kept by the hook's number, which the next hook of another process has again.
                    for numbered in (hooks, *(getattr(module, name) for name in _HOOK_OPTIONS)):
                        numbered.pop(key, None)
    for module in root.modules() if copied else ():
        for owner in copied:
            unwrap(module, owner)

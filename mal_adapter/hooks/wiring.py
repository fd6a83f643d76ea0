"""The hooks of one memory: how a forward of the host finds its session, reads its memory and writes to it.

A forward inside a session goes: `begin` on the model; `prompt` on the module that receives ids and audio features,
where the audio positions are seen; `layer` on the hooked decoder layer, where the memory is read and the write
prepared; `end` on the model, which commits the write. Outside a session each returns at once.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from mal_adapter.errors import AudioOutsideSessionWarning
from mal_adapter.hooks.blocks import BLOCKS
from mal_adapter.hooks.checkpointing import unwrap, wrap
from mal_adapter.hooks.compiled import TracedHooks
from mal_adapter.hooks.running import RunningHooks, untraced
from mal_adapter.hooks.torch_internals import drop_hooks_of, hook_owners, no_graph_of_its_own
from mal_adapter.hosts.host import Host
from mal_adapter.hosts.spec import HostSpec

__all__ = ["MemoryHooks", "drop_copied_hooks", "has_memory"]


class MemoryHooks(RunningHooks):
    """The hooks of one memory. They can be pickled and hold no tensors of a session: the hooks of a copied or unpickled
    host belong to no session."""

    def __init__(self, host: HostSpec) -> None:
        super().__init__(host)
        self.copied = False
        self._traced = TracedHooks(host)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._moving = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"host": self.host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["host"])  # type: ignore[misc]
        self.copied = True

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

    @untraced
    def run_begin(self, module: nn.Module) -> None:
        """A forward of a hooked module starts. The hooks stay where they belong."""
        super().run_begin(module)
        if self.session is not None:
            self._stay_outermost()

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

    @no_graph_of_its_own
    def prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module that receives ids and audio features is called with these arguments."""
        if is_compiling():
            if not (self._traced.active() and self._traced.prompt(args, kwargs)):
                self.run_prompt(module, args, kwargs)
        elif self.key in BLOCKS.get():
            self.run_prompt(module, args, kwargs)
        elif self._open or AudioOutsideSessionWarning not in self._warned:
            self.see_outside(module, args, kwargs)

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

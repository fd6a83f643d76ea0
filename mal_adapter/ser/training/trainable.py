"""The trained parameters of a host with a memory: the adapter, and optionally a LoRA. The rest is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["Trainable"]


class Trainable:
    """The adapter of a memory and, with `lora_rank`, a LoRA on all linear layers of the host's decoder.

    What is mutated: With `lora_rank` the host gets PEFT's layers, whose output is unchanged until they are trained.

    Args:
        model: The host; its own weights get no gradients within `frozen`.
        memory: Attached to the host.
        lora_rank: None for no LoRA.
        gradient_checkpointing: Recompute the decoder layers in backward.

    Attributes:
        parameters: Name -> parameter, `adapter.…` and `lora.…`.
    """

    def __init__(
        self, model: Any, memory: AttachedMemory, lora_rank: int | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        self._model = model
        self._memory = memory
        self._checkpointing = gradient_checkpointing
        self._layers = memory.decoder_layers
        self._peft: Any = None
        lora: dict[str, nn.Parameter] = {}
        if lora_rank is not None:
            import peft

            inside = {id(module) for module in self._layers.modules() if isinstance(module, nn.Linear)}
            names = [name for name, module in model.named_modules() if id(module) in inside]
            config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=names)
            self._peft = peft.get_peft_model(model, config)
            model.eval()  # PEFT's layers start in training mode
            lora = {f"lora.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        adapter = {f"adapter.{name}": p for name, p in memory.adapter.named_parameters()}
        self.parameters: dict[str, nn.Parameter] = adapter | lora
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this block only `parameters` get gradients. At its end host and adapter are in eval mode."""
        own = set(self.parameters.values())
        others = [p for p in self._model.parameters() if p.requires_grad and p not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        if self._checkpointing:
            # Reentrant checkpoints need inputs that require gradients; a frozen host has none.
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            self.train(False)
            if self._checkpointing:
                self._model.gradient_checkpointing_disable()
            for parameter in others:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> None:
        """Set the mode of the adapter. The host stays in eval mode, so its dropout is off."""
        self._memory.train(mode)
        for layer in self._layers if self._checkpointing else ():
            # transformers checkpoints a layer whose own `training` is True; its children, dropout included, keep eval.
            layer.training = mode

    def copy_values(self) -> dict[str, Tensor]:
        """Copy the present values of the parameters to the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_values(self, values: dict[str, Tensor]) -> None:
        """Set the parameters, in place."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save_lora(self, folder: Path) -> None:
        """Save the LoRA, if there is one, in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it."""
        if self._peft is not None:
            self._peft.save_pretrained(str(folder), save_embedding_layers=False)

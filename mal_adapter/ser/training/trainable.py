"""What of a host and its memory is trained: the adapter, and a LoRA beside it; the rest stays frozen."""

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

    What is mutated: the host gets PEFT's layers where there is a `lora_rank`, which answer as before until trained.

    Args:
        model: the host; its own weights get no gradients within `frozen`.
        memory: attached to it.
        lora_rank: None for no LoRA.
        gradient_checkpointing: recompute the decoder layers in backward.

    Attributes:
        parameters: name -> parameter, `adapter.…` and `lora.…`.
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
            model.eval()  # PEFT's layers begin in training mode
            lora = {f"lora.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        adapter = {f"adapter.{name}": p for name, p in memory.adapter.named_parameters()}
        self.parameters: dict[str, nn.Parameter] = adapter | lora
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this block nothing but `parameters` gets gradients. Ends with host and adapter in eval mode."""
        own = set(self.parameters.values())
        asked = [p for p in self._model.parameters() if p.requires_grad and p not in own]
        for parameter in asked:
            parameter.requires_grad_(False)
        if self._checkpointing:
            # Reentrant checkpoints would want inputs that require gradients, which a frozen host has none of.
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            self.train(False)
            if self._checkpointing:
                self._model.gradient_checkpointing_disable()
            for parameter in asked:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> None:
        """The adapter in training mode, the host in eval mode: its dropout stays off."""
        self._memory.train(mode)
        for layer in self._layers if self._checkpointing else ():
            # transformers checkpoints a layer whose own flag says training; its children's, dropout included, stay.
            layer.training = mode

    def values(self) -> dict[str, Tensor]:
        """A copy of the parameters as they are, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Sets the parameters, in place."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save_lora(self, folder: Path) -> None:
        """Writes the LoRA as PEFT does, to be loaded by `PeftModel.from_pretrained(model, folder)`; nothing without."""
        if self._peft is not None:
            self._peft.save_pretrained(str(folder), save_embedding_layers=False)

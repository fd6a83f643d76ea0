"""Cached activations on the device that trains, as many as fit there; the others come from disk at each use."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from mal_adapter.memory.transfer import to_device

__all__ = ["DeviceRows", "free_bytes"]

_SHARE = 4
"""A quarter of the device's free memory may be taken; the rest is for the forward and its gradients."""


class DeviceRows:
    """The tensors of utterances on a device. What was there once stays there while the budget lasts.

    Args:
        device: Where to put them.
        budget: How many bytes may stay there.

    Example:
        >>> rows = DeviceRows(torch.device("cpu"), budget=100)
        >>> rows.get("a", lambda: {"hidden": torch.ones(2, 2)})["hidden"].sum().item(), rows.nbytes
        (4.0, 16)
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self._device, self._budget = device, budget
        self._rows: dict[Hashable, dict[str, Tensor]] = {}
        self.nbytes = 0

    def get(self, key: Hashable, load: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of one utterance.

        Args:
            key: Identifies it.
            load: Reads its tensors, called unless they are on the device.
        """
        if key not in self._rows:
            tensors = {name: to_device(tensor, self._device) for name, tensor in load().items()}
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            if self.nbytes + nbytes > self._budget:
                return tensors
            self._rows[key] = tensors
            self.nbytes += nbytes
        return self._rows[key]

    def forget(self, key: Hashable) -> None:
        """Free the memory of one utterance."""
        self.nbytes -= sum(tensor.nbytes for tensor in self._rows.pop(key, {}).values())


def free_bytes(device: torch.device) -> int:
    """How much of a GPU's memory cached activations may take. On other devices none: there the files are in memory
    anyway, in the system's cache."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) // _SHARE

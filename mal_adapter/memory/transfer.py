"""Copies from the host to a device that nobody waits for."""

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host's tensor on `device`. On CUDA it goes through pinned memory: a copy from other memory may wait
    until the device has done all its work.

    Example:
        >>> to_device(torch.tensor([1, 2]), torch.device("cpu"))
        tensor([1, 2])
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

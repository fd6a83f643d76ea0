"""The widest float of a device, and full precision under autocast."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "wide_tensor", "widen"]


def widen(tensor: Tensor) -> Tensor:
    """Convert `tensor` to float64, or to float32 on a device without float64, such as Apple's GPUs and Intel's Arc.

    The conversion to float64 is simply tried. This costs nothing where it works, and needs no list of devices.

    Example:
        >>> widen(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float64
    """
    return _try_float64(lambda dtype: tensor.to(dtype))


def wide_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    """Make a tensor of `values` on `device`, in float64 if the device has it, otherwise in float32.

    Example:
        >>> wide_tensor([0.1], torch.device("cpu")).item()
        0.1
    """
    return _try_float64(lambda dtype: torch.tensor(values, dtype=dtype, device=device))


def _try_float64(make: Callable[[torch.dtype], Tensor]) -> Tensor:
    try:
        return make(torch.float64)
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # MPS raises TypeError, XPU and other backends RuntimeError
        return make(torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off, or GEMMs with a float32 state would run in half precision."""
    available: Callable[[str], bool] = torch.amp.is_autocast_available  # some devices have no autocast
    inside = available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if inside else nullcontext()

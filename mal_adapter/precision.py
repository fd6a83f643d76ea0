"""Which float a device can compute with, beyond the state's own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "wide_tensor", "widen"]


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in float64, or in float32 on a device that has no float64, such as Apple's GPUs and Intel's Arc.

    The device is not asked what it has, but given the conversion to do: it costs nothing where it works, and there is
    no list of devices to keep.

    Example:
        >>> widen(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float64
    """
    return _try_float64(lambda dtype: tensor.to(dtype))


def wide_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    """`values` as a tensor on `device`, in float64 where it has that, else in float32.

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
    except (TypeError, RuntimeError):  # MPS raises the one, XPU and other backends the other
        return make(torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Under autocast a state in float32 would meet GEMMs in half precision."""
    available: Callable[[str], bool] = torch.amp.is_autocast_available  # some devices have no autocast to ask about
    inside = available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if inside else nullcontext()

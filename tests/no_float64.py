"""A device without float64, played on the CPU: any operation that makes a float64 tensor raises, as on Apple's GPUs."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MPS_ERROR", "XPU_ERROR", "NoFloat64"]

MPS_ERROR = TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
XPU_ERROR = RuntimeError("Required aspect fp64 is not supported on the device")


class NoFloat64(TorchDispatchMode):
    """Within this block there is no float64. `operations` has the names of all that ran, such as "addcmul.out", each
    with the most dimensions of its first tensor.

    with NoFloat64() as device:
        adapter.write(state, hidden_states)
    """

    def __init__(self, error: Exception = MPS_ERROR) -> None:
        super().__init__()
        self.error = error
        self.operations: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(output)):
            raise self.error
        name = str(func).removeprefix("aten.").removesuffix(".default")
        dimensions = args[0].dim() if args and isinstance(args[0], torch.Tensor) else 0
        self.operations[name] = max(dimensions, self.operations.get(name, 0))
        return output

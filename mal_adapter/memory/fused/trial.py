"""A first run of the kernels for some sizes, so that a failure to compile is found before an utterance needs them.

Triton compiles at the first launch, for seconds. It may fail there: a device may have less shared memory than a kernel
takes. Then PyTorch's code is used, which every device runs.
"""

import logging
import time

import torch

from mal_adapter.memory.fused.support import Sizes

__all__ = ["failure", "run_once"]

_log = logging.getLogger("mal_adapter")
_results: dict[tuple[Sizes, bool], str | None] = {}


def failure(sizes: Sizes, training: bool) -> str | None:
    """Why the kernels don't run on this device, in words, or None if they do. The first call runs them.

    Args:
        sizes: Sizes that `obstacle` lets pass.
        training: Whether the derivatives have to run as well.
    """
    key = (sizes, training)
    if key not in _results:
        # Neither a traced nor a captured forward may run anything else; `attach_memory` has run the kernels before.
        captured = sizes.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if captured or torch.compiler.is_compiling():
            return None
        start = time.perf_counter()
        try:
            run_once(sizes, training)
            _results[key] = None
        except Exception as error:  # of Triton, ptxas or the driver: they have no class in common
            reason = " ".join(str(error).split())[:200]
            _results[key] = f"the kernels don't run here, {type(error).__name__}: {reason}"
            _log.warning("The memory is computed by PyTorch: %s", _results[key])
        _log.debug("First run of the kernels for %s: %.1f s", sizes, time.perf_counter() - start)
    return _results[key]


def run_once(sizes: Sizes, training: bool) -> None:
    """Read one token and keep the state, or write one. A read has no chunks, so `sizes.chunk_size` is None for it."""
    from mal_adapter.memory.fused.commit_kernels import keep_finite
    from mal_adapter.memory.fused.ops import titans_read, titans_write

    d = sizes.layers[0][0]
    with torch.inference_mode(False), torch.set_grad_enabled(training):
        initial = [torch.zeros(1, *s, device=sizes.device, requires_grad=training) for s in sizes.layers]
        weights, momentum = ([torch.zeros(1, 1, *s, device=sizes.device) for s in sizes.layers] for _ in range(2))
        vectors = torch.zeros(1, 1, d, device=sizes.device, dtype=sizes.vectors)
        offsets = torch.tensor([0, 1], dtype=torch.int32, device=sizes.device)
        if sizes.chunk_size is None:
            out = [titans_read(initial, weights, vectors, offsets, 1, normalize) for normalize in (True, False)]
            counters = torch.zeros(3, 1, dtype=torch.int64, device=sizes.device)
            keep_finite((*weights, *momentum), (*weights, *momentum), tuple(counters), offsets, None)
        else:
            gates = torch.zeros(3, 1, 1, device=sizes.device, dtype=sizes.vectors)
            rows = (offsets, None, sizes.chunk_size, 1)
            out = titans_write(initial, weights, momentum, vectors, vectors, *gates, *rows, training)
            out = out[: 2 * len(initial)]
        if training:
            torch.autograd.grad([t.sum() for t in out], initial)
    if sizes.device.type == "cuda":
        torch.cuda.synchronize(sizes.device)

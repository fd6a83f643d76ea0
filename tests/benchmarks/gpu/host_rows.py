"""The memory in the host: what a prefill, an answer and a decode step cost more, and what waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from statistics import median

import torch
from torch import Tensor, nn

from tests.benchmarks.gpu.clock import within_library
from tests.benchmarks.gpu.figures import Figure, more_than
from tests.benchmarks.gpu.library import fused_kernels
from tests.benchmarks.gpu.world import Budget, World

__all__ = ["Waits", "attaching", "decode", "forward_launches", "prefill", "waits"]

BEFORE = {1: ("19 %", "23 %"), 8: ("4.0 %", ""), 32: ("1.9 %", "")}
TARGETS = {1: 1.0, 8: 0.5, 32: 0.4}


def attaching(world: World, budget: Budget) -> Iterator[Figure]:
    """The host's size, and what attach_memory takes: with kernels that are compiled at that time."""
    parameters = sum(p.numel() for p in world.bare.parameters())
    kernels = fused_kernels()
    config, device = world.memory.adapter.config, world.clock.device
    path = "there are none" if kernels is None else kernels.path(config, device)
    size = f"{parameters / 1e9:.1f} B parameters, {str(world.scale.dtype)[6:]}"
    yield Figure("attach_memory", size, world.attach_s or 0.0, "s", note=f"fused kernels: {path}")


def prefill(world: World, budget: Budget) -> Iterator[Figure]:
    """A forward of the prompt: bare, within an open session, and with opening and closing the session."""
    for batch in world.scale.prefill:
        budget.check(f"batch {batch}")
        inputs, session = world.inputs(batch), world.session(batch)

        def opened(inputs=inputs, session=session) -> None:  # type: ignore[no-untyped-def]
            with session():
                world.host(**inputs)

        with torch.inference_mode():
            bare, within, around = world.clock.interleaved(
                lambda inputs=inputs: world.bare(**inputs),
                lambda inputs=inputs: world.host(**inputs),
                opened,
                seconds=world.seconds({1: 6, 8: 10}.get(batch, 18), budget),
                around=(nullcontext, session, nullcontext),
            )
        size = (
            f"batch {batch}, {world.scale.audio_tokens} of {world.scale.audio_tokens + world.scale.text_tokens} tokens"
        )
        numbers = {"bare_ms": bare, "with_memory_ms": within, "with_session_ms": around}
        before = BEFORE.get(batch, ("", ""))
        note = f"bare {median(bare):.4g} ms, {len(bare)} rounds"
        target = TARGETS.get(batch)
        name = "prefill with memory, more than bare"
        yield Figure(name, size, more_than(within, bare), "%", before[0], target, note=note, numbers=numbers)
        yield Figure("… with opening and closing the session", size, more_than(around, bare), "%", before[1], note=note)


def decode(world: World, budget: Budget) -> Iterator[Figure]:
    """generate() of five tokens, and one decode step on a filled cache."""
    before = {1: "4.5 %", 8: "3.0 %"}
    options = {"max_new_tokens": 5, "do_sample": False}
    for batch in world.scale.generate:
        budget.check(f"generate, batch {batch}")
        inputs, session = world.inputs(batch), world.session(batch)
        with torch.inference_mode():
            bare, ours = world.clock.interleaved(
                lambda inputs=inputs: world.bare.generate(**inputs, **options),
                lambda inputs=inputs: world.host.generate(**inputs, **options),
                seconds=world.seconds(6, budget),
                around=(nullcontext, session),
            )
        numbers = {"bare_ms": bare, "with_memory_ms": ours}
        note = f"bare {median(bare):.4g} ms"
        name = "generate 5 tokens, more than bare"
        yield Figure(
            name, f"batch {batch}", more_than(ours, bare), "%", before.get(batch, ""), None, "≤", note, numbers
        )
    budget.check("decode step")
    inputs = world.inputs(1)
    token = inputs["input_ids"][:, :1]
    with torch.inference_mode(), world.session(1)():
        caches = [model(**inputs, use_cache=True).past_key_values for model in (world.bare, world.host)]

        # Each step fills its cache, and both grow alike.
        bare, ours = world.clock.interleaved(
            lambda: world.bare(input_ids=token, past_key_values=caches[0], use_cache=True),
            lambda: world.host(input_ids=token, past_key_values=caches[1], use_cache=True),
            seconds=world.seconds(4, budget),
        )
    cost = 1000 * (median(ours) - median(bare))
    numbers = {"bare_ms": bare, "with_memory_ms": ours}
    yield Figure("decode step in a session, more than bare", "batch 1", cost, "µs", numbers=numbers)


def waits(world: World, budget: Budget) -> Iterator[Figure]:
    """What of this library waits for the device in a forward, behind the prompt hook and in all."""
    for batch in (batch for batch in world.scale.prefill if batch <= 8):
        budget.check(f"batch {batch}")
        inputs = world.inputs(batch)
        prompt_module = world.host.get_submodule(world.memory.host.mask_module or "")

        def forward(inputs=inputs) -> None:  # type: ignore[no-untyped-def]
            world.host(**inputs)

        # Not in inference mode, where an operation that is made of others is seen instead of those.
        with torch.no_grad(), world.session(batch)():
            forward()  # compiles what is compiled
            with Waits() as mode:
                behind, all_of_it = _split(prompt_module, forward, mode.places)
            with world.clock.seen_waits() as seen:
                seen_behind = None if seen is None else _split(prompt_module, forward, seen)[0]
        name = "host-device waits of ours per forward, behind the prompt hook"
        note = "; ".join(behind) or f"before it: {len(all_of_it) - len(behind)}"
        numbers = {"places": behind, "with_the_prompt_hook": all_of_it}
        yield Figure(f"{name}, by dispatch", f"batch {batch}", len(behind), "", "4", 0, note=note, numbers=numbers)
        if seen_behind is not None:
            note, numbers = "; ".join(seen_behind), {"places": seen_behind}
            size = f"batch {batch}"
            yield Figure(
                f"{name}, by CUDA's debug mode", size, len(seen_behind), "", "4", 0, note=note, numbers=numbers
            )


def forward_launches(world: World) -> Iterator[Figure]:
    """What a forward with a memory makes the device do, more than a bare one; by the profiler."""
    inputs = world.inputs(1)
    with torch.inference_mode(), world.session(1)():
        ours, bare = (world.clock.profile(lambda m=m: m(**inputs)) for m in (world.host, world.bare))
    numbers = {"ours": ours._asdict(), "bare": bare._asdict()}
    launches, note = ours.launches - bare.launches, f"{ours.launches} and {bare.launches}"
    if ours.busy_ms is not None and bare.busy_ms is not None:
        note += f"; {1000 * (ours.busy_ms - bare.busy_ms):.0f} µs of the device"
    yield Figure("launches per forward, more than bare", "batch 1", launches, "", note=note, numbers=numbers)
    if ours.stream_waits is not None and bare.stream_waits is not None:
        more, note = ours.stream_waits - bare.stream_waits, "those of the prompt hook are among them"
        yield Figure("cudaStreamSynchronize per forward, more than bare", "batch 1", more, "", note=note)


def _split(module: nn.Module, forward: Callable[[], None], places: list[str]) -> tuple[list[str], list[str]]:
    """What a forward adds to `places`: behind the prompt hook, and in all."""
    del places[:]
    ended: list[int] = []
    # Registered last, so it runs right behind the memory's own hooks of the prompt.
    handle = module.register_forward_pre_hook(lambda *_: ended.append(len(places)))
    try:
        forward()
    finally:
        handle.remove()
    return places[ended[0] :], list(places)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the places in this library whose operations make the host wait for the device, on any device.

    Example:
        >>> with Waits() as mode:                         # a doctest is no place in this library
        ...     _ = torch.ones(3).sum().item()
        >>> mode.places, Waits.is_wait(torch.ops.aten.nonzero.default, (torch.ones(3),), {})
        ([], True)
    """

    # Their results, or the sizes of these, are numbers on the host.
    _READS = frozenset(
        f"aten.{name}"
        for name in (
            "_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique", "_unique2",
            "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount",
        )
    )  # fmt: skip
    _BOOL_INDEX = frozenset(("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"))

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    @classmethod
    def is_wait(cls, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether this call waits, or would on a GPU."""
        name = str(func.overloadpacket)
        if name in cls._BOOL_INDEX:
            indices = args[1]
            assert isinstance(indices, list | tuple)
            # An index_put of one value is a masked fill.
            fills = name != "aten.index" and isinstance(args[2], Tensor) and args[2].numel() == 1
            return not fills and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name == "aten.repeat_interleave":
            return func._overloadname != "self_int" and kwargs.get("output_size") is None
        if name in ("aten._to_copy", "aten.copy_"):
            return _blocking_copy(name, args, kwargs)
        return name in cls._READS

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if self.is_wait(func, args, kwargs) and (place := within_library()) is not None:
            self.places.append(place)
        return func(*args, **kwargs)


def _blocking_copy(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether numbers go from one device to another while the host waits."""
    if name == "aten.copy_":
        there, here = args[0], args[1]
        assert isinstance(there, Tensor)
        assert isinstance(here, Tensor)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return there.device.type != here.device.type and not non_blocking
    given, device = args[0], kwargs.get("device")
    assert isinstance(given, Tensor)
    if device is None or torch.device(device).type == given.device.type:  # type: ignore[arg-type]
        return False
    return not kwargs.get("non_blocking", False)

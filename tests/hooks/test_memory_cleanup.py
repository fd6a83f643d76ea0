"""What is detached or dropped is freed: by weak reference, by count of living tensors, by the bytes Python holds."""

import copy
import gc
import itertools
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mal_adapter
from mal_adapter import AttachedMemory, attach_memory
from tests.hosts.builders import HOSTS, TinyHost
from tests.hosts.probes import random_adapter

HOST = HOSTS["qwen2_audio"]
SLACK_BYTES = 150


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return HOST.build(num_layers=3)


@pytest.fixture
def memory(model: PreTrainedModel) -> Iterator[AttachedMemory]:
    with attach_memory(model, layer_idx=1, adapter=random_adapter()) as memory:
        yield memory


def speak(model: PreTrainedModel, host: TinyHost = HOST) -> None:
    inputs, _ = host.make_inputs(model, [[4]])
    with torch.no_grad():
        model(**inputs)


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def grown_bytes_per_call(action: Callable[[], None], calls: int = 10) -> float:
    """How much more Python holds after each further call of `action`, of what lines of this library allocated: the
    least of several rounds, since the interpreter's and torch's own free lists fill in some and a leak shows in all.
    A kept session costs over a thousand bytes."""
    ours = tracemalloc.Filter(True, str(Path(mal_adapter.__file__).parent / "*"))
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(5):
            for _ in range(calls):
                action()
            gc.collect()
            sizes.append(sum(t.size for t in tracemalloc.take_snapshot().filter_traces([ours]).traces))
    finally:
        tracemalloc.stop()
    return min(after - before for before, after in itertools.pairwise(sizes)) / calls


def test_attaching_and_detaching_leaves_nothing(model: PreTrainedModel):
    adapter = random_adapter()

    def attach_and_detach() -> None:
        with attach_memory(model, layer_idx=1, adapter=adapter) as memory, memory.session("call"):
            speak(model)

    attach_and_detach()
    tensors = living_tensors()
    assert grown_bytes_per_call(attach_and_detach) < SLACK_BYTES
    assert living_tensors() == tensors


def test_a_dropped_session_is_freed(model: PreTrainedModel, memory: AttachedMemory):
    with memory.session("call") as session:
        speak(model)
    state = memory.states["call"]
    references = [weakref.ref(session), *map(weakref.ref, (*state.weights, *state.momentum))]
    del memory.states["call"], session, state
    gc.collect()
    assert not any(reference() is not None for reference in references)


@pytest.mark.parametrize("named", [True, False], ids=["dropped", "anonymous"])
def test_many_sessions_that_have_ended_cost_what_one_costs(model: PreTrainedModel, memory: AttachedMemory, named: bool):
    count = 0

    def dialogue() -> None:
        nonlocal count
        count += 1
        name = f"call {count}" if named else None
        with memory.session(name):
            speak(model)
        if named:
            del memory.states[name]

    dialogue()
    tensors = living_tensors()
    assert grown_bytes_per_call(dialogue) < SLACK_BYTES
    assert living_tensors() == tensors


def test_a_long_dialogue_costs_what_a_short_one_costs(model: PreTrainedModel, memory: AttachedMemory):
    with memory.session("call"):
        speak(model)
        tensors = living_tensors()
        assert grown_bytes_per_call(lambda: speak(model)) < SLACK_BYTES
        assert living_tensors() == tensors


def test_a_failed_forward_leaves_nothing(model: PreTrainedModel, memory: AttachedMemory):
    def fail(*_) -> None:
        raise ZeroDivisionError

    def failing() -> None:
        handle = HOST.layers(model)[2].register_forward_hook(fail)
        with memory.session("call"), pytest.raises(ZeroDivisionError):
            speak(model)
        handle.remove()

    failing()
    tensors = living_tensors()
    assert grown_bytes_per_call(failing) < SLACK_BYTES
    assert living_tensors() == tensors
    assert "call" not in memory.states


def test_a_host_and_its_memory_die_together(model: PreTrainedModel):
    """Hooks make a cycle of model and memory; neither keeps the other from the garbage collector."""
    twin = copy.deepcopy(model)
    memory = attach_memory(twin, layer_idx=1, adapter=random_adapter())
    with memory.session("call"):
        speak(twin)
    references = [weakref.ref(twin), weakref.ref(memory), weakref.ref(memory.adapter)]
    del twin, memory
    gc.collect()
    assert [reference() for reference in references] == [None] * 3

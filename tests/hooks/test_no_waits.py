"""Behind the prompt hook, the memory never waits for a number on the device.

What is known at the start of a forward is decided there. All later reads of a number would wait for half the host's
work. On a CPU nothing waits, so operations that would are counted: those that mal_adapter's own frames make.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import mal_adapter
from mal_adapter import AttachedMemory, attach_memory
from mal_adapter.errors import SkippedWriteWarning
from mal_adapter.hooks.inside import Inside
from mal_adapter.hooks.plan import Plan
from mal_adapter.hooks.session import Session
from mal_adapter.hooks.skipped import SkippedWrites, _Copy
from tests.hosts.builders import ADDITIVE_HOSTS, HOSTS, TinyHost
from tests.hosts.probes import random_adapter

PACKAGE = str(Path(mal_adapter.__file__).parent)
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "argwhere", "_unique2", "allclose"}
METHODS = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "to"}


class Waits:
    """The operations of mal_adapter that wait for a device: in the prompt hook, and behind it."""

    def __init__(self) -> None:
        self.in_prompt: list[str] = []
        self.behind: list[str] = []

    def note(self, name: str) -> None:
        codes = [frame.f_code for frame in _frames(sys._getframe(2))]
        if any(code.co_filename.startswith(PACKAGE) for code in codes):
            # By name: jaxtyping wraps all functions here, and all of its wrappers have the same code.
            in_prompt = any(code.co_name == Inside.see_call.__name__ for code in codes)
            (self.in_prompt if in_prompt else self.behind).append(name)

    @contextmanager
    def counted(self) -> Iterator["Waits"]:
        with _Dispatched(self), _Called(self):
            yield self


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in READS or by_mask or unsized:
            self.waits.note(name)
        return function(*args, **kwargs)


class _Called(TorchFunctionMode):
    """Methods that don't reach the dispatcher on a CPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        devices = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.device | str)]
        to_host = (
            name == "to" and any(torch.device(d).type == "cpu" for d in devices) and not kwargs.get("non_blocking")
        )
        same = to_host and args[0].device.type == "cpu" and _is_device_of_data(devices)
        if (name in METHODS and name != "to") or (to_host and not same):
            self.waits.note(name)
        return function(*args, **kwargs)


def _is_device_of_data(devices: list[Any]) -> bool:
    """`t.to(u.device)` moves to where the data is, be it a CPU; `t.to("cpu")` always goes to the host."""
    return all(isinstance(device, torch.device) for device in devices)


@pytest.fixture(autouse=True)
def _device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose copies have not arrived when a forward ends or the next one begins."""
    monkeypatch.setattr(_Copy, "arrived", lambda self: False)


@pytest.fixture
def host() -> TinyHost:
    return HOSTS["qwen2_audio"]


@pytest.fixture
def model(host: TinyHost) -> PreTrainedModel:
    return host.build(num_layers=3)


@pytest.fixture
def memory(model: PreTrainedModel) -> AttachedMemory:
    return attach_memory(model, 1, adapter=random_adapter())


def batch(host: TinyHost, model: PreTrainedModel, *clips: int) -> tuple[dict[str, Tensor], Tensor]:
    return host.collate(model, [host.prompt([count], seed=seed) for seed, count in enumerate(clips)], "left")


@pytest.mark.parametrize("clips", [(4,), (4, 4, 4), (7, 2, 5)], ids=["one", "equal", "ragged"])
@torch.no_grad()
def test_a_forward_reads_its_mask_once_and_then_nothing(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, clips: tuple[int, ...]
):
    inputs, _ = batch(host, model, *clips)
    ids = [f"row {row}" for row in range(len(clips))]
    with memory.session(ids):
        for _ in range(2):
            with Waits().counted() as waits:
                model(**inputs)
            assert waits.behind == []
            assert waits.in_prompt.count("cpu") == 1
    assert [int(memory.states[name].utterances) for name in ids] == [2] * len(ids)


def test_neither_does_a_forward_that_trains(host: TinyHost, model: PreTrainedModel, memory: AttachedMemory):
    inputs, _ = batch(host, model, 7, 2)
    model.requires_grad_(False)
    memory.train()
    with memory.session(["a", "b"]), Waits().counted() as waits:
        model(**inputs, use_cache=False)
        model(**inputs, use_cache=False).logits.square().mean().backward()
    assert waits.behind == []
    assert all(parameter.grad is not None for parameter in memory.parameters())


@torch.no_grad()
def test_decode_steps_read_nothing_at_all(host: TinyHost, model: PreTrainedModel, memory: AttachedMemory):
    inputs, _ = batch(host, model, 4, 6)
    with memory.session(["a", "b"]):
        with Waits().counted() as first:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        with Waits().counted() as waits:
            model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert waits.behind == []
    assert len(waits.in_prompt) == len(first.in_prompt) > 0


@torch.no_grad()
def test_beams_are_told_from_other_batches_at_the_start(host: TinyHost, model: PreTrainedModel, memory: AttachedMemory):
    inputs, _ = batch(host, model, 4, 6)
    with memory.session(["a", "b"]), Waits().counted() as waits:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    assert waits.behind == []
    assert waits.in_prompt.count("equal") == 2  # features and ids, of one forward
    assert [int(memory.states[name].tokens) for name in "ab"] == [4, 6]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@torch.no_grad()
def test_a_users_mask_is_read_once_per_block(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, options: dict[str, Any]
):
    inputs, mask = batch(host, model, 4, 6)
    with memory.session(["a", "b"], audio_mask=mask), Waits().counted() as waits:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        assert waits.behind == []
    assert waits.in_prompt.count("cpu") == 1
    assert [int(memory.states[name].tokens) for name in "ab"] == [8, 12]


@pytest.mark.parametrize("name", ADDITIVE_HOSTS)
@torch.no_grad()
def test_nor_does_a_streaming_host_wait_though_each_step_is_audio(name: str):
    host = ADDITIVE_HOSTS[name]
    model = host.build(num_layers=3)
    speech = host.speech(model, [5, 7])
    memory = attach_memory(model, 1, adapter=random_adapter())
    with memory.session(["a", "b"]), Waits().counted() as waits:
        model.generate(**speech, do_sample=False)
        assert waits.behind == []
    assert int(memory.states["b"].tokens) > 3


@torch.no_grad()
def test_only_beams_whose_copies_no_argument_shows_wait_for_the_hidden_states(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory
):
    """Ids and a user's mask say nothing of the sound, which another argument may bring."""
    inputs, mask = batch(host, model, 4)
    text = {name: inputs[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    with memory.session("a", audio_mask=mask), Waits().counted() as waits:
        model(**text)
        assert waits.behind == ["__bool__", "_local_scalar_dense"]


@torch.no_grad()
def test_copies_of_embeddings_are_known_at_the_start(host: TinyHost, model: PreTrainedModel, memory: AttachedMemory):
    inputs, mask = batch(host, model, 4)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with memory.session("a", audio_mask=mask), Waits().counted() as waits:
        model(inputs_embeds=embeds.repeat(2, 1, 1))
        assert waits.behind == []
    assert int(memory.states["a"].tokens) == 4


@torch.no_grad()
def test_the_count_sees_the_ways_in_which_the_memory_waited_before(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, monkeypatch: pytest.MonkeyPatch
):
    inputs, mask = batch(host, model, 4)

    def gather(plan: Plan, hidden: Tensor) -> Tensor:
        assert int(mask.sum(1).max()) == 4
        assert mask.any()
        return hidden[mask]

    monkeypatch.setattr(Plan, "gather", gather)
    with memory.session("a"), Waits().counted() as waits:
        model(**inputs)
        assert {"__int__", "__bool__", "index"} < set(waits.behind)
        before = len(waits.behind)
        monkeypatch.setattr(SkippedWrites, "note", lambda self, before, after: bool((after > before).any()))
        model(**inputs)
    assert waits.behind[before:].count("__bool__") == 2


# ------------------------------------------------------------------------------------------------------- skipped writes


def spoil(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"input_features": torch.full_like(inputs["input_features"], torch.nan)}


@contextmanager
def skips() -> Iterator[list[object]]:
    """The warnings of skipped writes so far."""
    found: list[object] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", SkippedWriteWarning)
        warnings.showwarning = lambda message, category, *_: (
            found.append(message) if category is SkippedWriteWarning else None
        )
        yield found


@torch.no_grad()
def test_a_skipped_write_is_warned_of_at_the_latest_when_the_block_is_left_and_once(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory
):
    inputs, _ = batch(host, model, 4)
    with skips() as found:
        with memory.session("a"):
            for turn in (inputs, spoil(inputs), inputs):
                model(**turn)
            assert len(found) == 0
        assert len(found) == 1
        with memory.session("a"):
            model(**spoil(inputs))
        assert len(found) == 1
    assert (int(memory.states["a"].skipped_writes), int(memory.states["a"].utterances)) == (2, 2)


@torch.no_grad()
def test_or_when_the_next_utterance_begins_and_the_device_has_counted(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, monkeypatch: pytest.MonkeyPatch
):
    inputs, _ = batch(host, model, 4)
    with skips() as found, memory.session("a"):
        model(**spoil(inputs))
        assert len(found) == 0
        monkeypatch.undo()
        model(**inputs)
        assert len(found) == 1


@torch.no_grad()
def test_one_dialogues_skipped_write_does_not_hide_behind_others_that_left(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory
):
    inputs, _ = batch(host, model, 4, 4)
    one, _ = batch(host, model, 4)
    with skips() as found:
        with memory.session(["a", "b"]) as session:
            model(**inputs)
            session.narrow(["b"])
            model(**spoil(one))
        assert len(found) == 1
    assert [int(memory.states[name].skipped_writes) for name in "ab"] == [0, 1]


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which tells of every wait")
@torch.no_grad()
def test_a_gpu_tells_of_no_wait(host: TinyHost, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    def strictly(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(owner, name, run)

    monkeypatch.undo()  # the device itself says whether it is busy
    for owner, name in ((Inside, "plan_of"), (Inside, "read_and_write"), (Session, "end"), (Session, "begin")):
        strictly(owner, name)
    model.cuda()
    memory = attach_memory(model, 1, adapter=random_adapter())
    inputs = {name: value.cuda() for name, value in batch(host, model, 7, 2)[0].items()}
    with memory.session(["a", "b"]):
        for _ in range(2):
            model(**inputs)
    assert int(memory.states["a"].utterances) == 2

"""`MemoryWorker`: vLLM's worker with a memory, for `--worker-cls mal_adapter.vllm.MemoryWorker`."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from mal_adapter.errors import HostError
from mal_adapter.extras import explain_missing
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.ensemble import load_adapter
from mal_adapter.stores.states import SessionStates
from mal_adapter.vllm.checks import check_engine, check_version, servable
from mal_adapter.vllm.config import SECTION, MemoryOptions
from mal_adapter.vllm.control import Control
from mal_adapter.vllm.layers import check_host, choose_layer, decoder_layers
from mal_adapter.vllm.memory import EngineMemory
from mal_adapter.vllm.op import OPS, add_memory, running
from mal_adapter.vllm.sessions import StepSessions

if TYPE_CHECKING:
    MemoryWorker: Any

__all__ = ["MemoryWorker", "WorkerMemory"]


class WorkerMemory:
    """What a worker with a memory does beside one of vLLM's workers, which follows in the order of base classes.

    Everything that can be wrong raises before the engine is ready. While it serves, nothing here raises.
    """

    vllm_config: Any
    model_runner: Any
    device: torch.device

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_version()
        self.options = MemoryOptions.read(vllm_config.additional_config)
        check_engine(vllm_config, self.options)
        self.adapter = servable(load_adapter(self.options.adapter)).requires_grad_(False)
        model = vllm_config.model_config
        width = self.adapter.config.hidden_size
        check_host(self.adapter.metadata, width, model.hf_config, model.hf_text_config)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and hook the adapter's layer."""
        _mark(self.vllm_config, self.adapter)
        super().load_model(**kwargs)  # type: ignore[misc]
        layer = choose_layer(decoder_layers(self.model_runner.get_model()), self.adapter.metadata)
        # Kept outside of the model's modules: reloading and sleeping walk through them.
        self.adapter.to(self.device)
        share, rank = _tensor_parallel()
        states = SessionStates(self.options.make_store(), self.adapter.check_state) if rank == 0 else None
        sessions = StepSessions(states, self.adapter.check_state, share)
        self.memory = EngineMemory(self.adapter, batch_order(self.model_runner), sessions)
        self.control = Control(self.memory)
        layer.register_forward_hook(add_memory)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """Run one step of the engine. Utterances are saved if it succeeds."""
        self.memory.begin(scheduler_output)
        succeeded = False
        try:
            with running(self.memory):
                output = super().execute_model(scheduler_output)  # type: ignore[misc]
            succeeded = True
            return output
        finally:
            self.memory.end(succeeded=succeeded)

    def mal_adapter(self, name: str, *args: Any) -> tuple[int, Any]:
        """For `collective_rpc`: what the session routes and `EngineSessions` call, see `Control`."""
        return self.control.call(name, *args)

    def shutdown(self) -> None:
        """Save what the store could not save before, and stop."""
        if hasattr(self, "control"):
            self.control.flush()
        super().shutdown()  # type: ignore[misc]


def batch_order(model_runner: Any) -> Callable[[], Sequence[str]]:
    """What returns the request ids in the order of the flat batch, while a forward runs.

    Raises:
        HostError: This version of vLLM keeps them elsewhere.
    """
    if hasattr(model_runner, "input_batch"):  # model runner V1 (0.32: v1/worker/gpu_model_runner.py)
        return lambda: list(model_runner.input_batch.req_ids)
    # V2 (0.32: v1/worker/gpu/model_runner.py, read and not run: it needs a GPU): the batch is a local variable of
    # execute_model, which hands it to the model state before each forward.
    model_state: Any = getattr(model_runner, "model_state", None)
    prepare = getattr(model_state, "prepare_inputs", None)
    if prepare is None:
        raise HostError(
            f"{type(model_runner).__name__} has neither an input_batch nor a model_state with prepare_inputs, which "
            "name the requests of a batch; this version of vLLM is not supported"
        )
    order: list[str] = []

    def prepare_inputs(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        order[:] = input_batch.req_ids
        return prepare(input_batch, *args, **kwargs)

    model_state.prepare_inputs = prepare_inputs
    return lambda: order


def _mark(config: Any, adapter: MemoryAdapter) -> None:
    """Let vLLM run the op between compiled parts, and keep compiled code of other layers apart from this one's."""
    split = config.compilation_config.splitting_ops
    if split is not None:
        split += [op for op in OPS if op not in split]
    # vLLM names its cache of compiled code by a hash of this, among others. A new dict: the user's may be used again.
    config.additional_config = {**config.additional_config, f"{SECTION}_layer_idx": adapter.metadata.layer_idx}


def _tensor_parallel() -> tuple[Callable[[object], object] | None, int]:
    """What gives every tensor-parallel rank the object of rank 0, None for a single rank; and this rank."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return None, 0
    return (lambda value: group.broadcast_object(value, src=0)), group.rank_in_group


@cache
def _worker_class() -> type:
    with explain_missing("MemoryWorker", extra="vllm"):
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            from vllm.v1.worker.cpu_worker import CPUWorker as Worker
        else:
            from vllm.v1.worker.gpu_worker import Worker
    return type("MemoryWorker", (WorkerMemory, Worker), {"__module__": __name__, "__doc__": WorkerMemory.__doc__})


def __getattr__(name: str) -> Any:
    if name == "MemoryWorker":  # vLLM is imported only now
        return _worker_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The check of each request before it is queued; vLLM answers a request that it refuses with HTTP status 400.

`SessionAdmission` is an entry point of the group `vllm.logits_processors`: of what vLLM lets a plugin add, only logits
processors see a request's parameters in the front end. It changes no logits, and requests without a session pass.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

from mal_adapter.extras import explain_missing
from mal_adapter.vllm.turns import session_turn

if TYPE_CHECKING:
    SessionAdmission: Any

__all__ = ["Admission", "SessionAdmission"]


class Admission:
    """What `SessionAdmission` does, without vLLM's base classes."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError, with what to send instead, if a request's session or turn is not valid."""
        try:
            session_turn(sampling_params)
        except RuntimeError as error:  # a SessionError; vLLM takes ValueErrors for faults of the client
            raise ValueError(str(error)) from error

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        pass

    def apply(self, logits: Any, *context: Any) -> Any:
        """The logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """True, so that greedy sampling skips it. Of model runner V1."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing. Of model runner V1."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """False: it changes no logits. Of model runner V2."""
        return False


@cache
def _admission_class() -> type:
    with explain_missing("SessionAdmission", extra="vllm"):
        from vllm.v1.sample import logits_processor as v1
    try:  # each model runner asks for its own base class
        from vllm.v1.worker.gpu.sample.logits_processor import interface as v2
    except ImportError:
        bases: tuple[type, ...] = (Admission, v1.LogitsProcessor)
    else:
        bases = (Admission, v1.LogitsProcessor, v2.LogitsProcessor)
    return type("SessionAdmission", bases, {"__module__": __name__, "__doc__": Admission.__doc__})


def __getattr__(name: str) -> Any:
    if name == "SessionAdmission":  # vLLM is imported only now
        return _admission_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

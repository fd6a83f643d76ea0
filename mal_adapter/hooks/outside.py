"""Audio that is passed outside of any block, although sessions are open elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from mal_adapter.errors import SessionError
from mal_adapter.hooks.session import Session
from mal_adapter.hooks.torch_internals import runs_backward
from mal_adapter.hosts.audio_mask import find_audio_mask, find_features
from mal_adapter.hosts.spec import HostSpec

__all__ = ["check_left", "check_outside"]


def check_left(host: HostSpec, module: nn.Module, call: Mapping[str, Any], session: Session) -> None:
    """Raise `SessionError` if a call of `module` has audio, although the block of `session` was left before it."""
    if _carries_audio(host, module, call, [session]):
        raise SessionError(
            f"the block of session {list(session.ids)} was left before this forward began; wait for it inside "
            "the block, open a block around it, or run it under memory.disabled()"
        )


def check_outside(host: HostSpec, module: nn.Module, call: Mapping[str, Any], sessions: Sequence[Session]) -> None:
    """Raise `SessionError` if a call of `module` outside any block has audio while `sessions` are open elsewhere."""
    if sessions and _carries_audio(host, module, call, sessions):
        raise SessionError(
            f"audio passed outside any block while sessions {_listed(sessions)} are open in other threads or "
            "contexts, so it is unclear whose it is. Open the block where the forward runs; or hand the context "
            "on: asyncio.to_thread(...), pool.submit(contextvars.copy_context().run, ...), an `async def` "
            "dependency of FastAPI; or say by memory.disabled() that this forward has no memory"
        )


def _carries_audio(host: HostSpec, module: nn.Module, call: Mapping[str, Any], sessions: Iterable[Session]) -> bool:
    """Whether a forward outside the blocks of these sessions has audio that may belong to one of them."""
    if runs_backward():  # a checkpointed region, run again
        return False
    if find_features(host, call) is not None:
        mask = find_audio_mask(host, module, call)
        return mask is not None and bool(mask.any())
    if host.audio_token_id is not None or host.find_mask is not None:
        return False
    # Only a session's own mask says where audio is: any prompt may have some, a decode step has none.
    tokens = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
    return tokens is not None and tokens.shape[1] > 1 and any(s.audio_mask is not None for s in sessions)


def _listed(sessions: Sequence[Session]) -> str:
    """Some of the ids of open sessions; a server may have thousands."""
    ids = [i for session in sessions[:3] for i in session.ids[:3]]
    return f"{ids}" if sum(len(s.ids) for s in sessions) <= len(ids) else f"{ids} and others"

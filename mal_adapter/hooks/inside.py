"""A forward inside a session: where its audio is, by its arguments; and the read and the write in the hooked layer."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.errors import AudioMaskError, SessionError
from mal_adapter.hooks.forward import Forward
from mal_adapter.hooks.plan import (
    Plan,
    check_copies,
    copies_per_prompt,
    fit_users_mask,
    plan_audio,
    repeat_users_mask,
)
from mal_adapter.hooks.session import Session
from mal_adapter.hosts.audio_mask import find_audio_mask, find_features, is_cached
from mal_adapter.hosts.spec import HostSpec
from mal_adapter.memory.spans import Spans

__all__ = ["Inside"]


class Inside:
    """What the hooks of one memory do for forwards inside its sessions.

    A session's adapter moves to the device of the hooked layer.

    Args:
        host: The host's description.
    """

    def __init__(self, host: HostSpec) -> None:
        self.host = host

    def see_call(self, session: Session, forward: Forward, module: nn.Module, call: Mapping[str, Any]) -> None:
        """Decide what `forward` does by the arguments of its call of `module`, with one wait, for its audio mask.

        Raises:
            AudioMaskError: The call has audio, but nothing says where.
            SessionError: The rows are not the session's dialogues, or it is not known whose utterance continues.
        """
        ids, features = call.get("input_ids"), find_features(self.host, call)
        tokens = call.get("inputs_embeds") if ids is None else ids
        mask = None
        if session.audio_mask is None:
            found = find_audio_mask(self.host, module, call)
            mask = None if found is None else found.cpu()
            # Some hosts hand the features to decode steps too, and a generated token may be any id but the placeholder.
            if found is None or mask is None or not mask.any():
                return
            forward.see_audio(found)
        else:
            detects = self.host.audio_token_id is not None or self.host.find_mask is not None
            forward.see_text_only(features is None and ids is not None and detects)
        cached = self._streaming and is_cached(call)
        cache = call.get("past_key_values")
        session.see_prompt(tokens, features, audio_positions=self.host.audio_positions, cache=cache, cached=cached)
        if mask is None and tokens is not None:
            # A host that changes the sequence is no matter here: the shape of its hidden states counts.
            with contextlib.suppress(AudioMaskError):
                mask = self._users_mask(session, forward, tuple(tokens.shape[:2]))
        if mask is not None:
            embeds = tokens if ids is None and features is None else None
            forward.see_plan(self._plan(session, forward, mask, embeds))

    def plan_of(self, session: Session, forward: Forward, hidden: Tensor) -> Plan | None:
        """Where the audio of the forward is in `hidden`, the output of the hooked layer; None for text.

        Raises:
            AudioMaskError: The session's own mask has another shape.
        """
        plan = forward.plan
        if session.audio_mask is None:
            return plan
        shape = tuple(hidden.shape[:2])
        if plan is not None and plan.shape == shape:
            return plan
        mask = self._users_mask(session, forward, shape)
        return None if mask is None else self._plan(session, forward, mask, embeds=None)

    def read_and_write(
        self, session: Session, forward: Forward, plan: Plan, hidden: Float[Tensor, "batch seq_len hidden_size"]
    ) -> Float[Tensor, "batch seq_len hidden_size"]:
        """`hidden` with the memory's residual at audio positions; prepares the write. Does not wait for the device,
        except where `plan.copies` is None.

        Raises:
            AudioMaskError: The host has changed the sequence.
            SessionError: Another forward writes, or the block has been left.
        """
        if hidden.dim() != 3 or plan.shape != hidden.shape[:2]:
            raise AudioMaskError(
                f"the audio mask is {plan.shape}, the hidden states {tuple(hidden.shape)}: the host changed the "
                "sequence. Let the processor expand each clip to its placeholder tokens, or pass "
                "session(audio_mask=...)"
            )
        if session.reader.norm.weight.device != hidden.device:
            session.reader.to(hidden.device)
        plan = plan.to(hidden.device)
        session.claim(forward)
        return plan.scatter(hidden, self._with_memory(session, forward, plan, plan.gather(hidden)))

    def _with_memory(
        self, session: Session, forward: Forward, plan: Plan, tokens: Float[Tensor, "tokens hidden_size"]
    ) -> Float[Tensor, "tokens hidden_size"]:
        adapter, new, prompts = session.reader, plan.spans, len(session.ids)
        copies = check_copies(tokens, new, prompts) if plan.copies is None else plan.copies
        tokens, spans = forward.whole_utterance(tokens, new)
        if self._streaming:
            forward.may_continue(tokens if adapter.training else tokens.detach(), spans)
        state = forward.state.to(tokens.device)
        read_from = state
        if copies > 1:
            read_from = state.rows(torch.arange(len(spans), device=tokens.device) // copies)
        understood = tokens + adapter.read_tokens(read_from, tokens, spans, causal=self._streaming)
        if session.write and not forward.repeated:
            # What is written is the utterance as the memory made it understood, so that the next one builds on it.
            written, rows = understood, spans
            if copies > 1:
                written = torch.cat(torch.split(understood, list(spans.lengths))[::copies])
                rows = Spans(spans.lengths[::copies], tokens.device)
            forward.prepare_write(adapter.write_tokens(state, written, rows, causal=self._streaming))
        if spans is new:
            return understood
        ends = zip(torch.split(understood, list(spans.lengths)), new.lengths, strict=True)
        return torch.cat([row[len(row) - length :] for row, length in ends])

    @property
    def _streaming(self) -> bool:
        return self.host.audio_positions == "every"

    def _users_mask(
        self, session: Session, forward: Forward, shape: tuple[int, ...]
    ) -> Bool[Tensor, "batch seq_len"] | None:
        """The session's own mask for hidden states of this (batch, seq_len), on the host; None for text."""
        mask = session.audio_mask
        assert mask is not None
        given = (mask.shape[0], mask.shape[1])
        fit = fit_users_mask(given, (shape[0], shape[1]), repeated=forward.repeated, text_only=forward.text_only)
        return None if fit is None else repeat_users_mask(session.mask_on_host(mask), *fit)

    def _plan(
        self, session: Session, forward: Forward, mask: Bool[Tensor, "batch seq_len"], embeds: Tensor | None
    ) -> Plan | None:
        weight = session.reader.norm.weight
        plan = plan_audio(mask, weight.device)
        if plan is None:
            return None
        if not weight.is_cpu:
            plan.spans.prepare(weight.dtype)  # its numbers, too, are on the device before the host's work
        rows, prompts = len(plan.spans), len(session.ids)
        if self._streaming and rows != prompts:
            raise SessionError(
                f"the batch has {rows} rows for {prompts} session ids. This host takes audio while it answers, so "
                "beams and several return sequences get different utterances; generate one sequence per prompt"
            )
        tokens = None if forward.prompt is None or forward.repeated else forward.prompt.tokens
        copies = copies_per_prompt(plan.spans.lengths, prompts, features=forward.features, tokens=tokens, embeds=embeds)
        return dataclasses.replace(plan, copies=copies)

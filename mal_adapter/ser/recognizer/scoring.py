"""The probability that a language model gives to each label as its answer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mal_adapter.errors import HostError, LabelError
from mal_adapter.hosts.detect import unwrap
from mal_adapter.hosts.registry import REGISTRY
from mal_adapter.memory.transfer import to_device

__all__ = ["LabelScorer", "continuation", "end_ids"]

RunAgain = Callable[[Int[Tensor, " tokens"]], Float[Tensor, "batch tokens vocabulary"]]
"""Runs the prompts again with these tokens after each, and returns the logits at the tokens."""


class LabelScorer:
    """Log-probabilities of a closed set of answers, after one forward of the prompt.

    The probability of a label is the product over its tokens. If one label starts with all tokens of another ("sad",
    "sadness"), the shorter would always win. Then the end of the answer is scored too, for every label.

    The tokens after a label's first one are scored on the KV cache of that forward, for all labels in one more forward.
    Layers with a running state instead of keys and values (Mamba, short convolutions) get one token at a time, as in
    generate(): with several at once, transformers was wrong until mid 2026 (its issue 46032). A host without a cache of
    transformers runs the prompt again for each label; so does one with running states while autograd records.

    Args:
        tokenizer: The host's tokenizer.
        labels: The answers, such as a `LabelSet`.
        prompt_text: The text before the answer. Labels are tokenized together with it, as in training, so that merges
            at the boundary are kept; the last `healed_tokens` tokens of the prompt are then part of the labels.
        end_ids: The tokens that end an answer; any of them counts.

    Raises:
        LabelError: Two labels have the same tokens, the tokenizer has no tokens for a label, or the end has to be
            scored and no end token is known.
    """

    def __init__(self, tokenizer: Any, labels: Iterable[str], prompt_text: str, end_ids: Sequence[int]) -> None:
        self.labels = tuple(labels)
        prompt = _tokens(tokenizer, prompt_text)
        answers = [_tokens(tokenizer, prompt_text + name) for name in self.labels]
        common = len(prompt)
        while any(answer[:common] != prompt[:common] for answer in answers):
            common -= 1
        self.healed_tokens = len(prompt) - common
        self.token_ids = [answer[common:] for answer in answers]
        self._check(tokenizer)
        has_prefixes = any(a is not b and _begins(b, a) for a in self.token_ids for b in self.token_ids)
        self.end_ids = list(end_ids) if has_prefixes else []
        if has_prefixes and not self.end_ids:
            raise LabelError(
                "one label begins with another, so that only the end of the answer distinguishes them, but neither the "
                "model nor the tokenizer has an end-of-sequence token; choose other labels than "
                f"{', '.join(self.labels)}"
            )
        # The tokens to feed after the prompt: all but the last, or all of them if the end is scored too.
        self._fed = [ids if self.end_ids else ids[:-1] for ids in self.token_ids]
        self._first = torch.tensor([ids[0] for ids in self.token_ids])
        self._branches: list[list[int]] = []
        """Those of them that are not the start of a longer one."""
        for fed in sorted(self._fed, key=len, reverse=True):
            if fed and not any(_begins(branch, fed) for branch in self._branches):
                self._branches.append(fed)

    @property
    def needs_cache(self) -> bool:
        """Whether a label has tokens after the one that the prompt's forward predicts."""
        return bool(self._branches)

    def check_host(self, model: Any) -> None:
        """Raise `HostError` if labels have several tokens and `model` can't score those after the first; before
        anything runs."""
        host = unwrap(model)
        config = getattr(host, "config", None)
        known = REGISTRY.get(getattr(config, "model_type", None) or "")
        if getattr(config, "is_encoder_decoder", False):
            why = "answers from a decoder of its own, not after the prompt"
        elif known is not None and known.audio_positions == "every":
            why = "takes audio at every position, also at those of its answer"
        else:
            return
        if self.needs_cache:
            several = {name: ids for name, ids in zip(self.labels, self.token_ids, strict=True) if len(ids) > 1}
            raise HostError(
                f"{type(host).__name__} {why}, so labels of several tokens can't be scored: "
                f"{several or 'one label begins with another'}; choose labels of one token each, or another host"
            )

    def _check(self, tokenizer: Any) -> None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        by_tokens: dict[tuple[int, ...], str] = {}
        for name, ids in zip(self.labels, self.token_ids, strict=True):
            if not ids or (unknown is not None and unknown in ids):
                raise LabelError(f"the host's tokenizer has no tokens for the label {name!r}; choose another word")
            if tuple(ids) in by_tokens:
                raise LabelError(f"{name!r} and {by_tokens[tuple(ids)]!r} are the same tokens {ids} to this host")
            by_tokens[tuple(ids)] = name

    def log_probs(
        self,
        model: Callable[..., Any],
        prompt_logits: Float[Tensor, "batch vocabulary"],
        past_key_values: Any,
        attention_mask: Int[Tensor, "batch seq_len"],
        position_ids: Int[Tensor, "batch seq_len"] | None = None,
        run_again: RunAgain | None = None,
    ) -> Float[Tensor, "batch labels"]:
        """Log-probability of each label as the answer.

        What is mutated: the cache, which is of no use afterwards.

        Args:
            model: The host; called again only where a label has several tokens. Those calls have no audio.
            prompt_logits: (batch, vocabulary), at the last position of each prompt.
            past_key_values: The cache of the forward over the prompts; only used if `needs_cache`.
            attention_mask: (batch, seq_len) of the prompts, padded on the left.
            position_ids: (batch, seq_len) as passed with the prompts; None where the host counts by itself.
            run_again: Called with (tokens,) for each label if the cache can't be used. It runs the prompts again with
                these tokens after each, and returns the logits (batch, tokens, vocabulary) at the tokens.

        Returns:
            (batch, labels) float32, not normalised over the labels; differentiable where autograd records.

        Raises:
            HostError: A label has several tokens, there is no cache, and `run_again` is None.
        """
        scores = prompt_logits.float().log_softmax(-1)[:, self._first_tokens(prompt_logits.device)]
        if not self._branches:
            return scores
        way = continuation(past_key_values, attention_mask.shape[1])
        if way == "by token" and scores.requires_grad:
            way = "again"  # each step overwrites the running state that a backward through it needs
        if way != "again":
            step = 1 if way == "by token" else max(map(len, self._branches))
            log_probs = self._on_cache(model, past_key_values, attention_mask, position_ids, step)
        elif run_again is not None:
            behind = [run_again(torch.tensor(branch, device=attention_mask.device)) for branch in self._branches]
            log_probs = [logits.float().log_softmax(-1) for logits in behind]
        else:
            raise HostError(
                "labels of several tokens are scored on the prompts' cache, but this host returned "
                f"{type(past_key_values).__name__}; pass run_again, or choose labels of one token each"
            )
        scores = scores.clone()
        for index, fed in enumerate(self._fed):
            for position in range(len(fed)):
                branch = next(n for n, branch in enumerate(self._branches) if _begins(branch, fed))
                following = self.token_ids[index][position + 1 : position + 2] or self.end_ids
                scores[:, index] += log_probs[branch][:, position, following].logsumexp(-1).to(scores.device)
        return scores

    def _first_tokens(self, device: torch.device) -> Int[Tensor, " labels"]:
        first = self._first
        if first.device != device:  # once, since the copy might wait for the device
            with torch.inference_mode(False):  # autograd will save it
                first = self._first = to_device(first, device)
        return first

    def _on_cache(
        self,
        model: Callable[..., Any],
        cache: Any,
        attention_mask: Int[Tensor, "batch seq_len"],
        position_ids: Int[Tensor, "batch seq_len"] | None,
        step: int,
    ) -> list[Float[Tensor, "batch tokens vocabulary"]]:
        """Log-probabilities after each token of each branch; `step` tokens are fed at once."""
        device = attention_mask.device
        batch, rows = len(attention_mask), len(self._branches)
        width = max(map(len, self._branches))
        pad = self.token_ids[0][0]  # any token that exists: padded positions are masked and come last
        ids = torch.tensor([branch + [pad] * (width - len(branch)) for branch in self._branches], device=device)
        counts = torch.tensor([[len(branch)] for branch in self._branches], device=device)

        # Row b of the prompt becomes rows b·branches … of the answers. reorder_cache, made for beams, works on every
        # layer of a cache; layers with a running state can't be repeated.
        prompt_of_row = torch.arange(batch, device=device).repeat_interleave(rows)
        cache.reorder_cache(prompt_of_row)
        ids = ids.repeat(batch, 1)
        answer_mask = torch.arange(width, device=device) < counts
        mask = torch.cat(
            (attention_mask.repeat_interleave(rows, dim=0), answer_mask.to(attention_mask.dtype).repeat(batch, 1)),
            dim=1,
        )
        positions = None
        if position_ids is not None:
            following = position_ids[:, -1:] + 1 + torch.arange(width, device=position_ids.device)
            positions = following.repeat_interleave(rows, dim=0)

        found = []
        for start in range(0, width, step):
            stop = start + step
            logits = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, : attention_mask.shape[1] + stop],
                past_key_values=cache,
                use_cache=True,
                **({} if positions is None else {"position_ids": positions[:, start:stop]}),
            ).logits
            found.append(logits.float().log_softmax(-1))
        log_probs = torch.unflatten(torch.cat(found, dim=1), 0, (batch, rows))
        return list(log_probs.unbind(1))


def continuation(cache: Any, seq_len: int) -> Literal["at once", "by token", "again"]:
    """How tokens after prompts of `seq_len` tokens can be fed to a host that returned `cache`.

    Returns:
        "at once" on a cache of keys and values only; "by token" on one with running states; "again", with the prompts
        before them, if the cache can't be used. That is one not of transformers, an empty one, which the host does not
        use, and one of another length than the prompts, whose positions are not those of the attention mask.
    """
    from transformers import Cache, EncoderDecoderCache  # takes seconds

    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache) or not cache.layers:
        return "again"
    counts = any(hasattr(layer, "keys") for layer in cache.layers)  # running states alone don't count tokens
    if counts and int(cache.get_seq_length()) != seq_len:
        return "again"
    running = any(hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states") for layer in cache.layers)
    return "by token" if running else "at once"


def _begins(ids: Sequence[int], part: Sequence[int]) -> bool:
    """Whether `ids` start with `part`."""
    return ids[: len(part)] == part


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which the host stops. Those of chat models often differ from the tokenizer's end of sequence."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]

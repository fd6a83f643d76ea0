"""`MemoryAdapter`: from hidden states to keys, values and gates, and from the memory's answers to a residual."""

import hashlib
import json
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.errors import AudioMaskError, ConfigError, StateMismatchError
from mal_adapter.memory.config import MemoryConfig
from mal_adapter.memory.gates import Gates
from mal_adapter.memory.hub_mixin import Pretrained
from mal_adapter.memory.recurrent import GRU, RunningMean
from mal_adapter.memory.rule import ByHead, Rule, Weights
from mal_adapter.memory.spans import Spans
from mal_adapter.memory.state import MemoryState
from mal_adapter.memory.titans import Titans

__all__ = ["RULES", "MemoryAdapter"]

HiddenStates = Float[Tensor, "batch seq_len hidden_size"]
Mask = Bool[Tensor, "batch seq_len"]

RULES: dict[str, type[Titans | RunningMean | GRU]] = {"titans": Titans, "running_mean": RunningMean, "gru": GRU}
"""The rule of each `MemoryConfig.update`."""


class MemoryAdapter(Pretrained):
    """The learned part of a memory: norm, projections, gates, initial weights and read-out.

    A fresh adapter's residual is exactly zero, so it does not change the answers of its host.

    Args:
        config: Sizes and starting points.

    Attributes:
        config: As given.
        metadata: Its host, task and training data; all fields are None in a fresh adapter.
        initial: Learned initial weights of the memory, (heads, d_in, d_out) per layer.

    Example:
        >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)).eval()
        >>> state = adapter.initial_state(batch_size=1)
        >>> hidden_states = torch.randn(1, 50, 32)
        >>> residual = adapter.read(state, hidden_states)      # from what earlier utterances wrote
        >>> state = adapter.write(state, hidden_states)        # then write this utterance
        >>> tuple(residual.shape), state.utterances.tolist(), state.tokens.tolist()
        ((1, 50, 32), [1], [50])
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        if config.hidden_size is None:
            raise ConfigError("a MemoryAdapter needs config.hidden_size; attach_memory takes it from the host")
        width, heads, d = config.memory_dim, config.num_heads, config.head_dim
        readout = config.readout_dim or width

        self.norm = nn.LayerNorm(config.hidden_size)
        # First the rows of a read, then the rows of a write, so that each is one GEMM. A read needs the query and the
        # read-out's view of the token; a write needs key, value and the three gates of each head.
        rows = 4 * width + 3 * heads
        self.in_proj = nn.Linear(config.hidden_size, rows)
        self.pool_proj = nn.Linear(config.hidden_size, rows, bias=False) if config.pool_utterance else None
        self.initial = nn.ParameterList(
            torch.randn(heads, *shape) / math.sqrt(shape[0]) for shape in config.layer_shapes
        )
        self.recurrence = RULES[config.update](config)  # the name of its keys in saved files
        self.readout_norm = nn.LayerNorm(2 * width)
        self.readout_in = nn.Linear(2 * width, 2 * readout)
        self.dropout = nn.Dropout(config.dropout)
        self.readout_out = nn.Linear(readout, config.hidden_size, bias=False)
        self._fingerprint: tuple[object, str] | None = None
        self._reset(heads, d)

    @torch.no_grad()
    def _reset(self, heads: int, d: int) -> None:
        width = heads * d
        for proj in filter(None, (self.in_proj, self.pool_proj)):
            proj.weight[2 * width : 3 * width] = proj.weight[:width]  # a query finds what an equal key wrote
            proj.weight[4 * width :] = 0  # gates start equal for every token
        # The constant component: one direction per head, as long as a typical projection (LayerNorm has rows of length
        # √hidden_size, nn.Linear's weights variance 1/(3 hidden_size)). A query with this component only reads the
        # running mean.
        direction = F.normalize(torch.randn(heads, d), dim=-1) * math.sqrt(d / 3)
        self.in_proj.bias.zero_()
        self.in_proj.bias[:width] = direction.flatten()
        self.in_proj.bias[2 * width : 3 * width] = direction.flatten()
        gates = (self.config.step_bias, self.config.momentum_bias, self.config.forget_bias)
        self.in_proj.bias[4 * width :] = torch.tensor(gates).repeat_interleave(heads)
        self.initial[-1].zero_()  # an empty memory answers zero
        self.readout_out.weight.zero_()

    @property
    def rule(self) -> Rule:
        """The update rule: a `Titans`, `RunningMean` or `GRU`."""
        return self.recurrence

    @property
    def state_dtype(self) -> torch.dtype:
        """float32, also under half-precision parameters; float64 only for float64 parameters."""
        return torch.promote_types(self.in_proj.weight.dtype, torch.float32)

    def initial_state(self, batch_size: int = 1) -> MemoryState:
        """The empty state of `batch_size` new dialogues, on the adapter's device."""
        device, dtype, heads = self.in_proj.weight.device, self.state_dtype, self.config.num_heads
        # A tensor that was created in inference mode can't be used in training later.
        with torch.inference_mode(False):

            def zeros() -> Weights:
                shapes = self.config.layer_shapes
                return tuple(torch.zeros(batch_size, heads, *shape, device=device, dtype=dtype) for shape in shapes)

            none = torch.zeros(batch_size, dtype=torch.int64, device=device)
            fingerprint = None if self.training else self.fingerprint()
            return MemoryState(zeros(), zeros(), none, none.clone(), none.clone(), fingerprint)

    def read(
        self, state: MemoryState, hidden_states: HiddenStates, mask: Mask | None = None, *, causal: bool = False
    ) -> HiddenStates:
        """The memory's residual for each token.

        Args:
            state: One row per row of the batch.
            hidden_states: (batch, seq_len, hidden_size), any float dtype.
            mask: (batch, seq_len) bool, True at audio tokens; all tokens are audio if None.
            causal: Give each token the mean of the audio tokens up to itself, instead of the mean of the whole
                utterance; for streaming hosts, which have audio at every position.

        Returns:
            The residual, (batch, seq_len, hidden_size) in the dtype of `hidden_states`, exactly zero where `mask` is
            False.

        Raises:
            AudioMaskError: `mask` or `hidden_states` have the wrong shape.
            StateMismatchError: `state` has another batch size or other layers.
        """
        mask = self._checked_mask(state, hidden_states, mask)
        width = self.config.memory_dim
        query, token = self._project(hidden_states, mask, causal, slice(0, 2 * width)).chunk(2, dim=-1)
        query = F.normalize(self._by_head(query), dim=-1).to(self.state_dtype)
        answer = self.rule.read(tuple(self.initial), state, query).transpose(1, 2).flatten(2)
        evidence = self.readout_norm(torch.cat((answer.to(token.dtype), token), dim=-1))
        value, gate = self.readout_in(evidence).chunk(2, dim=-1)
        # Zero where the narrow side is: readout_out has no bias.
        inner = torch.where(mask[..., None], value * F.silu(gate), 0)
        residual: Tensor = self.readout_out(self.dropout(inner))
        return residual.to(hidden_states.dtype)

    def write(
        self, state: MemoryState, hidden_states: HiddenStates, mask: Mask | None = None, *, causal: bool = False
    ) -> MemoryState:
        """The state after one more utterance.

        If a row's result is not finite, that row is not changed and its `skipped_writes` is increased.

        Args:
            state: One row per row of the batch; not changed.
            hidden_states: (batch, seq_len, hidden_size), any float dtype.
            mask: (batch, seq_len) bool, True at audio tokens; all tokens are audio if None.
            causal: As in `read`.

        Returns:
            A new state.

        Raises:
            AudioMaskError: `mask` or `hidden_states` have the wrong shape.
            StateMismatchError: `state` has another batch size or other layers.
        """
        mask = self._checked_mask(state, hidden_states, mask)
        finite = (_total(hidden_states, -1).isfinite() | ~mask).all(-1)
        written = mask & finite[:, None]
        width, heads = self.config.memory_dim, self.config.num_heads
        projected = self._project(hidden_states, written, causal, slice(2 * width, None))
        key, value, *logits = torch.split(projected, [width] * 2 + [heads] * 3, dim=-1)
        key = F.normalize(self._by_head(key), dim=-1).to(self.state_dtype)
        value = self._by_head(value).to(self.state_dtype)
        gates = Gates(*(logit.mT for logit in logits))
        weights, momentum = self.rule.write(tuple(self.initial), state, key, value, gates, written)
        totals = torch.stack([_total(layer, (1, 2, 3)) for layer in (*weights, *momentum)])
        finite = finite & totals.isfinite().all(0)
        failed = ~finite[:, None, None, None]

        def finite_or_old(new: Weights, old: Weights) -> Weights:
            # The old tensor is the first argument, because torch.where takes over its memory layout.
            return tuple(torch.where(failed, o, n) for n, o in zip(new, old, strict=True))

        attempted = mask.any(-1)
        return MemoryState(
            finite_or_old(weights, state.weights),
            finite_or_old(momentum, state.momentum),
            utterances=state.utterances + (attempted & finite),
            tokens=state.tokens + mask.sum(-1) * finite,
            skipped_writes=state.skipped_writes + (attempted & ~finite),
            fingerprint=state.fingerprint,
        )

    def read_tokens(
        self,
        state: MemoryState,
        tokens: Float[Tensor, "tokens hidden_size"],
        spans: Spans,
        valid: Bool[Tensor, " tokens"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "tokens hidden_size"]:
        """As `read`, for rows of any length in one flat list; `spans` says where each row is."""
        mask = spans.inside if valid is None else spans.pad(valid)
        return spans.flatten(self.read(state, spans.pad(tokens), mask, causal=causal))

    def write_tokens(
        self,
        state: MemoryState,
        tokens: Float[Tensor, "tokens hidden_size"],
        spans: Spans,
        valid: Bool[Tensor, " tokens"] | None = None,
        *,
        causal: bool = False,
    ) -> MemoryState:
        """As `write`, for rows of any length in one flat list; `spans` says where each row is."""
        mask = spans.inside if valid is None else spans.pad(valid)
        return self.write(state, spans.pad(tokens), mask, causal=causal)

    def _project(
        self, hidden_states: HiddenStates, mask: Mask, causal: bool, rows: slice
    ) -> Float[Tensor, "batch seq_len rows"]:
        """The projections of each token and of the utterance's mean, these rows only."""
        # Values at other positions, even NaN, must affect neither the result nor a gradient.
        hidden_states = torch.where(mask[..., None], hidden_states, 0)
        x = self.norm(hidden_states.to(self.norm.weight.dtype))
        projected = F.linear(x, self.in_proj.weight[rows], self.in_proj.bias[rows])
        if self.pool_proj is None:
            return projected
        if causal:
            mean = torch.where(mask[..., None], x, 0).cumsum(-2) / mask[..., None].cumsum(-2).clamp_min(1)
        else:
            share = mask.to(x.dtype) / mask.sum(-1, keepdim=True).clamp_min(1)
            mean = share[:, None] @ x
        return projected + F.linear(mean.to(x.dtype), self.pool_proj.weight[rows])

    def _by_head(self, projected: Float[Tensor, "batch seq_len memory_dim"]) -> ByHead:
        return torch.unflatten(projected, -1, (self.config.num_heads, -1)).transpose(1, 2)

    def _checked_mask(self, state: MemoryState, hidden_states: HiddenStates, mask: Mask | None) -> Mask:
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.config.hidden_size:
            raise AudioMaskError(
                f"hidden_states are {tuple(hidden_states.shape)}, expected (batch, seq_len, {self.config.hidden_size})"
            )
        if mask is None:
            mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        if mask.shape != hidden_states.shape[:2] or mask.dtype != torch.bool:
            raise AudioMaskError(
                f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(hidden_states.shape[:2])}, "
                "one entry per position of hidden_states"
            )
        self.check_state(state)
        if state.batch_size != len(hidden_states):
            raise StateMismatchError(
                f"the state holds {state.batch_size} dialogues, but hidden_states have {len(hidden_states)} rows"
            )
        return mask

    def check_state(self, state: MemoryState) -> None:
        """Raise `StateMismatchError` unless `state` has this adapter's shapes and its fingerprint, if it has any.

        The state may be on any device other than meta; a session moves it.
        """
        if state.weights[0].is_meta:
            raise StateMismatchError("the state is on the meta device and holds no numbers; load it onto another one")
        shapes = tuple((self.config.num_heads, *shape) for shape in self.config.layer_shapes)
        for layers in (state.weights, state.momentum):
            if (given := tuple(tuple(layer.shape[1:]) for layer in layers)) != shapes:
                raise StateMismatchError(
                    f"the state's layers are {given}, this adapter's {shapes}: it belongs to another adapter"
                )
        if (dtype := state.weights[0].dtype) != self.state_dtype:
            raise StateMismatchError(f"the state is {dtype}, this adapter's states are {self.state_dtype}")
        if not self.training and state.fingerprint is not None and state.fingerprint != self.fingerprint():
            raise StateMismatchError(
                f"the state was written by adapter {state.fingerprint}, this one is {self.fingerprint()}; "
                "load the adapter it belongs to, or start a new session"
            )

    def fingerprint(self) -> str:
        """16 hex digits that identify configuration and weights; cached until a parameter changes."""
        parameters = list(self.parameters())
        version = [(p.data_ptr(), None if p.is_inference() else p._version, p.dtype) for p in parameters]
        if self._fingerprint is None or self._fingerprint[0] != version:
            fields = self.config.to_dict()
            if fields["update"] == "titans":  # states from before this field must remain readable
                del fields["update"]
            digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
            self._fingerprint = version, digest.hexdigest()[:16]
        return self._fingerprint[1]


def _total(values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """A sum over `dims`. It is finite unless a number is not or the sum overflows: one pass, no copy."""
    return values.detach().sum(dims, dtype=torch.promote_types(values.dtype, torch.float32))

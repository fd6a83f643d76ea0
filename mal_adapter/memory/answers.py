"""What the host answered before: a few numbers per dialogue, beside the memory of how it sounded."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.memory.config import MemoryConfig
from mal_adapter.memory.spans import Spans

__all__ = ["AnswerMemory", "Sums"]

Sums = Float[Tensor, "batch scales labels_and_count"]
"""Per time scale, the decayed sum of the probabilities of each label; last, that of ones: the decayed count."""

#: The share that is left of an answer when the next one is written, per time scale, at the start of training.
DECAYS = (0.4, 0.9)
#: With it, the few weights here learn about as fast as the read-out's many.
GAIN = 4.0


class AnswerMemory(nn.Module):
    """Decayed means of the probabilities that the host gave to each label, and what they add to a token.

    With p_n the probabilities of the n-th answer, L labels, and γ a learned decay per time scale::

        s_n = γ s_{n−1} + p_n        c_n = γ c_{n−1} + 1        b_n = (s_n − c_n / L) / (c_n + 1)

    b is the mean deviation from equal probabilities, shrunk towards zero while there are few answers, as if one answer
    had said nothing. The residual of a token h is one linear map of them, as large as the token::

        r = rms(h) · W (L b, c / (c + 1)) · 4

    So it has few degrees of freedom, and is zero for an empty memory and for a fresh adapter.

    Args:
        config: Its `num_labels` and `hidden_size` are used.

    Example:
        >>> memory = AnswerMemory(MemoryConfig(hidden_size=8, memory_dim=4, num_heads=1, num_labels=2))
        >>> sums = memory.initial(1, torch.device("cpu"), torch.float32)
        >>> sums = memory.write(sums, torch.tensor([[0.9, 0.1]]))
        >>> [round(value, 2) for value in memory.means(sums)[0, 0].tolist()]      # ±0.4 · 2, halved; and 1 / (1 + 1)
        [0.4, -0.4, 0.5]
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        assert config.num_labels is not None
        self.labels = config.num_labels
        self.decay = nn.Parameter(torch.logit(torch.tensor(DECAYS)))
        assert config.hidden_size is not None
        self.out_proj = nn.Linear(len(DECAYS) * (self.labels + 1), config.hidden_size, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one dialogue's sums."""
        return len(DECAYS), self.labels + 1

    def initial(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Sums:
        """Of dialogues without an answer."""
        return torch.zeros(batch_size, *self.shape, device=device, dtype=dtype)

    def write(self, sums: Sums, probabilities: Float[Tensor, "batch labels"]) -> Sums:
        """After one more answer per dialogue. A row whose probabilities are not finite stays as it is."""
        finite = probabilities.isfinite().all(-1)[:, None, None]
        new = nn.functional.pad(torch.where(finite[:, 0], probabilities, 0), (0, 1), value=1.0)
        decay = self.decay.to(sums.dtype).sigmoid()[:, None]
        return torch.where(finite, decay * sums + new[:, None].to(sums.dtype), sums)

    def means(self, sums: Sums) -> Sums:
        """L b and c / (c + 1)."""
        total, count = sums[..., :-1], sums[..., -1:]
        return torch.cat((self.labels * total - count, count), -1) / (count + 1)

    def forward(
        self,
        sums: Sums,
        tokens: Float[Tensor, "tokens hidden_size"],
        spans: Spans,
        valid: Bool[Tensor, " tokens"] | None,
    ) -> Float[Tensor, "tokens hidden_size"]:
        """The residual of each token; zero where `valid` is False."""
        weight = self.out_proj.weight
        by_row = self.out_proj(self.means(sums).flatten(1).to(weight.dtype))
        # Values at other positions, even NaN, must not affect a gradient.
        known = tokens.detach() if valid is None else torch.where(valid[:, None], tokens.detach(), 0)
        size = torch.linalg.vector_norm(
            known, dim=-1, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32)
        )
        size = size * (GAIN / math.sqrt(tokens.shape[-1]))
        residual: Tensor = size.to(weight.dtype) * spans.spread(by_row)
        return residual

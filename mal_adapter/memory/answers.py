"""What the host answered before: a few numbers per dialogue, beside the memory of how it sounded."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mal_adapter.memory.config import MemoryConfig

__all__ = ["AnswerMemory", "Sums"]

Sums = Float[Tensor, "batch scales labels_and_count"]
"""Per time scale, the decayed sum of the probabilities of each label; last, that of ones: the decayed count."""

#: The share that is left of an answer when the next one is written, per time scale, at the start of training.
DECAYS = (0.4, 0.9)


class AnswerMemory(nn.Module):
    """Decayed means of the probabilities that the host gave to each label, and how the read-out sees them.

    With p_n the probabilities of the n-th answer, L labels, and γ a learned decay per time scale::

        s_n = γ s_{n−1} + p_n        c_n = γ c_{n−1} + 1        b_n = (s_n − c_n / L) / (c_n + 1)

    b is the mean deviation from equal probabilities, shrunk towards zero while there are few answers, as if one answer
    had said nothing. The read-out sees b and c / (c + 1), both zero in an empty memory.

    Args:
        config: Its `num_labels` and `readout_dim` are used.

    Example:
        >>> memory = AnswerMemory(MemoryConfig(memory_dim=4, num_heads=1, num_labels=2))
        >>> sums = memory.initial(1, torch.device("cpu"), torch.float32)
        >>> sums = memory.write(sums, torch.tensor([[0.9, 0.1]]))
        >>> [round(value, 2) for value in memory.means(sums)[0, 0].tolist()]      # ±0.4, halved; and 1 / (1 + 1)
        [0.2, -0.2, 0.5]
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        assert config.num_labels is not None
        self.labels = config.num_labels
        self.decay = nn.Parameter(torch.logit(torch.tensor(DECAYS)))
        inputs = len(DECAYS) * (self.labels + 1)
        self.in_proj = nn.Linear(inputs, config.readout_dim or config.memory_dim, bias=False)
        nn.init.normal_(self.in_proj.weight)

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
        """b and c / (c + 1)."""
        total, count = sums[..., :-1], sums[..., -1:]
        return torch.cat((total - count / self.labels, count), -1) / (count + 1)

    def forward(self, sums: Sums) -> Float[Tensor, "batch readout_dim"]:
        """What the read-out gets of them, per dialogue."""
        seen: Tensor = self.in_proj(self.means(sums).flatten(1).to(self.in_proj.weight.dtype))
        return seen

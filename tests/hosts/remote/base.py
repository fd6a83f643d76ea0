"""How a tiny host of remote code is built and called: a class of this project around real language models of
transformers, called the way the checkpoint's code calls it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mal_adapter import AttachedMemory, HostSpec, attach_memory
from tests.hosts.tiny import MEL_BINS, WIDTH, TinyHost, _spread

__all__ = ["Inputs", "RemoteHost", "Route", "TinyEncoder", "spans"]

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RemoteHost(TinyHost):
    """A host whose class is not part of transformers.

    Attributes:
        model_class: the class itself.
        place: ids, mask and features, and the true audio mask -> the convention's arguments, and the mask in its terms.
        generate: model, those arguments and options -> ids; the way its own code generates.
        spec: what a user must say to `attach_memory`.
        generates_at: where to attach for `generate`; where it is not "", a session needs the user's mask.
        forward_at: the same for forward.
        batch_sides: on which sides a batch can be padded; none: it has batches of one only.
        max_clips: how many clips a prompt can hold.
    """

    model_class: type[nn.Module]
    place: Callable[[Inputs, Tensor], tuple[Inputs, Tensor]]
    generate: Callable[..., Tensor]
    spec: HostSpec | None = None
    generates_at: str = ""
    forward_at: str = ""
    batch_sides: tuple[str, ...] = ("left", "right")
    max_clips: int = 2

    @property
    def exists(self) -> bool:
        return True

    def build(self, dtype: torch.dtype = torch.float32, num_layers: int = 3, seed: int = 0) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model_class(self.config(num_layers))
            _spread(model)
        return model.to(dtype).eval()

    def collate(self, model: nn.Module, prompts: Sequence[Any], padding_side: str = "left") -> tuple[Inputs, Tensor]:
        return self.place(*super().collate(model, prompts, padding_side))


@dataclass(frozen=True)
class Route:
    """One way of calling one host: its forward, or its own generate."""

    host: RemoteHost
    call: str

    def __str__(self) -> str:
        return f"{self.host.name}-{self.call}"

    @property
    def at(self) -> str:
        return self.host.forward_at if self.call == "forward" else self.host.generates_at

    def run(self, model: nn.Module, inputs: Inputs) -> None:
        with torch.no_grad():
            model(**inputs) if self.call == "forward" else self.host.generate(model, inputs)

    def attach(self, model: nn.Module, layer_idx: int, **options: Any) -> AttachedMemory:
        spec = None if self.at else self.host.spec
        return attach_memory(model.get_submodule(self.at), layer_idx=layer_idx, host=spec, **options)

    def session(self, memory: AttachedMemory, ids: Any, audio_mask: Tensor) -> AbstractContextManager[Any]:
        return memory.session(ids, audio_mask=audio_mask if self.at else None)


class TinyEncoder(nn.Module):
    """Mel (clips, mel_bins, frames) -> audio tokens (clips, tokens, width)."""

    def __init__(self, frames_per_token: int, width: int = WIDTH):
        super().__init__()
        self.frames_per_token = frames_per_token
        self.proj = nn.Linear(MEL_BINS, width)

    def forward(self, mel: Tensor) -> Tensor:
        return self.proj(F.avg_pool1d(mel, self.frames_per_token).transpose(1, 2))


def spans(mask: Tensor) -> list[tuple[int, int, int]]:
    """(batch, seq_len) bool -> (row, start, length) of each run of True, in reading order."""
    edges = F.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(row, start, stop - start) for (row, start), (_, stop) in zip(starts, stops, strict=True)]

"""A checkpoint of a training run: one file, there as a whole or not at all, without pickle.

A safetensors file. Its tensors are `parameters.NAME`, `best.NAME` and AdamW's `optimizer.KEY.NAME`; its metadata is the
run's progress as JSON. There are no random states in it: every step draws from a seed of its own.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mal_adapter.errors import TrainingError
from mal_adapter.serialization.atomic import write_atomically
from mal_adapter.serialization.tensors import save_tensors

__all__ = ["CHECKPOINT_NAME", "Progress", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = "1"
#: Within the output folder of a training.
CHECKPOINT_NAME = Path("checkpoint", "training.safetensors")
_ADAMW = ("step", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Args:
        run: what it must have in common with the run that resumes it: configuration, labels, prompt, data.
        epoch: epochs that are over.
        step: steps of the present epoch that are over.
        loss, weight, heard: sums over the present epoch so far.
        host_dev: metrics of the bare host on the dev dialogues; None before they are known, or without such dialogues.
        history: an entry per epoch.
        best_epoch: 1 … epochs; None before the first epoch's end.
        unusable: [dialogue_id, utterance_id, reason] of what could not be heard.
    """

    run: dict[str, Any]
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    weight: float = 0.0
    heard: int = 0
    host_dev: dict[str, float] | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_epoch: int | None = None
    unusable: list[list[str]] = dataclasses.field(default_factory=list)


def save_checkpoint(
    path: Path,
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes all that a run needs to go on. A crash leaves the checkpoint from before, or this one.

    Args:
        path: the file; its folder is made if need be.
        parameters: all that is trained, in the optimizer's order.
        best: the best epoch's values of the same names; empty before the first epoch's end.
    """
    tensors: dict[str, Tensor] = {f"parameters.{name}": p for name, p in parameters.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    metadata = {"format_version": FORMAT_VERSION, "progress": json.dumps(dataclasses.asdict(progress))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save_tensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata))


def load_checkpoint(
    path: Path, run: dict[str, Any], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """Puts a checkpoint's values into `parameters` and `optimizer`, in place.

    Args:
        run: of the run that goes on; it must be the checkpoint's.

    Returns:
        The progress, and the best values so far.

    Raises:
        TrainingError: the file is no checkpoint, or one of another run; nothing is changed then.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        if (version := metadata.get("format_version")) != FORMAT_VERSION:
            raise TrainingError(f"{path} has checkpoint format {version!r}, this version reads {FORMAT_VERSION!r}")
        progress = Progress(**json.loads(metadata["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} is not a checkpoint that can be read: {error}") from error
    for name in sorted(progress.run.keys() | run.keys()):
        if progress.run.get(name) != run.get(name):
            raise TrainingError(
                f"{path} is of a run with {_differing(name, progress.run.get(name), run.get(name))}; "
                "resume with what that began with, or train into another folder"
            )
    for name, parameter in parameters.items():
        if (value := tensors.get(f"parameters.{name}")) is None or value.shape != parameter.shape:
            raise TrainingError(f"{path} has no {name} of shape {tuple(parameter.shape)}; it is of another adapter")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameters.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(parameters):
        found = {key: tensors.get(f"optimizer.{key}.{name}") for key in _ADAMW}
        if known := {key: value for key, value in found.items() if value is not None}:
            state[index] = known
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
    return progress, best


def _differing(name: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        fields = [field for field in {**theirs, **ours} if theirs.get(field) != ours.get(field)]
        pairs = ", ".join(f"{field}={theirs.get(field)!r} (here {ours.get(field)!r})" for field in fields[:3])
        return f"{name} {pairs}"
    return f"{name} {str(theirs)[:60]!r} (here {str(ours)[:60]!r})"

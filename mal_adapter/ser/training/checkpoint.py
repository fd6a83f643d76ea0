"""A checkpoint of a training run: one safetensors file, written atomically, without pickle.

Its tensors are `parameters.NAME`, `best.NAME` and AdamW's `optimizer.KEY.NAME`; its metadata is the run's progress as
JSON. It has no random states, since every step sets its own seed.
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
#: Relative to the output folder of a training.
CHECKPOINT_NAME = Path("checkpoint", "training.safetensors")
_ADAMW = ("step", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Args:
        run: Configuration, labels, prompt and data; a run that resumes this one must have the same.
        epoch: Number of finished epochs.
        step: Number of finished steps in the present epoch.
        loss: Sum over the present epoch so far, as in `Tally`.
        weight: Sum over the present epoch so far, as in `Tally`.
        utterances: Number of them in the present epoch so far.
        host_dev: Metrics of the host alone on the dev dialogues; None before they are known, or without such dialogues.
        history: An entry per finished epoch.
        best_epoch: 1 … epochs; None before the end of the first epoch.
        unusable: [dialogue_id, utterance_id, reason] of each utterance whose audio can't be used.
    """

    run: dict[str, Any]
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    weight: float = 0.0
    utterances: int = 0
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
    """Save all that a run needs to continue. After a crash the file is the previous checkpoint or this one.

    Args:
        path: The file; its folder is made if it doesn't exist.
        progress: How far the run has come.
        parameters: All trained parameters, in the optimizer's order.
        best: Their values in the best epoch; empty before the end of the first epoch.
        optimizer: The AdamW of these parameters.
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
    """Load a checkpoint into `parameters` and `optimizer`, in place.

    Args:
        path: The file.
        run: `Progress.run` of the run that resumes; the checkpoint must have the same.
        parameters: All trained parameters, in the optimizer's order.
        optimizer: The AdamW of these parameters.

    Returns:
        The progress, and the parameters' values in the best epoch so far.

    Raises:
        TrainingError: The file is not a checkpoint, or belongs to another run; then nothing is changed.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a mapping
        if (version := metadata.get("format_version")) != FORMAT_VERSION:
            raise TrainingError(f"{path} has checkpoint format {version!r}, this version reads {FORMAT_VERSION!r}")
        progress = Progress(**json.loads(metadata["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} is not a readable checkpoint: {error}") from error
    for name in sorted(progress.run.keys() | run.keys()):
        if progress.run.get(name) != run.get(name):
            raise TrainingError(
                f"{path} belongs to a run with {_difference(name, progress.run.get(name), run.get(name))}; "
                "resume with the settings and data of that run, or train into another folder"
            )
    for name, parameter in parameters.items():
        if (value := tensors.get(f"parameters.{name}")) is None or value.shape != parameter.shape:
            raise TrainingError(
                f"{path} has no {name} of shape {tuple(parameter.shape)}; it belongs to another adapter"
            )
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


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """Describe the difference between a checkpoint's value and this run's; of dicts, the first three fields."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        fields = [field for field in {**theirs, **ours} if theirs.get(field) != ours.get(field)]
        pairs = ", ".join(f"{field}={theirs.get(field)!r} (here {ours.get(field)!r})" for field in fields[:3])
        return f"{name} {pairs}"
    return f"{name} {str(theirs)[:60]!r} (here {str(ours)[:60]!r})"

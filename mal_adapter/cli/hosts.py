"""From the names of a model and an adapter to a recogniser, for the commands that hear."""

from collections.abc import Sequence
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.usage import as_typed

if TYPE_CHECKING:
    import torch

    from mal_adapter.ser.dialogue import Dialogue
    from mal_adapter.ser.labels import LabelSet
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer

__all__ = [
    "MODEL_PANEL",
    "Device",
    "Dtype",
    "DtypeOption",
    "Labels",
    "Prompt",
    "device_of",
    "load_model",
    "load_recognizer",
    "start_process",
]

MODEL_PANEL = "Model"


class Dtype(str, Enum):
    """Of a model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...", help="The possible answers (default: those of the adapter).", rich_help_panel=MODEL_PANEL
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="The question about each utterance (default: the adapter's).", rich_help_panel=MODEL_PANEL
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda or cuda:1; or auto, which spreads the model over all GPUs and the main memory (default: the "
        "first GPU if there is one).",
        rich_help_panel=MODEL_PANEL,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of the model's weights: bfloat16, float16, float32, or auto for the checkpoint's.",
        rich_help_panel=MODEL_PANEL,
    ),
]


def device_of(name: str | None) -> "torch.device | None":
    """What --device names; None for what is chosen later: without that option, and for auto.

    Raises:
        typer.BadParameter: there is no such device here.
    """
    import torch

    if name == "auto" and find_spec("accelerate") is None:
        raise typer.BadParameter("auto needs accelerate: pip install accelerate", param_hint="--device")
    if name is None or name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        message = f"{name!r} is no device; give cpu, cuda, cuda:1 or auto"
        raise typer.BadParameter(message, param_hint="--device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        message = f"there is no {name} here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        raise typer.BadParameter(message, param_hint="--device")
    return device


def load_model(name: str, device: "torch.device | None", dtype: Dtype, *, spread: bool = False) -> tuple[Any, Any]:
    """(model, processor) of a folder or Hub id.

    Args:
        name: folder or Hub id.
        device: where to; None for the usual one.
        dtype: of the weights.
        spread: over all devices, by accelerate.

    Raises:
        HostError: it can't be loaded.
    """
    from mal_adapter.ser.progress import working
    from mal_adapter.ser.recognizer.pretrained import load_named_host

    options = {"device_map": "auto"} if spread else {}
    with working(f"loading {name}"):
        return load_named_host(name, device=device, dtype=dtype.value, **options)


def load_recognizer(
    model_name: str | None,
    adapter_name: str | None,
    labels: str | None,
    prompt: str | None,
    device: "torch.device | None",
    dtype: Dtype,
    *,
    spread: bool = False,
    memory: bool = True,
    usual_labels: "LabelSet | None" = None,
    dialogues: "Sequence[Dialogue] | None" = None,
) -> "EmotionRecognizer":
    """A recogniser with the adapter's memory, labels and question, and with the LoRA that was trained beside it.

    Args:
        model_name: folder or Hub id; None is the adapter's.
        adapter_name: folder or Hub id; None is the model alone.
        labels: with commas; None are the adapter's, else `usual_labels`.
        prompt: None is the adapter's, else one that names the labels.
        device: as for `load_model`, like `dtype` and `spread`.
        memory: False leaves the adapter's memory out, but not its labels and question.
        usual_labels: those of the corpus.
        dialogues: some of whose utterances must have one of the labels; checked before the model is loaded.

    Raises:
        HostError: the model is not known or can't be loaded.
        LabelError: the labels are no label set, or not those of `dialogues`.
    """
    from mal_adapter import MemoryAdapter
    from mal_adapter.errors import HostError, raise_problems
    from mal_adapter.ser.labels import DEMO
    from mal_adapter.ser.recognizer.pretrained import find_host
    from mal_adapter.ser.recognizer.prompt import choose_task
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
    from mal_adapter.ser.suitability import label_problems

    adapter = None if adapter_name is None else MemoryAdapter.from_pretrained(adapter_name)
    if model_name is None and adapter is not None:
        model_name = find_host(adapter.metadata, adapter_name)
    if not model_name:
        raise HostError(f"{adapter_name} does not say which model it belongs to; add --model")
    given = None if labels is None else as_typed(labels).split(",")
    prompt = None if prompt is None else as_typed(prompt)
    label_set, question = choose_task(
        None if adapter is None else adapter.metadata, given, prompt, usual_labels or DEMO
    )
    if dialogues is not None:
        raise_problems(label_problems(dialogues, label_set))
    model, processor = load_model(model_name, device, dtype, spread=spread)
    if adapter_name is None or not memory:
        return EmotionRecognizer(model, processor, None, label_set, question)
    return EmotionRecognizer.from_pretrained(adapter_name, (model, processor), labels=label_set, prompt=question)


def start_process(device_name: str | None) -> "tuple[Any, torch.device | None]":
    """(accelerate's `PartialState`, the model's device), for the commands that `accelerate launch` may run.

    Raises:
        typer.BadParameter: there is no such device, or each of several processes has one of its own.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    device = device_of(device_name)
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate's one process takes the current one
    on_cpu = device is not None and device.type == "cpu"
    state = PartialState(cpu=on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    if device_name is not None and state.num_processes > 1:
        raise typer.BadParameter("accelerate launch gives each process its own device", param_hint="--device")
    return state, None if device_name == "auto" else device or state.device

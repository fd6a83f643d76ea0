"""Load a recogniser by the names of a model and an adapter, for the commands that run one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from mal_adapter.cli.options import Dtype
from mal_adapter.cli.usage import as_typed
from mal_adapter.extras import require

if TYPE_CHECKING:
    import torch

    from mal_adapter.memory.ensemble import AnyAdapter
    from mal_adapter.ser.dialogue import Dialogue
    from mal_adapter.ser.labels import LabelSet
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
    from mal_adapter.stores.base import SessionStore

__all__ = ["device_of", "find_task", "load_model", "load_recognizer", "start_process"]


def device_of(name: str | None) -> "torch.device | None":
    """The device of --device; None if it is chosen later: without the option, and for auto.

    Raises:
        typer.BadParameter: There is no such device here.
        MissingDependencyError: accelerate is not installed, which auto needs.
    """
    import torch

    if name == "auto":
        require("--device auto", "accelerate", extra="train")
    if name is None or name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        message = f"{name!r} is not a device; give cpu, cuda, cuda:1 or auto"
        raise typer.BadParameter(message, param_hint="--device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        message = f"there is no {name} here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        raise typer.BadParameter(message, param_hint="--device")
    return device


def load_model(name: str, device: "torch.device | None", dtype: Dtype, *, spread: bool = False) -> tuple[Any, Any]:
    """Load (model, processor) from a folder or the Hub.

    Args:
        name: A folder or Hub id.
        device: The device of the model; None for the default one.
        dtype: The dtype of the weights.
        spread: Spread the model over all devices with accelerate.

    Raises:
        HostError: The model can't be loaded.
    """
    from mal_adapter.ser.progress import working
    from mal_adapter.ser.recognizer.pretrained import load_named_host

    options = {"device_map": "auto"} if spread else {}
    with working(f"loading {name}"):
        return load_named_host(name, device=device, dtype=dtype.value, **options)


def find_task(
    model_name: str | None,
    adapter_name: str | None,
    labels: str | None,
    prompt: str | None,
    usual_labels: "LabelSet | None" = None,
) -> "tuple[AnyAdapter | None, str, LabelSet, str]":
    """(The adapter, the name of its host, the labels, the question), without loading the host.

    Args:
        model_name, adapter_name, labels, prompt, usual_labels: As for `load_recognizer`.

    Raises:
        HostError: The adapter does not name its model.
        LabelError: The labels are not a valid label set.
    """
    from mal_adapter.errors import HostError
    from mal_adapter.memory.ensemble import load_adapter
    from mal_adapter.ser.labels import DEMO
    from mal_adapter.ser.recognizer.pretrained import find_host
    from mal_adapter.ser.recognizer.prompt import choose_task

    adapter = None if adapter_name is None else load_adapter(adapter_name)
    if model_name is None and adapter is not None:
        model_name = find_host(adapter.metadata, adapter_name)
    if not model_name:
        raise HostError(f"{adapter_name} does not name its model; add --model")
    given = None if labels is None else as_typed(labels).split(",")
    prompt = None if prompt is None else as_typed(prompt)
    metadata = None if adapter is None else adapter.metadata
    return adapter, model_name, *choose_task(metadata, given, prompt, usual_labels or DEMO)


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
    store: "SessionStore | None" = None,
) -> "EmotionRecognizer":
    """Load a recogniser with the adapter's memory, labels and question, and with the LoRA that was trained with it.

    Args:
        model_name: A folder or Hub id; None for the adapter's model.
        adapter_name: A folder or Hub id; None for the model alone.
        labels: Separated by commas; None for the adapter's, else `usual_labels`.
        prompt: The question; None for the adapter's, else a question with the labels.
        device: As for `load_model`, like `dtype` and `spread`.
        memory: False omits the adapter's memory, but not its labels and question.
        usual_labels: The labels of the corpus.
        dialogues: Some of their utterances must have one of the labels; checked before the model is loaded.
        store: Of the memory's sessions; in this process unless given.

    Raises:
        HostError: The model is unknown or can't be loaded.
        LabelError: The labels are not a valid label set, or `dialogues` have none of them.
    """
    from mal_adapter.errors import raise_problems
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
    from mal_adapter.ser.suitability import label_problems

    _, model_name, label_set, question = find_task(model_name, adapter_name, labels, prompt, usual_labels)
    if dialogues is not None:
        raise_problems(label_problems(dialogues, label_set))
    model, processor = load_model(model_name, device, dtype, spread=spread)
    if adapter_name is None or not memory:
        return EmotionRecognizer(model, processor, None, label_set, question)
    return EmotionRecognizer.from_pretrained(
        adapter_name, (model, processor), labels=label_set, prompt=question, store=store
    )


def start_process(device_name: str | None) -> "tuple[Any, torch.device | None]":
    """(accelerate's `PartialState`, the model's device), for commands that `accelerate launch` may run.

    Raises:
        typer.BadParameter: The device does not exist, or it is given although there are several processes.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    device = device_of(device_name)
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate's single process uses the current device
    on_cpu = device is not None and device.type == "cpu"
    state = PartialState(cpu=on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    if device_name is not None and state.num_processes > 1:
        raise typer.BadParameter("accelerate launch gives each process its own device", param_hint="--device")
    return state, None if device_name == "auto" else device or state.device

"""From the names of a model and an adapter to a recogniser, for the commands that hear."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.output import quiet_transformers

if TYPE_CHECKING:
    from mal_adapter.ser.labels import LabelSet
    from mal_adapter.ser.recognizer import EmotionRecognizer

__all__ = ["Labels", "Prompt", "load_model", "load_recognizer"]

Labels = Annotated[str | None, typer.Option(help="The possible answers, with commas (default: those of the adapter).")]
Prompt = Annotated[str | None, typer.Option(help="The question about each utterance (default: that of the adapter).")]


def load_model(name: str) -> tuple[Any, Any]:
    """(model, processor) of a folder or Hub id.

    Raises:
        HostError: it can't be loaded.
    """
    from mal_adapter.errors import HostError
    from mal_adapter.ser.loading import load_host

    quiet_transformers()
    try:
        return load_host(name)
    except (OSError, ValueError) as error:
        raise HostError(f"the model {name} can not be loaded: {str(error).strip().splitlines()[0]}") from error


def load_recognizer(
    model_name: str | None,
    adapter_name: str | None,
    labels: str | None,
    prompt: str | None,
    *,
    memory: bool = True,
    usual_labels: "LabelSet | None" = None,
) -> "EmotionRecognizer":
    """A recogniser with the adapter's memory, labels and question, and with the LoRA that was trained beside it.

    Args:
        model_name: folder or Hub id; None is the adapter's.
        adapter_name: folder or Hub id; None is the model alone.
        labels: with commas; None are the adapter's, else `usual_labels`.
        prompt: None is the adapter's, else one that names the labels.
        memory: False leaves the adapter's memory out, but not its labels and question.
        usual_labels: those of the corpus.

    Raises:
        HostError: the model is not known or can't be loaded.
    """
    from mal_adapter import MemoryAdapter, attach_memory
    from mal_adapter.errors import HostError
    from mal_adapter.ser.labels import DEMO, LabelSet
    from mal_adapter.ser.recognizer import EmotionRecognizer

    adapter = None if adapter_name is None else MemoryAdapter.from_pretrained(adapter_name)
    if model_name is None and adapter is not None:
        model_name = adapter.card.base_model_name_or_path
    if not model_name:
        raise HostError(f"{adapter_name} does not say which model it belongs to; add --model")
    model, processor = load_model(model_name)
    attached = None
    if adapter is not None and memory:
        model = _with_lora(model, Path(str(adapter_name)))
        attached = attach_memory(model, adapter=adapter)

    task: dict[str, Any] = (adapter.card.task if adapter is not None else None) or {}
    if labels is not None:
        label_set = LabelSet(tuple(name.strip() for name in labels.split(",")))
    elif "labels" in task:
        label_set = LabelSet(tuple(task["labels"]), task.get("aliases", {}))
    else:
        label_set = usual_labels or DEMO
    # The adapter's question may name its own labels, so other labels bring the default question.
    question = prompt if prompt is not None or labels is not None else task.get("prompt")
    return EmotionRecognizer(model, processor, attached, label_set, question)


def _with_lora(model: Any, adapter_folder: Path) -> Any:
    """The model with the LoRA in a folder that `mal-adapter train --lora-rank` has written."""
    from mal_adapter.errors import HostError

    folder = adapter_folder / "lora"
    if not (folder / "adapter_config.json").is_file():
        return model
    try:
        from peft import PeftModel
    except ImportError as error:
        raise HostError(f"{folder} is a LoRA, which needs peft: pip install 'mal-adapter[train]'") from error
    return PeftModel.from_pretrained(model, str(folder))

"""The model card: `README.md` of an adapter folder, for people and for the Hub."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mal_adapter.errors import AdapterFormatError
from mal_adapter.serialization.metadata import AdapterMetadata

__all__ = ["model_card"]

BEGIN = "<!-- mal_adapter: what stands from here to the end mark is rewritten at each save -->"
END = "<!-- mal_adapter: end; write your own text after this line -->"
_TAGS = ["mal_adapter", "speech-emotion-recognition", "test-time-memory", "titans"]


def model_card(
    memory: Mapping[str, Any], metadata: AdapterMetadata, *, repo_id: str | None = None, existing: str = ""
) -> str:
    """The text of an adapter's `README.md`.

    Args:
        memory: The memory's sizes: `memory_dim`, `num_heads` and `depth`; and `members`, if there are several.
        metadata: Host, task, training data and results.
        repo_id: The Hub repository that the snippet loads from; a folder if None.
        existing: The present text. The user's own text outside of the two marks is kept, and so are metadata under
            other keys (`license`, `language`, …) and additional tags.

    Raises:
        AdapterFormatError: The metadata of `existing` can't be read.

    Example:
        >>> memory = {"memory_dim": 256, "num_heads": 4, "depth": 2}
        >>> text = model_card(memory, AdapterMetadata(base_model_name_or_path="org/host"))
        >>> ModelCard(text).data.base_model
        'org/host'
        >>> "MIT" in model_card(memory, AdapterMetadata(), existing=text + "License: MIT")
        True
    """
    ours = _metadata(metadata, repo_id)
    theirs: dict[str, Any] = {}
    text = ""
    if existing.strip():
        try:
            before = ModelCard(existing)
            theirs, text = before.data.to_dict(), before.text  # type: ignore[no-untyped-call]
            tags = [*ours["tags"], *(theirs.get("tags") or [])]
            ours["tags"] = list(dict.fromkeys(map(str, tags)))
        except Exception as error:  # YAML's errors, and any other that a value of an unexpected type causes
            raise AdapterFormatError(
                f"the metadata at the top of README.md can't be read ({error}); correct or remove them"
            ) from error
    generated = f"{BEGIN}\n{_body(memory, metadata, repo_id)}\n{END}"
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if found and closed:
        text = head + generated + tail
    else:
        text = f"{text.rstrip()}\n\n{generated}\n" if text.strip() else f"\n{generated}\n"
    header = ModelCardData(**{**theirs, **ours})
    return f"---\n{header.to_yaml()}\n---\n{text}"


def _metadata(metadata: AdapterMetadata, repo_id: str | None) -> dict[str, Any]:
    results = [
        EvalResult(
            task_type="audio-classification",
            task_name="Speech emotion recognition in conversation",
            dataset_type=result["dataset_type"],
            dataset_name=result["dataset_name"],
            dataset_split=result.get("dataset_split"),
            metric_type=metric,
            metric_value=value,
            metric_name=name,
        )
        for result in metadata.evaluation or []
        for kind, name_of in (("metrics", "{}"), ("host_metrics", "{} of the bare host"))
        for metric, value in result.get(kind, {}).items()
        for name in (name_of.format(metric),)
    ]
    header = {
        "base_model": metadata.base_model_name_or_path,
        "library_name": "mal_adapter",
        "pipeline_tag": "audio-classification",
        "tags": _TAGS,
        "datasets": metadata.datasets,
        "metrics": sorted({m for result in metadata.evaluation or [] for m in result["metrics"]}),
    }
    header = {name: value for name, value in header.items() if value}
    if results:
        data = ModelCardData(eval_results=results, model_name=(repo_id or "mal_adapter memory").rpartition("/")[2])
        header["model-index"] = data.to_dict()["model-index"]  # type: ignore[no-untyped-call]
    return header


def _body(memory: Mapping[str, Any], metadata: AdapterMetadata, repo_id: str | None) -> str:
    host = metadata.base_model_name_or_path or "an audio language model"
    place = "a decoder layer" if metadata.layer_idx is None else f"decoder layer {metadata.layer_idx}"
    parts = [
        f"# A dialogue memory for {_plain(host)}",
        "A [mal_adapter](https://pypi.org/project/mal-adapter/) memory: it writes the audio tokens of each utterance "
        "into fast weights at test time and reads them back at the later ones, so that the host knows how this speaker "
        f"usually sounds. It is attached to {place}, has a width of {memory['memory_dim']}, and "
        f"{memory['num_heads']} heads of depth {memory['depth']}. "
        f"{_members(memory.get('members', 1))}The host's own weights are unchanged and not part of this repository.",
        "## Use",
        f"```python\n{_snippet(metadata, repo_id)}\n```",
    ]
    if metadata.task and metadata.task.get("labels"):
        parts.append(f"Labels: {_plain(', '.join(metadata.task['labels']))}.")
    training = metadata.training_data or "Not documented by its author."
    if metadata.datasets:
        training += f" Datasets: {', '.join(metadata.datasets)}."
    parts += ["## Training data", _plain(training)]
    if metadata.evaluation:
        parts += ["## Results", _results(metadata.evaluation)]
    parts += [
        "## Limits",
        "- It fits this host only: another checkpoint of the same shape gives a warning and worse answers, another "
        "shape an error.\n"
        "- Each dialogue needs a session of its own; a state must not be shared between dialogues.\n"
        "- A state is derived from a voice: treat a saved one like the recording it came from.\n"
        "- Labels are those of its training data. How well they transfer to other languages, microphones or "
        "spontaneous speech is not known unless it is reported under Results.",
    ]
    return "\n\n".join(parts)


def _members(count: int) -> str:
    if count == 1:
        return ""
    return (
        f"It has {count} members, trained from different seeds, and answers with the mean of their probabilities: one "
        f"forward of the host, and {count} of the layers above the memory. "
    )


def _snippet(metadata: AdapterMetadata, repo_id: str | None) -> str:
    host = metadata.base_model_name_or_path or "the host's name or folder"
    adapter = repo_id or "the folder of this file"
    return f"""import numpy as np
import soundfile

from mal_adapter import attach_memory
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer

model, processor = load_host({_literal(host)})
memory = attach_memory(model, adapter={_literal(adapter)})
recognizer = EmotionRecognizer(model, processor, memory)

for n in range(2):  # noise instead of your recordings
    soundfile.write(f"turn{{n}}.wav", 0.1 * np.random.default_rng(n).standard_normal(16_000), 16_000)
turns = [Utterance("call-42", str(n), "A", f"turn{{n}}.wav") for n in range(2)]
for result in recognizer.recognize(Dialogue("call-42", turns)):
    print(result.utterance.audio, result.label)"""


def _literal(value: object) -> str:
    """A Python literal of `value`, in which no HTML comment can be mistaken for one of the two marks."""
    return repr(value).replace("<!--", "<\\x21--")


def _results(evaluation: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| dataset | split | metric | bare host | with memory |", "|---|---|---|---|---|"]
    for result in evaluation:
        for metric, value in result["metrics"].items():
            bare = result.get("host_metrics", {}).get(metric, "")
            cells = (result["dataset_name"], result.get("dataset_split", ""), metric, bare, value)
            lines.append("| " + " | ".join(_plain(str(cell)).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """The text on one line, in which no HTML comment can be mistaken for one of the two marks."""
    return re.sub(r"\s+", " ", text).replace("<!--", "&lt;!--").strip()

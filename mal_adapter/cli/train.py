"""`mal-adapter train`."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.data import Data, note_omissions, read_data
from mal_adapter.cli.hosts import load_model, start_process
from mal_adapter.cli.options import (
    CORPUS_PANEL,
    MODEL_PANEL,
    Corpus,
    Device,
    Dtype,
    DtypeOption,
    Root,
    Split,
    json_option,
    labels_option,
    model_option,
    prompt_option,
)
from mal_adapter.cli.output import load_libraries, note, print_json, print_line
from mal_adapter.cli.usage import as_typed, shown
from mal_adapter.extras import explain_missing

if TYPE_CHECKING:
    from mal_adapter import MemoryConfig
    from mal_adapter.ser.dialogue import Dialogue
    from mal_adapter.ser.labels import LabelSet
    from mal_adapter.ser.training.config import TrainingConfig

__all__ = ["train"]

PANEL = "Training"


@shown(
    "Train and measure",
    (
        "A memory for a model, with dev dialogues to choose the best epoch",
        "mal-adapter train train.jsonl --dev dev.jsonl \\\n"
        "--model Qwen/Qwen2-Audio-7B-Instruct --layer 16 --output my-memory",
    ),
    (
        "With the control that an honest evaluation needs",
        "mal-adapter train train.jsonl --dev dev.jsonl --with-control \\\n"
        "--model Qwen/Qwen2-Audio-7B-Instruct --layer 16 --output my-memory",
    ),
    (
        "Three memories from three seeds, whose answers are averaged",
        "mal-adapter train train.jsonl --dev dev.jsonl --members 3 \\\n"
        "--model Qwen/Qwen2-Audio-7B-Instruct --layer 16 --output my-memory",
    ),
    (
        "On MELD, with a file of settings; continue an interrupted run",
        "mal-adapter train meld --root MELD.Raw --dev dev --resume \\\n"
        "--config settings.json --model Qwen/Qwen2-Audio-7B-Instruct --layer 16 \\\n"
        "--output my-memory",
    ),
    (
        "On all GPUs",
        "accelerate launch -m mal_adapter.cli train train.jsonl --dev dev.jsonl \\\n"
        "--model Qwen/Qwen2-Audio-7B-Instruct --layer 16 --output my-memory",
    ),
)
def train(
    corpus: Corpus,
    *,
    root: Root = None,
    split: Split = None,
    dev: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A split of the corpus, or a manifest: to choose the best epoch and to stop early.",
            rich_help_panel=CORPUS_PANEL,
        ),
    ] = None,
    model: Annotated[str, model_option()],
    layer: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="The decoder layer after which the memory is read, from 0; try the middle one.",
            rich_help_panel=MODEL_PANEL,
        ),
    ],
    labels: Annotated[str | None, labels_option("the corpus's")] = None,
    prompt: Annotated[str | None, prompt_option("one that names the labels")] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Passes over all dialogues, at most (default: 10).",
            rich_help_panel=PANEL,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="X", help="Of AdamW, after warm-up (default: 0.001).", rich_help_panel=PANEL),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Also train a LoRA of this rank on the decoder (default: none).", rich_help_panel=PANEL
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of initial weights, order and dropout (default: 0).", rich_help_panel=PANEL),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON with fields of TrainingConfig and, under the key memory, of MemoryConfig. The options above "
            "override them.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the memory changes: titans, running_mean, gru; answers, which keeps past answers alone; or none, "
            "the control without a past (default: titans).",
            rich_help_panel=PANEL,
        ),
    ] = None,
    keep_answers: Annotated[
        bool,
        typer.Option(
            "--keep-answers",
            help="The memory also keeps what the model has answered: the probabilities of the labels. For dialogues "
            "in which emotions persist. The same as num_labels of MemoryConfig.",
            rich_help_panel=PANEL,
        ),
    ] = False,
    members: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Train N memories, with the seeds --seed, --seed + 1, …, as one adapter, and average their answers. "
            "An answer takes one forward below the layer and N above it (default: 1).",
            rich_help_panel=PANEL,
        ),
    ] = 1,
    with_control: Annotated[
        bool,
        typer.Option(
            "--with-control",
            help="Also train the control: the same memory without a past, from the same seeds and batches, in the "
            "folder control of the output. evaluate finds it there.",
            rich_help_panel=PANEL,
        ),
    ] = False,
    activations: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Run the frozen part of the model once per utterance and save its output in this folder. Runs with "
            "other seeds or memories can share it.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the checkpoint in the output folder; start if there is none.",
            rich_help_panel=PANEL,
        ),
    ] = False,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="For the trained adapter.", rich_help_panel="Output")],
    log_with: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A tracker of accelerate, such as tensorboard, which writes to the output folder.",
            rich_help_panel="Output",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        json_option(
            "output, and those of training.json: config, memory, labels, train, host_dev, epochs, best_epoch, left_out "
            "and others; with several --members, members with a report each; control, the same of --with-control"
        ),
    ] = False,
) -> None:
    """Train a memory for a model on dialogues with known emotions. The model itself isn't changed.

    Pass the output folder to predict and evaluate as --adapter. If a training was interrupted, run the same command
    with --resume: the result is the same as without the interruption.
    """
    load_libraries()
    from mal_adapter.errors import MalAdapterError, SharedSpeakersWarning, UninformativeDataWarning, raise_problems
    from mal_adapter.ser.evaluation.control import CONTROL_NAME
    from mal_adapter.ser.suitability import label_problems, sound_problems

    with explain_missing("training", extra="train"):
        from mal_adapter.ser.training.members import members_problems, train_members
        from mal_adapter.ser.training.train import ACTIVATIONS_NAME

    given: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "lora_rank": lora_rank, "seed": seed}
    given["cache_activations"] = None if activations is None else True
    settings, memory_config = _settings(
        config, {name: value for name, value in given.items() if value is not None}, update
    )
    if with_control:
        _check_control(settings, memory_config)
    data = read_data(corpus, root, split, ("train",))
    dialogues, dev_dialogues = data.dialogues, _read_dev(corpus, root, dev)
    label_set = _choose_labels(labels, data)
    if keep_answers or (memory_config.update == "answers" and memory_config.num_labels is None):
        memory_config = replace(memory_config, num_labels=len(label_set))
    state, place = start_process(device)
    problems: list[MalAdapterError] = []
    for what, given_dialogues in (("training", dialogues), ("dev", dev_dialogues)):
        if given_dialogues:
            problems += label_problems(given_dialogues, label_set, what)
            problems += sound_problems(given_dialogues, label_set, what)
    folders = [output, output / CONTROL_NAME] if with_control else [output]
    of_folders = [problem for folder in folders for problem in members_problems(folder, members, settings, resume)]
    problems += {str(problem): problem for problem in of_folders}.values()
    raise_problems(problems)
    if state.is_main_process:
        note_omissions([*dialogues, *dev_dialogues], label_set)
    host, processor = load_model(model, place, dtype, spread=device == "auto")
    question = None if prompt is None else as_typed(prompt)
    if with_control and settings.cache_activations and activations is None:
        activations = output / ACTIVATIONS_NAME  # for both
    reports = []
    for folder in folders:
        with warnings.catch_warnings():
            if folder != output:
                for kind in (SharedSpeakersWarning, UninformativeDataWarning):  # the same dialogues again
                    warnings.simplefilter("ignore", kind)
            try:
                report = train_members(
                    host,
                    processor,
                    layer,
                    dialogues,
                    dev_dialogues,
                    members=members,
                    output=folder,
                    memory=memory_config,
                    config=settings,
                    labels=label_set,
                    prompt=question,
                    resume=resume,
                    activations=activations,
                    log_with=log_with,
                )
            except KeyboardInterrupt:
                note("run the same command with --resume to continue from the last checkpoint")
                raise
        reports.append({"output": str(folder), **report})
        memory_config = replace(memory_config, update="none")
    if state.is_main_process and as_json:
        print_json({**reports[0], **({"control": reports[1]} if with_control else {})})
    elif state.is_main_process:
        for folder, report in zip(folders, reports, strict=True):
            _print(report, folder)


def _check_control(settings: "TrainingConfig", memory: "MemoryConfig") -> None:
    """Raise ConfigError if this memory can have no control."""
    from mal_adapter.errors import ConfigError

    if memory.update == "none":
        raise ConfigError("update none is the control itself; leave out --with-control")
    if settings.lora_rank is not None:
        raise ConfigError(
            "with a LoRA, memory and control are trained with hosts that differ; train the control on its own, with "
            "--update none, and compare the evaluations with --against"
        )


def _settings(path: Path | None, given: dict[str, Any], update: str | None) -> "tuple[TrainingConfig, MemoryConfig]":
    """Read the `TrainingConfig` and the `MemoryConfig` from the file; `given` options and `update` override it."""
    from mal_adapter import MemoryConfig
    from mal_adapter.errors import ConfigError
    from mal_adapter.ser.training.config import TrainingConfig
    from mal_adapter.serialization.strict_json import parse_json

    fields: Any = {}
    if path is not None:
        try:
            fields = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} can not be read: {getattr(error, 'strerror', None) or error}") from error
    memory = fields.pop("memory", {}) if isinstance(fields, dict) else None
    if not isinstance(memory, dict):
        raise ConfigError(f"{path} is not a JSON object, or its field 'memory' is not one")
    memory |= {} if update is None else {"update": update}
    # from_dict needs a width. If the file gives none, attach_memory takes that of the host.
    memory_config = MemoryConfig.from_dict({**memory, "hidden_size": 1})
    memory_config = replace(memory_config, hidden_size=memory.get("hidden_size"))
    return TrainingConfig.from_dict({**fields, **given}), memory_config


def _read_dev(corpus: str, root: Path | None, dev: str | None) -> "list[Dialogue]":
    from mal_adapter.ser.dialogue import read_manifest

    if dev is None:
        return []
    return read_manifest(dev) if dev.lower().endswith(".jsonl") else read_data(corpus, root, [dev], ()).dialogues


def _choose_labels(names: str | None, data: Data) -> "LabelSet":
    """The labels that were given, else those of the corpus, else the emotions in the manifest."""
    from mal_adapter.errors import LabelError
    from mal_adapter.ser.labels import LabelSet, emotions_that_occur

    if names is not None:
        return LabelSet(tuple(as_typed(names).split(",")))
    if data.labels is not None:
        return data.labels
    found = emotions_that_occur(utterance.emotion for dialogue in data.dialogues for utterance in dialogue.utterances)
    if len(found) < 2:
        raise LabelError("the training manifest has fewer than two emotions; label its utterances, or give --labels")
    return LabelSet(found)


def _print(report: dict[str, Any], output: Path) -> None:
    def described(metrics: dict[str, float]) -> str:
        return f"dev loss {metrics['loss']:.3f}, dev weighted F1 {metrics['weighted_f1']:.3f}"

    if several := report.get("members"):
        for number, one in enumerate(several):
            _print(one, output / "members" / str(number))
        print_line(f"saved in {output}: {len(several)} members")
        return
    if report["host_dev"]:
        print_line(f"bare host: {described(report['host_dev'])}")
    for entry in report["epochs"]:
        dev = f", {described(entry['dev'])}" if "dev" in entry else ""
        print_line(f"epoch {entry['epoch']}: loss {entry['loss']:.3f}{dev}")
    print_line(f"saved in {output}: epoch {report['best_epoch']}")

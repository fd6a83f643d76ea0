"""Train a memory on dialogues, with the recogniser's own prompt and scores, on any number of processes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed

from mal_adapter.errors import ConfigError, TrainingError, raise_problems
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.progress import progress_bar
from mal_adapter.ser.provenance import digest_of
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.suitability import warn_of_no_past, warn_of_shared_speakers
from mal_adapter.ser.training.arguments import argument_problems, trainable_memory
from mal_adapter.ser.training.batches import Unusable, batches_of_epoch, report_unusable
from mal_adapter.ser.training.cached_host import CachedHost
from mal_adapter.ser.training.cached_recognizer import CachedRecognizer
from mal_adapter.ser.training.checkpoint import CHECKPOINT_NAME, Progress, load_checkpoint, save_checkpoint
from mal_adapter.ser.training.config import TrainingConfig
from mal_adapter.ser.training.step import Stepper
from mal_adapter.ser.training.summary import trained_metadata, training_report
from mal_adapter.ser.training.trainable import Trainable
from mal_adapter.ser.training.utterance_length import usual_tokens
from mal_adapter.ser.training.validation import dev_scores
from mal_adapter.serialization.atomic import remove_leftovers, write_atomically

__all__ = ["ACTIVATIONS_NAME", "REPORT_NAME", "train_memory"]

REPORT_NAME, LORA_NAME, ACTIVATIONS_NAME = "training.json", "lora", "activations"


def train_memory(
    recognizer: EmotionRecognizer,
    train: Sequence[Dialogue],
    dev: Sequence[Dialogue] = (),
    *,
    output: str | os.PathLike[str],
    config: TrainingConfig | None = None,
    resume: bool = False,
    activations: str | os.PathLike[str] | None = None,
    log_with: str | None = None,
    training_data: str | None = None,
    datasets: Sequence[str] = (),
) -> dict[str, Any]:
    """Train the recogniser's memory on whole dialogues; save the best adapter and a report in `output`.

    Utterances without a label, or with a label that the recogniser doesn't have, are written to the memory but have no
    loss. Utterances whose audio can't be used are logged and left out. Under `accelerate launch` each process runs a
    share of every batch. All arguments are checked before the host runs, and one error lists all problems.

    A fresh Titans memory's gates start for the usual number of audio tokens of an utterance, measured here, unless
    `utterance_tokens` of its configuration is given.

    What is mutated: The memory's adapter; at the end it has the weights of the best epoch and is in eval mode. With
    `lora_rank` the host gets PEFT's layers, trained; without, the host's weights don't change. Random states are set.
    The sessions of the dialogues are deleted.

    Args:
        recognizer: With a memory. Its model, labels and prompt are those of training.
        train: Dialogues with different ids.
        dev: Other dialogues, to choose the best epoch and to stop early. Without them the last epoch is the best.
        output: Folder for the adapter: `config.json`, `model.safetensors`, `README.md` and `training.json`. The LoRA is
            saved in `lora`, the state of an unfinished run in `checkpoint`.
        config: The settings; `TrainingConfig()` if None.
        resume: Continue from the checkpoint in `output`; start if there is none. On the CPU a resumed run ends with the
            same bits as an uninterrupted one.
        activations: Folder for the files of `cache_activations`; `activations` in `output` if None. Runs with the same
            host, layer, prompt and dialogues can share it, for example with other seeds or another memory.
        log_with: A tracker of accelerate, such as "tensorboard", which writes to `output`.
        training_data: A description of the data for the model card; counts of dialogues and labels if None.
        datasets: Hub ids of the data sets, for the model card.

    Returns:
        The content of `training.json`: configuration, an entry per epoch, the best epoch, the dev metrics of the host
        alone, and library versions.

    Raises:
        ConfigError: The recogniser has no memory, a dialogue id is repeated, settings can't be combined, or accelerate
            can't use them here.
        LabelError: No utterance has one of the labels.
        AudioError: The sound files of all labelled utterances are missing.
        AdapterFormatError: The adapter can't be saved in `output`, or `training_data` or `datasets` are not text.
        SessionError: The memory is detached, the caller's block has a session open, or a dialogue id is not a valid
            session id.
        HostError: The host can't run from cached activations.
        TrainingError: A loss or gradient is not finite (the checkpoint has the last good values); no labelled utterance
            has usable audio; or `output` can't be written to, or has an adapter or a checkpoint of another run.
        MissingDependencyError: PEFT, for `lora_rank`, or the tracker of `log_with` is not installed.

    Warns:
        UninformativeDataWarning: No labelled utterance has an earlier one in its dialogue, so the memory can learn
            nothing.
        SharedSpeakersWarning: The training dialogues have speakers in common with the dev dialogues, or with the
            `training_speakers` in the host's config.
    """
    output, config = Path(output), TrainingConfig() if config is None else config
    raise_problems(
        argument_problems(
            recognizer, train, dev, output, config, resume, log_with, training_data, datasets, activations
        )
    )
    warn_of_no_past(train, recognizer.labels, "training")
    warn_of_no_past(dev, recognizer.labels, "dev")
    warn_of_shared_speakers(train, dev, getattr(recognizer.model, "config", None))
    cache_folder = output / ACTIVATIONS_NAME if activations is None else Path(activations)
    run = _Run(recognizer, train, dev, output, config, cache_folder, log_with)
    run.train()
    return run.save_results(training_data, datasets)


class _Run:
    """One run of `train_memory`: its parts, its progress, and what it saves."""

    def __init__(
        self,
        recognizer: EmotionRecognizer,
        train: Sequence[Dialogue],
        dev: Sequence[Dialogue],
        output: Path,
        config: TrainingConfig,
        cache_folder: Path,
        log_with: str | None,
    ) -> None:
        memory = trainable_memory(recognizer)
        self.recognizer, self.memory, self.config, self.output = recognizer, memory, config, output
        self.dialogues, self.dev = list(train), list(dev)
        self.checkpoint = output / CHECKPOINT_NAME
        self.log_with = log_with
        self.accelerator = _make_accelerator(config, output, log_with)
        if getattr(recognizer.model, "hf_device_map", None) is None:
            recognizer.model.to(self.accelerator.device)
            memory.adapter.to(self.accelerator.device)
        self._start_gates()
        set_seed(config.seed)  # so that a LoRA has the same initial weights in all processes
        self.trainable = Trainable(
            recognizer.model, memory, config.lora_rank, gradient_checkpointing=config.gradient_checkpointing
        )
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        total = self.steps_per_epoch * config.epochs
        self.cached = CachedHost(recognizer, memory, cache_folder) if config.cache_activations else None
        self.on_dev = recognizer if self.cached is None else CachedRecognizer(recognizer, self.cached)
        self.stepper = Stepper(
            self.cached or recognizer, memory, self.trainable, train, config, self.accelerator, total
        )
        self.best: dict[str, torch.Tensor] = {}
        self.unusable: Unusable = {}
        self.progress = Progress(self._identity())

    def train(self) -> None:
        """Run all epochs that are left; then set the parameters to those of the best epoch."""
        self._start_or_resume()
        with self.trainable.frozen():
            if self.cached is not None:
                self._fill_cache(self.cached)
            if self.dev and self.progress.host_dev is None:
                self.progress.host_dev = self._score_dev(self.on_dev.without_memory())
            while not self._finished():
                self._run_epoch()
                self._end_epoch()
        self.trainable.load_values(self.best)

    def save_results(self, training_data: str | None, datasets: Sequence[str]) -> dict[str, Any]:
        """Save adapter, LoRA and report in the output folder; return the report."""
        labels, prompt, adapter = self.recognizer.labels, self.recognizer.prompt, self.memory.adapter
        report = training_report(self.progress, self.dialogues, labels, self.accelerator.num_processes)
        adapter.metadata = trained_metadata(adapter.metadata, labels, prompt, report, training_data, datasets)
        if self.accelerator.is_main_process:
            adapter.save_pretrained(self.output)
            self.trainable.save_lora(self.output / LORA_NAME)
            write_atomically(self.output / REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())
        if self.log_with is not None:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        return report

    # -------------------------------------------------------------------------------------------------- the start

    def _start_gates(self) -> None:
        """Start the gates of a fresh memory for utterances as long as these, unless their length is given."""
        adapter = self.memory.adapter.members[0]
        has_gates = adapter.config.update in ("titans", "answers", "none")
        if not has_gates or adapter.config.utterance_tokens is not None or not adapter.is_fresh:
            return
        tokens = usual_tokens(self.recognizer, self.dialogues, self.config.side_by_side)
        if tokens is not None:
            adapter.start_gates(tokens)

    def _identity(self) -> dict[str, Any]:
        """Describe the run, in JSON values. A run that resumes this one must have the same description."""
        identity = {
            "config": self.config.to_dict(),
            "memory": self.memory.adapter.config.to_dict(),
            "layer_idx": self.memory.layer_idx,
            "dtype": str(self.recognizer.model.dtype).removeprefix("torch."),
            "labels": list(self.recognizer.labels),
            "prompt": self.recognizer.prompt,
            "dialogues": digest_of(self.dialogues, self.dev),
        }
        decoded: dict[str, Any] = json.loads(json.dumps(identity))
        return decoded

    def _start_or_resume(self) -> None:
        if self.checkpoint.exists():
            parameters = self.trainable.parameters
            self.progress, self.best = load_checkpoint(
                self.checkpoint, self.progress.run, parameters, self.stepper.optimizer
            )
            self.unusable.update({(d, u): reason for d, u, reason in self.progress.unusable})
        for parameter in self.trainable.parameters.values():
            broadcast(parameter.data)  # fresh adapters differ between processes; that of the first one is used
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.checkpoint.parent, older_than_s=0)  # no other process trains into this folder
        self.stepper.start(self.progress.epoch * self.steps_per_epoch + self.progress.step)
        if self.log_with is not None:
            self.accelerator.init_trackers("mal_adapter")

    def _fill_cache(self, cached: CachedHost) -> None:
        """Cache the activations of all utterances; each process runs a share of the dialogues."""
        here = self.accelerator
        share = slice(here.process_index, None, here.num_processes)
        own = [u for d in self.dialogues[share] for u in d.utterances]
        own = [u for u in own if (u.dialogue_id, u.utterance_id) not in self.unusable]
        of_dev = [u for d in self.dev[share] for u in d.utterances]
        size = self.config.side_by_side
        total = len(own) + len(of_dev)
        with progress_bar(desc="caching", total=total, unit="utterance", shown=here.is_main_process) as bar:
            for start in range(0, len(own), size):
                for failure in cached.keep(own[start : start + size]):
                    report_unusable(failure, self.unusable)
                bar.update(len(own[start : start + size]))
            for start in range(0, len(of_dev), size):
                cached.keep(of_dev[start : start + size])
                bar.update(len(of_dev[start : start + size]))
        here.wait_for_everyone()
        self.unusable.update(gather_object(list(self.unusable.items())))

    def _finished(self) -> bool:
        done, best = self.progress.epoch, self.progress.best_epoch
        stale = self.config.patience is not None and best is not None and done - best >= self.config.patience
        return done >= self.config.epochs or (bool(self.dev) and stale)

    # ------------------------------------------------------------------------------------------------ one epoch

    def _run_epoch(self) -> None:
        progress, config = self.progress, self.config
        batches = batches_of_epoch(self.dialogues, config.batch_size, config.seed, progress.epoch)
        bar = progress_bar(
            desc=f"epoch {progress.epoch + 1}/{config.epochs}",
            total=sum(len(dialogue.utterances) for dialogue in self.dialogues),
            initial=progress.utterances,
            unit="utterance",
            shown=self.accelerator.is_main_process,
        )
        with bar:
            for batch in batches[progress.step :]:
                try:
                    tally = self.stepper.step([self.dialogues[index] for index in batch], self.unusable)
                except TrainingError:
                    self._save_checkpoint()
                    raise
                progress.step += 1
                progress.loss += tally.loss
                progress.weight += tally.weight
                progress.utterances += int(tally.utterances)
                bar.update(int(tally.utterances))
                bar.set_postfix(loss=f"{progress.loss / (progress.weight or 1):.3f}", refresh=False)
                self._log({"loss": tally.loss / (tally.weight or 1), "learning_rate": self.stepper.learning_rate})
                if progress.step % config.checkpoint_every == 0 and progress.step < len(batches):
                    self._save_checkpoint()

    def _end_epoch(self) -> None:
        progress = self.progress
        if not progress.weight:
            reason = next(iter(self.unusable.values()), "their weights are zero")
            raise TrainingError(f"no labelled utterance of this epoch is in the loss, so nothing is learned: {reason}")
        self.unusable.update(gather_object(list(self.unusable.items())))
        entry: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "loss": progress.loss / (progress.weight or 1),
            "utterances": progress.utterances,
        }
        if self.dev:
            entry["dev"] = self._score_dev(self.on_dev)
            self._log({f"dev_{name}": value for name, value in entry["dev"].items()})
        if self._is_best(entry):
            progress.best_epoch = entry["epoch"]
            self.best = self.trainable.copy_values()
        progress.history.append(entry)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss, progress.weight, progress.utterances = 0.0, 0.0, 0
        self._save_checkpoint()

    def _is_best(self, entry: dict[str, Any]) -> bool:
        if not self.dev or self.progress.best_epoch is None:
            return True
        best = self.progress.history[self.progress.best_epoch - 1]["dev"]
        if self.config.select_by == "loss":
            return bool(entry["dev"]["loss"] < best["loss"])
        return bool(entry["dev"]["weighted_f1"] > best["weighted_f1"])

    def _score_dev(self, recognizer: EmotionRecognizer) -> dict[str, float]:
        scores = dev_scores(recognizer, self.dev, self.accelerator, self.config.side_by_side)
        self.memory.states.forget(dialogue.dialogue_id for dialogue in self.dev)
        return scores

    # ------------------------------------------------------------------------------------------- what is saved

    def _log(self, values: dict[str, float]) -> None:
        if self.log_with is not None:
            self.accelerator.log(values, step=self.stepper.steps_done)

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            self.progress.unusable = [[*key, reason] for key, reason in sorted(self.unusable.items())]
            save_checkpoint(
                self.checkpoint, self.progress, self.trainable.parameters, self.best, self.stepper.optimizer
            )


def _make_accelerator(config: TrainingConfig, output: Path, log_with: str | None) -> Accelerator:
    """Join the processes.

    Raises:
        ConfigError: The device or this process can't have the precision, or not all launched processes have joined.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=log_with, project_dir=str(output) if log_with else None
        )
    except ValueError as error:  # the device has no bf16, or this process has used another precision before
        raise ConfigError(f"accelerate can't train with mixed_precision={config.mixed_precision!r}: {error}") from error
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate has joined {accelerator.num_processes} of them; on "
            "CPUs, set ACCELERATE_USE_CPU=true"
        )
    return accelerator

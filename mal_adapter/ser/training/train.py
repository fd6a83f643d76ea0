"""Train a memory on dialogues: in order, through the recogniser's own prompt and scores, on any number of processes."""

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
from mal_adapter.ser.suitability import warn_of_no_past
from mal_adapter.ser.training.batches import Unusable, batches_of_epoch, report_unusable
from mal_adapter.ser.training.cached_host import CachedHost
from mal_adapter.ser.training.checkpoint import CHECKPOINT_NAME, Progress, load_checkpoint, save_checkpoint
from mal_adapter.ser.training.checks import trained_memory, training_problems
from mal_adapter.ser.training.config import TrainingConfig
from mal_adapter.ser.training.step import Stepper
from mal_adapter.ser.training.summary import described, report_of
from mal_adapter.ser.training.trainable import Trainable
from mal_adapter.ser.training.validation import dev_scores
from mal_adapter.serialization.atomic import remove_leftovers, write_atomically

__all__ = ["train_memory"]

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
    """Trains the recogniser's memory on whole dialogues and saves the best adapter, with a report, in `output`.

    Utterances without a label, or with one outside of the recogniser's labels, are heard and not judged. Those that can
    not be heard are reported and left out. A run that was killed goes on with `resume=True` and ends, on the CPU, with
    the same bits. Under `accelerate launch` each process hears a part of every batch.

    What is mutated: the memory's adapter, which is the best one in the end, in eval mode; with `lora_rank` the host
    gets PEFT's layers, trained; without, its weights stay as they are. Random states are set. The sessions of the
    dialogues are forgotten.

    Args:
        recognizer: with a memory; brings model, labels and prompt.
        train: dialogues with different ids.
        dev: other dialogues, to choose the best epoch and to stop early; without, the last epoch is taken.
        output: folder of the adapter: `config.json`, `model.safetensors`, `README.md`, `training.json`; in `lora` the
            LoRA, in `checkpoint` what `resume` goes on from.
        config: how to train; the defaults unless given.
        resume: go on from the checkpoint in `output`, or begin if there is none.
        activations: folder for what `cache_activations` keeps, `activations` in `output` unless given. Runs on the same
            host, layer, prompt and dialogues can share it, such as those of other seeds, or with another memory.
        log_with: a tracker of accelerate's, such as "tensorboard", which writes to `output`.
        training_data: the card's words about the data; counts unless given.
        datasets: Hub ids of the datasets, for the card.

    Returns:
        What `training.json` says: configuration, an entry per epoch, the best epoch, the bare host's dev metrics,
        library versions.

    What can be known before the host runs is checked first, and all of it is in one error. Where no labelled utterance
    has another one before it, an `UninformativeDataWarning` says that the memory can learn nothing.

    Raises:
        ConfigError: the recogniser has no memory, a dialogue id is repeated, or settings do not fit each other.
        LabelError: not one utterance has one of the labels.
        AudioError: the sound files of all labelled utterances are missing.
        AdapterFormatError: the adapter could not be saved in `output`, or `training_data` or `datasets` are no text.
        SessionError: the memory is detached, the caller's block has a session open, or a dialogue id can't be one of a
            session.
        TrainingError: a loss or gradient is not finite (the last good values are in the checkpoint); not one labelled
            utterance was understood; `output` holds an adapter, or the checkpoint of another run; or PEFT is missing.
    """
    output, config = Path(output), TrainingConfig() if config is None else config
    kept = output / ACTIVATIONS_NAME if activations is None else Path(activations)
    raise_problems(
        training_problems(
            recognizer, train, dev, output, config, resume, log_with, training_data, datasets, activations
        )
    )
    warn_of_no_past(train, recognizer.labels, "training")
    warn_of_no_past(dev, recognizer.labels, "dev")
    return _Run(recognizer, train, dev, output, config, kept, log_with).go(
        training_data=training_data, datasets=datasets
    )


class _Run:
    def __init__(
        self,
        recognizer: EmotionRecognizer,
        train: Sequence[Dialogue],
        dev: Sequence[Dialogue],
        output: Path,
        config: TrainingConfig,
        activations: Path,
        log_with: str | None,
    ) -> None:
        memory = trained_memory(recognizer)
        self.recognizer, self.memory, self.config, self.output = recognizer, memory, config, output
        self.dialogues, self.dev = list(train), list(dev)
        self.checkpoint = output / CHECKPOINT_NAME
        self.log_with = log_with
        try:
            self.accelerator = Accelerator(
                mixed_precision=config.mixed_precision, log_with=log_with, project_dir=str(output) if log_with else None
            )
        except ValueError as error:  # such as bf16 where the device has none, or after a run without it
            raise ConfigError(
                f"accelerate can't train with mixed_precision={config.mixed_precision!r}: {error}"
            ) from error
        if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != self.accelerator.num_processes:
            raise ConfigError(
                f"{launched} processes were launched, but accelerate has joined {self.accelerator.num_processes} of "
                "them; on CPUs, set ACCELERATE_USE_CPU=true"
            )
        if getattr(recognizer.model, "hf_device_map", None) is None:
            recognizer.model.to(self.accelerator.device)
            memory.adapter.to(self.accelerator.device)
        set_seed(config.seed)  # a LoRA's first weights, the same in all processes
        self.trainable = Trainable(
            recognizer.model, memory, config.lora_rank, gradient_checkpointing=config.gradient_checkpointing
        )
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        total = self.steps_per_epoch * config.epochs
        self.cached = CachedHost(recognizer, memory, activations) if config.cache_activations else None
        self.stepper = Stepper(
            self.cached or recognizer, memory, self.trainable, train, config, self.accelerator, total
        )
        self.best: dict[str, torch.Tensor] = {}
        self.unusable: Unusable = {}
        self.progress = Progress(self._identity())

    def _identity(self) -> dict[str, Any]:
        """What a run that resumes this one must have in common with it, as JSON gives it back."""
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

    def go(self, *, training_data: str | None, datasets: Sequence[str]) -> dict[str, Any]:
        self._begin()
        with self.trainable.frozen():
            if self.cached is not None:
                self._listen(self.cached)
            if self.dev and self.progress.host_dev is None:
                self.progress.host_dev = self._evaluate(self.recognizer.without_memory())
            while not self._finished():
                self._epoch()
        self.trainable.put(self.best)
        labels, prompt, adapter = self.recognizer.labels, self.recognizer.prompt, self.memory.adapter
        report = report_of(self.progress, self.dialogues, labels, self.accelerator.num_processes)
        adapter.metadata = described(adapter.metadata, labels, prompt, report, training_data, datasets)
        if self.accelerator.is_main_process:
            adapter.save_pretrained(self.output)
            self.trainable.save_lora(self.output / LORA_NAME)
            write_atomically(self.output / REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())
        if self.log_with is not None:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        return report

    def _begin(self) -> None:
        there = self.checkpoint.exists()
        if there:
            parameters = self.trainable.parameters
            self.progress, self.best = load_checkpoint(
                self.checkpoint, self.progress.run, parameters, self.stepper.optimizer
            )
            self.unusable.update({(d, u): reason for d, u, reason in self.progress.unusable})
        for parameter in self.trainable.parameters.values():
            broadcast(parameter.data)  # each process has drawn a fresh adapter of its own; the first one's counts
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.checkpoint.parent, older_than_s=0)  # no other process trains into this folder
        self.stepper.start(self.progress.epoch * self.steps_per_epoch + self.progress.step)
        if self.log_with is not None:
            self.accelerator.init_trackers("mal_adapter")

    def _listen(self, cached: CachedHost) -> None:
        """Fills the cache, each process with a part of the dialogues."""
        here = self.accelerator
        own = [u for d in self.dialogues[here.process_index :: here.num_processes] for u in d.utterances]
        own = [u for u in own if (u.dialogue_id, u.utterance_id) not in self.unusable]
        size = self.config.side_by_side
        with progress_bar(desc="caching", total=len(own), unit="utterance", shown=here.is_main_process) as bar:
            for start in range(0, len(own), size):
                for failure in cached.keep(own[start : start + size]):
                    report_unusable(failure, self.unusable)
                bar.update(len(own[start : start + size]))
        here.wait_for_everyone()
        self.unusable.update(gather_object(list(self.unusable.items())))

    def _finished(self) -> bool:
        done, best = self.progress.epoch, self.progress.best_epoch
        stale = self.config.patience is not None and best is not None and done - best >= self.config.patience
        return done >= self.config.epochs or (bool(self.dev) and stale)

    # ------------------------------------------------------------------------------------------------ one epoch

    def _epoch(self) -> None:
        progress, config = self.progress, self.config
        batches = batches_of_epoch(self.dialogues, config.batch_size, config.seed, progress.epoch)
        bar = progress_bar(
            desc=f"epoch {progress.epoch + 1}/{config.epochs}",
            total=sum(len(dialogue.utterances) for dialogue in self.dialogues),
            initial=progress.heard,
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
                progress.heard += int(tally.heard)
                bar.update(int(tally.heard))
                bar.set_postfix(loss=f"{progress.loss / (progress.weight or 1):.3f}", refresh=False)
                self._log({"loss": tally.loss / (tally.weight or 1), "learning_rate": self.stepper.learning_rate})
                if progress.step % config.checkpoint_every == 0 and progress.step < len(batches):
                    self._save_checkpoint()
        self._end_epoch()

    def _end_epoch(self) -> None:
        progress = self.progress
        if not progress.weight:
            lost = next(iter(self.unusable.values()), "their weights are zero")
            raise TrainingError(f"not one labelled utterance of an epoch counts, so nothing is learned: {lost}")
        self.unusable.update(gather_object(list(self.unusable.items())))
        entry: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "loss": progress.loss / (progress.weight or 1),
            "utterances": progress.heard,
        }
        if self.dev:
            entry["dev"] = self._evaluate(self.recognizer)
            self._log({f"dev_{name}": value for name, value in entry["dev"].items()})
        if self._is_best(entry):
            progress.best_epoch = entry["epoch"]
            self.best = self.trainable.values()
        progress.history.append(entry)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss, progress.weight, progress.heard = 0.0, 0.0, 0
        self._save_checkpoint()

    def _is_best(self, entry: dict[str, Any]) -> bool:
        if not self.dev or self.progress.best_epoch is None:
            return True
        best = self.progress.history[self.progress.best_epoch - 1]["dev"]
        if self.config.select_by == "loss":
            return bool(entry["dev"]["loss"] < best["loss"])
        return bool(entry["dev"]["weighted_f1"] > best["weighted_f1"])

    def _evaluate(self, recognizer: EmotionRecognizer) -> dict[str, float]:
        scores = dev_scores(recognizer, self.dev, self.accelerator, self.config.side_by_side)
        self.memory.states.forget(dialogue.dialogue_id for dialogue in self.dev)
        return scores

    # ------------------------------------------------------------------------------------------- what is written

    def _log(self, values: dict[str, float]) -> None:
        if self.log_with is not None:
            self.accelerator.log(values, step=self.stepper.done)

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            self.progress.unusable = [[*key, reason] for key, reason in sorted(self.unusable.items())]
            save_checkpoint(
                self.checkpoint, self.progress, self.trainable.parameters, self.best, self.stepper.optimizer
            )

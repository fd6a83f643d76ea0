"""Run the frozen part of a host once per utterance, and keep the output of the hooked layer on disk.

Up to that layer nothing is trained and nothing depends on the dialogue. In training, and in the arms of an evaluation,
the host's own forward then runs without audio, and its layers up to the hooked one return the kept hidden states
without computing anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from mal_adapter.errors import AudioError, HostError
from mal_adapter.memory.transfer import to_device
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.paths import existing_sound
from mal_adapter.ser.recognizer.inputs import Prepared
from mal_adapter.ser.recognizer.lower_layers import LowerLayers, SkippingError, check_scores
from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.results import Failure
from mal_adapter.ser.training.device_rows import DeviceRows, free_bytes
from mal_adapter.serialization.atomic import write_atomically

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory

__all__ = ["ADVICE", "CachedHost"]

ADVICE = "; leave cache_activations off"
_REFUSED = "this host can't be run from cached activations ({})" + ADVICE


class CachedHost:
    """Prepare utterances and score labels as the recogniser does, from cached activations: a `BatchScorer`.

    For the first utterance the scores are compared with those of the whole host, so that a host that can't run from the
    cache is refused.

    What is mutated: `folder` is made, and gets a file per utterance.

    Args:
        recognizer: With a frozen host and labels of one token each.
        memory: The recogniser's.
        folder: For the files, each with seq_len · hidden_size numbers in the host's dtype.

    Raises:
        HostError: The host can't run from cached activations.
    """

    def __init__(self, recognizer: EmotionRecognizer, memory: AttachedMemory, folder: Path) -> None:
        self.labels = recognizer.labels
        self._recognizer, self._memory, self._folder = recognizer, memory, folder
        with _refusing():
            self._lower = LowerLayers(memory)
        self._rows: DeviceRows | None = None
        self._audio_masks: dict[tuple[object, ...], Tensor] = {}
        self._failures: dict[tuple[object, ...], AudioError] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, utterances: Sequence[Utterance]) -> list[Failure]:
        """Save the hooked layer's output for the utterances that are not on disk yet, in one forward of the host.

        Returns:
            A failure for each utterance whose audio can't be used.

        Raises:
            HostError: The host can't run from cached activations.
        """
        missing = [utterance for utterance in utterances if not self._is_kept(utterance)]
        if not missing and self._lower.seen:
            return []
        prepared = self._recognizer.prepare(missing or utterances[:1])
        self._failures |= {_key(failure.utterance): failure.error for failure in prepared.failures.values()}
        rows = [(missing or utterances)[index] for index in prepared.audio_s]
        if not rows:
            return list(prepared.failures.values())
        inputs, first = prepared.inputs, not self._lower.seen
        hidden, mask = self._run(inputs)
        for row, utterance in enumerate(rows if missing else []):
            own = inputs["attention_mask"][row].bool()  # without the padding of this batch
            kept = {"hidden": hidden[row, own], "input_ids": inputs["input_ids"][row, own]}
            kept["audio_mask"] = mask[row, own].to(torch.uint8)
            write_atomically(self._path(utterance), save({n: t.cpu().contiguous() for n, t in kept.items()}))
        if first:
            self._compare(rows[0])
        return list(prepared.failures.values())

    def _run(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the hooked layer's output, (batch, seq_len, hidden_size), and where audio is, (batch, seq_len)."""
        rows, memory = [None] * len(inputs["input_ids"]), self._memory
        with (
            torch.no_grad(),
            memory.using(memory.adapter.members[0]),  # up to its layer, the host is the same for all members
            memory.session_from(rows, write=False) as session,
            self._lower.capturing(session) as captured,
        ):
            self._recognizer.log_probs(inputs)
        with _refusing():
            return captured.of(inputs)

    def has(self, utterance: Utterance) -> bool:
        """Whether `prepare` knows this utterance: it is kept, or `keep` could not use it."""
        return _key(utterance) in self._failures or self._is_kept(utterance)

    def prepare(self, utterances: Sequence[Utterance]) -> Prepared:
        """Load the inputs of utterances that `keep` has saved, padded on the left. Those that it could not use fail."""
        failures = {
            index: Failure(utterance, self._failures[_key(utterance)])
            for index, utterance in enumerate(utterances)
            if _key(utterance) in self._failures
        }
        rows = [index for index in range(len(utterances)) if index not in failures]
        utterances = [utterances[index] for index in rows]
        if not utterances:
            return Prepared({}, {}, failures)
        if not self._lower.seen:  # this process had no usable utterance in its own share
            self.keep(utterances[:1])
        if self._rows is None:  # only now: until the first batch, the host is still being moved and run
            device = self._recognizer.model.device
            self._rows = DeviceRows(device, free_bytes(device))
        kept = [self._rows.get(_key(utterance), functools.partial(self._load, utterance)) for utterance in utterances]
        lengths = [len(tensors["input_ids"]) for tensors in kept]
        longest = max(lengths)

        def batch(rows: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(t, (*[0, 0] * (t.dim() - 1), longest - len(t), 0)) for t in rows])

        inputs: dict[str, Any] = {name: batch([t[name] for t in kept]) for name in ("hidden", "input_ids")}
        ids = inputs["input_ids"]
        inputs["attention_mask"] = to_device(batch([torch.ones(n, dtype=ids.dtype) for n in lengths]), ids.device)
        # On the host, where the session looks for the audio before the forward.
        audio_mask = batch([self._audio_masks[_key(utterance)] for utterance in utterances])
        audio_s = dict.fromkeys(rows, float("nan"))
        return Prepared(self._recognizer.with_positions(inputs), audio_s, failures, audio_mask)

    def forget(self, utterances: Sequence[Utterance]) -> None:
        """Delete what was kept of these utterances, on disk and on the device."""
        for utterance in utterances:
            self._audio_masks.pop(_key(utterance), None)
            if self._rows is not None:
                self._rows.forget(_key(utterance))
            if self._is_kept(utterance):
                self._path(utterance).unlink(missing_ok=True)

    def _load(self, utterance: Utterance) -> dict[str, Tensor]:
        tensors = load_file(self._path(utterance))
        self._audio_masks[_key(utterance)] = tensors.pop("audio_mask").bool()
        return tensors

    def log_probs(self, inputs: dict[str, Any]) -> Float[Tensor, "batch labels"]:
        """As `EmotionRecognizer.log_probs`. The inputs have no audio, so the session needs the `audio_mask`."""
        with self._lower.skipping(inputs["hidden"]):
            return self._recognizer.log_probs({name: value for name, value in inputs.items() if name != "hidden"})

    @torch.no_grad()
    def _compare(self, utterance: Utterance) -> None:
        """Raise HostError if the scores from the cache differ from those of the whole host."""
        with self._memory.disabled():
            expected = self._recognizer.log_probs(self._recognizer.prepare([utterance]).inputs)
            try:
                found = self.log_probs(self.prepare([utterance]).inputs)
            except Exception as error:  # from the host's own code, which needs what is missing here
                raise HostError(_REFUSED.format(f"{type(error).__name__}: {error}")) from error
        with _refusing():
            check_scores(found, expected, self._recognizer.model.dtype)

    def _is_kept(self, utterance: Utterance) -> bool:
        try:
            return self._path(utterance).exists()
        except (OSError, AudioError):  # no sound file, or several; opening it reports the problem
            return False

    def _path(self, utterance: Utterance) -> Path:
        status = existing_sound(utterance.audio).stat()
        known = [
            str(utterance.audio.absolute()), status.st_mtime_ns, status.st_size, utterance.start_s, utterance.end_s,
            self._recognizer.prompt, self._memory.layer_idx, self._memory.adapter.metadata.base_model_name_or_path,
            str(self._recognizer.model.dtype),
            *([] if utterance.channel is None else [utterance.channel]),  # files that were kept before stay valid
        ]  # fmt: skip
        return self._folder / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()}.safetensors"


@contextmanager
def _refusing() -> Iterator[None]:
    """Say what was tried, and what to do instead."""
    try:
        yield
    except SkippingError as error:
        raise HostError(_REFUSED.format(error)) from error


def _key(utterance: Utterance) -> tuple[object, ...]:
    return utterance.audio, utterance.start_s, utterance.end_s, utterance.channel

"""From utterances to the inputs of a host. Utterances without usable audio are kept apart."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mal_adapter.errors import AudioError, ConfigError, HostError, MalAdapterError
from mal_adapter.hosts.detect import unwrap
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import Waveform, check_waveform, load_waveform
from mal_adapter.ser.recognizer.prompt import PER_TOKEN, AudioPrompt
from mal_adapter.ser.recognizer.results import Failure

__all__ = ["HostInputs", "Prepared", "argument_names"]


@dataclass(frozen=True)
class Prepared:
    """A batch of utterances whose sound files have been opened.

    Args:
        inputs: The host's inputs, a row for each utterance with usable audio; empty if there is none.
        audio_s: Index of the utterance -> its length in seconds, in the order of the rows.
        failures: Index of the utterance -> why its audio is unusable.
        audio_mask: Where audio is, for a session, if the inputs do not say.
    """

    inputs: dict[str, Any]
    audio_s: dict[int, float]
    failures: dict[int, Failure]
    audio_mask: Bool[Tensor, "batch seq_len"] | None = None


class HostInputs:
    """Opens the sound files of a batch, and makes the host's inputs of each with the question.

    The constructor tries the processor on a second of noise, so that a processor that fails does so before any work.

    Args:
        model: The host.
        processor: Its processor.
        prompt: The question.
        healed_tokens: How many tokens at the end of the prompt are part of the answers.

    Raises:
        HostError: The processor makes no inputs of the question and a second of audio.
    """

    def __init__(self, model: Any, processor: Any, prompt: AudioPrompt, healed_tokens: int) -> None:
        self._model = model
        self._prompt = prompt
        self._healed_tokens = healed_tokens
        self._audio_id = _audio_token_id(model, processor)
        arguments = argument_names(model)
        self._counts_positions = "position_ids" in arguments
        # Many tokenizers return these whether the host knows them or not; generate() would refuse them too.
        self._unwanted = {"token_type_ids", "mm_token_type_ids"} - arguments
        self._try(type(processor).__name__)

    def _try(self, processor: str) -> None:
        """Try the processor. Each has its own rules about placeholders in a text, and its own exceptions."""
        noise = np.random.default_rng(0).normal(0, 0.1, self._prompt.sampling_rate).astype(np.float32)
        try:
            inputs = self._prompt([noise])
        except MalAdapterError:
            raise
        except Exception as error:
            raise HostError(
                f"{processor} makes no inputs of the prompt {self._prompt.text!r} and a second of audio: {error}; "
                "check the prompt, and whether the processor is the model's"
            ) from error
        if self._audio_id is not None and not (inputs["input_ids"] == self._audio_id).any():
            raise HostError(
                f"{processor} puts no audio token ({self._audio_id}) into the prompt {self._prompt.text!r}, so the "
                "model would answer without the audio; load the processor that belongs to the model"
            )

    def __call__(self, utterances: Sequence[Utterance], given: Sequence[Waveform | None] | None = None) -> Prepared:
        """Open the sound files, and make the host's inputs of those with usable audio, on its device.

        Args:
            utterances: Any.
            given: Per utterance its samples, (samples,) float32 at the prompt's rate; its file is then not opened.

        Raises:
            ConfigError: There is not one waveform per utterance.
        """
        given = [None] * len(utterances) if given is None else given
        if len(given) != len(utterances):
            raise ConfigError(f"expected a waveform per utterance, got {len(given)} for {len(utterances)} utterances")
        failures: dict[int, Failure] = {}
        waveforms: dict[int, Waveform] = {}
        for index, (utterance, samples) in enumerate(zip(utterances, given, strict=True)):
            try:
                waveforms[index] = self._waveform(utterance, samples)
            except AudioError as error:
                failures[index] = Failure(utterance, error)
        inputs = self._make(utterances, waveforms, failures)
        inputs = self._place(inputs) if inputs else {}
        audio_s = {index: waveform.size / self._prompt.sampling_rate for index, waveform in waveforms.items()}
        return Prepared(inputs, audio_s, failures)

    def _waveform(self, utterance: Utterance, samples: Waveform | None) -> Waveform:
        if samples is None:
            samples = load_waveform(utterance, self._prompt.sampling_rate)
        else:
            check_waveform(samples, utterance.audio, self._prompt.sampling_rate)
        self._prompt.check_length(samples, utterance.audio)
        return samples

    def with_positions(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Add `position_ids`, if the host takes them. They are counted as generate() does, so that padding does not
        shift them."""
        if self._counts_positions:
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def with_tokens(self, inputs: dict[str, Any], tokens: Int[Tensor, " tokens"]) -> dict[str, Any]:
        """The inputs with these text tokens after each prompt."""
        longer = dict(inputs)
        for name in PER_TOKEN:
            if name in inputs:  # a token's mask and type are those of the text before it
                last = tokens if name == "input_ids" else inputs[name][:, -1:]
                longer[name] = torch.cat((inputs[name], last.expand(len(inputs[name]), len(tokens))), dim=1)
        return self.with_positions(longer)

    def _make(
        self, utterances: Sequence[Utterance], waveforms: dict[int, Waveform], failures: dict[int, Failure]
    ) -> dict[str, Any]:
        """The host's inputs. Utterances too short for one audio token are moved from `waveforms` to `failures`."""
        while waveforms:
            inputs = self._prompt(list(waveforms.values()))
            if self._audio_id is None:
                return inputs
            tokens = (inputs["input_ids"] == self._audio_id).sum(1).tolist()
            mute = [index for index, count in zip(waveforms, tokens, strict=True) if count == 0]
            if not mute:
                return inputs
            for index in mute:
                audio_s = waveforms.pop(index).size / self._prompt.sampling_rate
                failures[index] = Failure(
                    utterances[index],
                    AudioError(
                        f"{utterances[index].audio}: the audio is too short: {audio_s:.3f} s make not one audio token "
                        "of this host; join it to its neighbour or leave it out"
                    ),
                )
        return {}

    def _place(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move the inputs to the host's device and dtype, without those that it does not take."""
        device = self._model.device if self._model.device.type != "meta" else None  # offloaded: accelerate moves inputs
        inputs = {name: value for name, value in inputs.items() if name not in self._unwanted}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                inputs[name] = value.to(device=device, dtype=self._model.dtype if value.is_floating_point() else None)
        if healed := self._healed_tokens:
            inputs.update({name: inputs[name][:, :-healed] for name in PER_TOKEN if name in inputs})
        return self.with_positions(inputs)


def _audio_token_id(model: Any, processor: Any) -> int | None:
    for owner in (model.config, getattr(model.config, "audio_config", None), processor):
        for name in ("audio_token_id", "audio_token_index"):
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None


def argument_names(model: Any) -> set[str]:
    """The arguments that the host's own forward names; PEFT and torch.compile hide them behind **kwargs."""
    return set(inspect.signature(unwrap(model).forward).parameters)

"""The question about a waveform, as the inputs of one host."""

import base64
import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mal_adapter.errors import AudioTooLongError, HostError
from mal_adapter.ser.audio import Waveform

__all__ = ["PER_TOKEN", "AudioPrompt"]

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""The inputs with one value per token of the prompt, (batch, seq_len)."""


class AudioPrompt:
    """A question about an utterance, as the inputs of one host: the audio first, then the question, in the user's turn.

    Args:
        processor: the host's processor. Its chat template is used where it has one.
        question: what is asked about the audio.

    Raises:
        HostError: the processor takes no audio, its chat template has no place for it, or its tokenizer lacks a
            package.

    Attributes:
        sampling_rate: of the waveforms, in Hz, as the processor's feature extractor expects it.
        text: the prompt before the audio placeholder is expanded; empty where the processor makes no text (Voxtral).
    """

    def __init__(self, processor: Any, question: str) -> None:
        self._processor = processor
        self._question = question
        parameters = inspect.signature(processor.__call__).parameters
        self._audio_kwarg = next((name for name in ("audio", "audios") if name in parameters), None)
        extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.sampling_rate = int(getattr(extractor, "sampling_rate", None) or 16_000)
        self._limits = _declared_limits(processor, extractor, self.sampling_rate)
        self._heard_beyond: set[int] = set()
        if self._audio_kwarg is None and not hasattr(processor, "apply_chat_template"):
            raise HostError(
                f"{type(processor).__name__} takes no audio: its __call__ has neither 'audio' nor 'audios'; "
                "expected the AutoProcessor of an audio language model"
            )
        tokenizer = getattr(processor, "tokenizer", None)
        if self._audio_kwarg is None and isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.chat_template:
            # transformers 5 falls back to it without a word where mistral-common is missing or too old
            raise HostError(
                f"{type(processor).__name__} leaves prompts with audio to Mistral's own tokenizer, which was not "
                "loaded: pip install -U 'mistral-common[audio]', and load the processor again"
            )
        self.text = "" if self._audio_kwarg is None else self._render()

    def _render(self) -> str:
        placeholder = getattr(self._processor, "audio_token", None) or ""
        if not getattr(self._processor, "chat_template", None):
            if not placeholder:
                raise HostError(f"{type(self._processor).__name__} has neither a chat template nor an audio_token")
            begin, end = (getattr(self._processor, f"audio_{side}_token", None) or "" for side in ("bos", "eos"))
            return f"{begin}{placeholder}{end}\n{self._question}\n"
        # Some templates (Granite Speech, Phi-4) only take text with the placeholder in it.
        contents: tuple[Any, ...] = (
            [{"type": "audio"}, {"type": "text", "text": self._question}],
            f"{placeholder}{self._question}",
        )
        for content in contents:
            text: str = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            if placeholder in text and self._question in text:
                return text
        raise HostError(f"the chat template of {type(self._processor).__name__} leaves out the audio or the question")

    def __call__(self, waveforms: Sequence[Waveform]) -> dict[str, Tensor]:
        """The host's inputs for one question about each waveform.

        Args:
            waveforms: each (samples,) float32 at `sampling_rate`.

        Returns:
            What the processor returns; `input_ids` and `attention_mask` are (len(waveforms), seq_len), padded on the
            left, so that position -1 is where every answer begins.
        """
        if self._audio_kwarg is None:
            inputs = self._processor.apply_chat_template(
                [self._conversation(waveform) for waveform in waveforms], tokenize=True, return_dict=True
            )
        else:
            # Padding is for the text alone: flat, it would also replace the audio's own, which some encoders rely on
            # (Audio Flamingo 3 needs whole windows).
            text_kwargs: dict[str, Any] = {"padding": True}
            bos = getattr(self._processor.tokenizer, "bos_token", None)
            if bos and self.text.startswith(bos):
                text_kwargs["add_special_tokens"] = False  # the template wrote it already
            inputs = self._processor(
                text=[self.text] * len(waveforms),
                **{self._audio_kwarg: list(waveforms)},
                sampling_rate=self.sampling_rate,
                text_kwargs=text_kwargs,
                return_tensors="pt",
            )
        return _pad_left(dict(inputs))

    def _conversation(self, waveform: Waveform) -> list[dict[str, Any]]:
        """Voxtral's processor makes prompts from encoded files only, not from arrays."""
        file = io.BytesIO()
        soundfile.write(file, waveform, self.sampling_rate, format="WAV", subtype="FLOAT")
        audio = {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode("ascii")}
        return [{"role": "user", "content": [audio, {"type": "text", "text": self._question}]}]

    def check_length(self, waveform: Waveform, path: Path) -> None:
        """Refuses audio of which the host would not hear the end.

        Some processors cut at the feature extractor's window (Qwen2-Audio), some split long audio into windows
        (Voxtral, Audio Flamingo 3), and no attribute says which. So beyond a declared limit the processor is tried: if
        its output stays the same when everything beyond is replaced by noise, it would have been cut.

        Args:
            waveform: (samples,) float32 at `sampling_rate`.
            path: for the message.

        Raises:
            AudioTooLongError: with both durations.
        """
        limit = max((limit for limit in self._limits if limit < waveform.size), default=None)
        if limit is None or limit in self._heard_beyond:
            return
        noise = np.random.default_rng(0).uniform(-1, 1, waveform.size - limit).astype(np.float32)
        heard, other = self([waveform]), self([np.concatenate((waveform[:limit], noise))])
        if all(torch.equal(heard[key], other[key]) for key in heard if isinstance(heard[key], Tensor)):
            raise AudioTooLongError(
                f"{path}: the audio lasts {waveform.size / self.sampling_rate:.2f} s, but this host hears at most "
                f"{limit / self.sampling_rate:.2f} s; split it into shorter utterances"
            )
        self._heard_beyond.add(limit)


def _declared_limits(processor: Any, extractor: Any, sampling_rate: int) -> list[int]:
    """Numbers of samples beyond which audio may be cut."""
    window = getattr(extractor, "n_samples", None)
    if window is None and extractor is not None:  # Gemma 3n has its limit only as the default of an argument
        default = inspect.signature(extractor.__call__).parameters.get("max_length")
        window = default.default if default is not None and isinstance(default.default, int) else None
    limits = [int(window) if window else 30 * sampling_rate]
    longest_s = getattr(processor, "max_audio_len", None)  # Audio Flamingo 3 and its kin cut after this many seconds
    if longest_s:
        limits.append(int(longest_s * sampling_rate))
    return limits


def _pad_left(inputs: dict[str, Any]) -> dict[str, Any]:
    """Moves padding on the right to the left; every row keeps its order, so features stay with their tokens."""
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    mask = inputs["attention_mask"]
    trailing = (mask.flip(1).cumsum(1) == 0).sum(1, keepdim=True)
    if trailing.any():
        order = (torch.arange(mask.shape[1]) - trailing) % mask.shape[1]
        for name in PER_TOKEN:
            if isinstance(inputs.get(name), Tensor):
                inputs[name] = inputs[name].gather(1, order)
    return inputs

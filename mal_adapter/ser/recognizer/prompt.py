"""The labels and the question of a recogniser, and its prompt as the inputs of one host."""

import base64
import inspect
import io
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mal_adapter.errors import AudioTooLongError, ConfigError, HostError, LabelError, MissingDependencyError
from mal_adapter.memory.ensemble import AnyAdapter
from mal_adapter.ser.labels import DEMO, LabelSet
from mal_adapter.ser.recognizer.audio import LONGEST_S, Waveform
from mal_adapter.ser.recognizer.spectrum import without_padding
from mal_adapter.serialization.metadata import AdapterMetadata

__all__ = ["PER_TOKEN", "AudioPrompt", "check_kept_answers", "choose_task", "default_prompt"]

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""The inputs with one value per token of the prompt, (batch, seq_len)."""


# Takes the question's place while the template is rendered. Digits, since no filter trims, escapes or folds them.
_PLACEHOLDER = "41597308264915730826"


class AudioPrompt:
    """A question about an utterance, as the inputs of one host: the audio first, then the question, in the user's turn.

    The question is kept as it is written, though templates may change it: Gemma's trims it, others escape it. The
    template is rendered once, so a date in it stays that of the day on which the prompt was made.

    Args:
        processor: The host's processor. Its chat template is used where it has one.
        question: The text after the audio.

    Raises:
        ConfigError: The question is empty, or contains a token that the host takes for audio or for the end of a turn.
        HostError: The processor takes no audio, its chat template has no place for audio or can't be rendered, or its
            tokenizer needs a package that is missing.

    Attributes:
        sampling_rate: The one that the processor's feature extractor expects, in Hz.
        text: The prompt before its audio placeholder is expanded; empty where the processor makes no text (Voxtral).
    """

    def __init__(self, processor: Any, question: str) -> None:
        self._processor = without_padding(processor)
        self._question = question
        _check_words(question)
        parameters = inspect.signature(processor.__call__).parameters
        self._audio_kwarg = next((name for name in ("audio", "audios") if name in parameters), None)
        extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.sampling_rate = int(getattr(extractor, "sampling_rate", None) or 16_000)
        self._limits = _declared_limits(processor, extractor, self.sampling_rate)
        self._accepted_beyond: set[int] = set()
        if self._audio_kwarg is None and not hasattr(processor, "apply_chat_template"):
            raise HostError(
                f"{type(processor).__name__} takes no audio: its __call__ has neither 'audio' nor 'audios'; "
                "expected the AutoProcessor of an audio language model"
            )
        tokenizer = getattr(processor, "tokenizer", None)
        if self._audio_kwarg is None and isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.chat_template:
            # transformers 5 silently falls back to it where mistral-common is missing or too old
            raise MissingDependencyError(
                f"{type(processor).__name__} leaves prompts with audio to Mistral's own tokenizer, which was not "
                "loaded: pip install -U 'mistral-common[audio]', and load the processor again"
            )
        around, rendered = ("", "") if self._audio_kwarg is None else self._render()
        _check_tokens(question, processor, around)
        # A template may react to words of the question ("/no_think"). So its own rendering is taken if it contains the
        # question word for word, beside what the template itself says in these words.
        intact = rendered.count(question) > around.count(question)
        self.text = rendered if intact else around.replace(_PLACEHOLDER, question)

    def _render(self) -> tuple[str, str]:
        """The prompt with `_PLACEHOLDER` as the question, and the prompt with the question as the template has it."""
        name, placeholder = type(self._processor).__name__, getattr(self._processor, "audio_token", None) or ""
        marks = [getattr(self._processor, f"audio_{side}_token", None) or "" for side in ("bos", "eos")]
        audio = placeholder.join(marks)
        if not getattr(self._processor, "chat_template", None):
            if not placeholder:
                raise HostError(f"{name} has neither a chat template nor an audio_token")
            return f"{audio}\n{_PLACEHOLDER}\n", f"{audio}\n{self._question}\n"
        # Some templates (Granite Speech, Phi-4) only take text with the placeholder in it.
        forms: list[Callable[[str], Any]] = [
            lambda words: [{"type": "audio"}, {"type": "text", "text": words}],
            lambda words: f"{audio}{words}",
        ]
        failure: Exception | None = None
        for form in forms:
            try:
                around = self._apply_template(form(_PLACEHOLDER))
                if _PLACEHOLDER in around and self._has_audio(around, placeholder):
                    return around, self._apply_template(form(self._question))
            except Exception as error:  # Jinja's, and anything that a template raises on an unknown form of content
                failure = failure or error
        reason = "leaves out the audio or the question" if failure is None else f"can not be rendered: {failure}"
        raise HostError(f"the chat template of {name} {reason}") from failure

    def _has_audio(self, text: str, placeholder: str) -> bool:
        if "{'type'" in text or '{"type"' in text:  # printed by a template that does not support lists
            return False
        if placeholder:
            return placeholder in text
        return text != self._apply_template([{"type": "text", "text": _PLACEHOLDER}])

    def _apply_template(self, content: Any) -> str:
        message = {"role": "user", "content": content}
        return str(self._processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))

    def __call__(self, waveforms: Sequence[Waveform]) -> dict[str, Tensor]:
        """The host's inputs for one question about each waveform.

        Args:
            waveforms: Each (samples,) float32 at `sampling_rate`.

        Returns:
            The processor's output. `input_ids` and `attention_mask` are (len(waveforms), seq_len), padded on the left,
            so that every answer starts after position -1.
        """
        if self._audio_kwarg is None:
            inputs = self._processor.apply_chat_template(
                [self._conversation(waveform) for waveform in waveforms], tokenize=True, return_dict=True
            )
        else:
            # Padding is passed for the text only. At the top level it would also replace the padding of the audio, on
            # which some encoders rely (Audio Flamingo 3 needs whole windows).
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
        """The chat of one clip. Voxtral's processor takes audio as encoded files only, not as arrays."""
        file = io.BytesIO()
        soundfile.write(file, waveform, self.sampling_rate, format="WAV", subtype="FLOAT")
        audio = {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode("ascii")}
        return [{"role": "user", "content": [audio, {"type": "text", "text": self._question}]}]

    def check_length(self, waveform: Waveform, path: Path) -> None:
        """Raise an error if the processor would cut off the end of the audio.

        Some processors cut at the feature extractor's window (Qwen2-Audio), some split long audio into windows
        (Voxtral, Audio Flamingo 3), and no attribute says which. So audio beyond a declared limit is tried: if the
        output stays the same when noise replaces everything beyond the limit, the processor cuts there.

        Args:
            waveform: (samples,) float32 at `sampling_rate`.
            path: The file, for the message.

        Raises:
            AudioTooLongError: The processor would cut the audio. The message has both durations.
        """
        limit = max((limit for limit in self._limits if limit < waveform.size), default=None)
        if limit is None or limit in self._accepted_beyond:
            return
        noise = np.random.default_rng(0).uniform(-1, 1, waveform.size - limit).astype(np.float32)
        given, noisy = self([waveform]), self([np.concatenate((waveform[:limit], noise))])
        if all(torch.equal(given[key], noisy[key]) for key in given if isinstance(given[key], Tensor)):
            raise AudioTooLongError(
                f"{path}: the audio lasts {waveform.size / self.sampling_rate:.2f} s, but this host processes at most "
                f"{limit / self.sampling_rate:.2f} s; split it into shorter utterances"
            )
        self._accepted_beyond.add(limit)

    @cached_property
    def longest_s(self) -> float:
        """The longest audio that the processor does not cut, in seconds; an hour if it cuts none."""
        for limit in sorted(self._limits):
            # A whole second beyond, since a processor rounds lengths to its frames.
            longer = np.random.default_rng(0).normal(0, 0.1, limit + self.sampling_rate).astype(np.float32)
            try:
                self.check_length(longer, Path("noise"))
            except AudioTooLongError:
                return limit / self.sampling_rate
        return LONGEST_S


def _check_words(question: object) -> None:
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(
            f"the question is {question!r}; give some words as prompt, or leave prompt out for the usual question"
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the question {question!r} is not valid Unicode: {error}; type it again") from error


def _check_tokens(question: str, processor: Any, around: str) -> None:
    """Raise an error if the question contains special tokens: marks of audio and pictures, and what ends a turn.

    A tokenizer also finds its special tokens in the text of a question, and processors expand placeholders there.

    Args:
        question: The question.
        processor: The host's processor.
        around: The prompt without the question.
    """
    names = {*vars(processor), *(f"{kind}_token" for kind in ("audio", "audio_bos", "audio_eos", "image", "video"))}
    marks = {getattr(processor, name, None) for name in names if name.endswith("_token")}
    tokenizer = getattr(processor, "tokenizer", None)
    marks |= {getattr(tokenizer, name, None) for name in ("bos_token", "eos_token")}
    marks |= {token for token in getattr(tokenizer, "all_special_tokens", ()) if str(token) in around}
    found = sorted({str(mark) for mark in marks if mark and len(str(mark)) > 1 and str(mark) in question})
    if found:
        raise ConfigError(
            f"the question {question!r} has {', '.join(found)}, which this host reads as a mark of its own and not as "
            "words; take it out of the prompt: the audio is put before the question automatically"
        )


def _declared_limits(processor: Any, extractor: Any, sampling_rate: int) -> list[int]:
    """The numbers of samples beyond which the processor may cut audio."""
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
    """Move padding from the right to the left. The rows keep their order, so features stay with their tokens."""
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


def check_kept_answers(adapter: AnyAdapter, labels: LabelSet) -> None:
    """Raise `LabelError` if an adapter that keeps answers keeps those of other labels."""
    count, task = adapter.config.num_labels, adapter.metadata.task
    trained = None if task is None else list(task["labels"])
    if count is None or (count == len(labels) and trained in (None, list(labels))):
        return
    known = f"the {count} labels" if trained is None else f"the labels {', '.join(trained)}"
    raise LabelError(
        f"this memory keeps the host's answers out of {known}, in this order, and was given {', '.join(labels)}; leave "
        "the labels out, or train it with these"
    )


def choose_task(
    metadata: AdapterMetadata | None,
    labels: LabelSet | Sequence[str] | None = None,
    prompt: str | None = None,
    usual: LabelSet = DEMO,
) -> tuple[LabelSet, str]:
    """Choose labels and question: the given ones, else those that the adapter was trained with.

    Args:
        metadata: The adapter's; None without an adapter.
        labels: The possible answers; the adapter's unless given. Given labels come with the default question, since
            the adapter's question may name the adapter's labels.
        prompt: The question; the adapter's unless given.
        usual: The labels if neither `labels` nor the adapter gives any.

    Returns:
        (labels, question).

    Raises:
        LabelError: The labels are not a label set.

    Example:
        >>> metadata = AdapterMetadata(layer_idx=16).with_task(["happy", "sad"], "How does the speaker feel?")
        >>> choose_task(metadata)[1]
        'How does the speaker feel?'
        >>> choose_task(metadata, ["angry", "calm"])[1]
        "What is the speaker's emotion? Answer with one word: angry or calm."
        >>> choose_task(metadata, "angry,calm")
        Traceback (most recent call last):
        mal_adapter.errors.LabelError: the names must be a sequence of strings, got the single string 'angry,calm'
    """
    task = (metadata.task if metadata is not None else None) or {}
    if labels is not None:
        # LabelSet makes the tuple, since it refuses a single string; a tuple of its letters would pass.
        chosen = labels if isinstance(labels, LabelSet) else LabelSet(labels)  # type: ignore[arg-type]
        return chosen, prompt if prompt is not None else default_prompt(chosen)
    chosen = LabelSet(tuple(task["labels"]), task.get("aliases", {})) if "labels" in task else usual
    return chosen, prompt if prompt is not None else task.get("prompt") or default_prompt(chosen)


def default_prompt(labels: LabelSet) -> str:
    """The question for labels whose adapter has no question.

    Example:
        >>> default_prompt(LabelSet(("neutral", "happy", "sad")))
        "What is the speaker's emotion? Answer with one word: neutral, happy or sad."
    """
    *names, last = labels
    return f"What is the speaker's emotion? Answer with one word: {', '.join(names)} or {last}."

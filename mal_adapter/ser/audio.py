"""From a sound file to the inputs of a host: decoding, the rules for bad audio, and the prompt around the waveform."""

import base64
import inspect
import io
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor
from transformers.audio_utils import load_audio
from transformers.utils import is_torchcodec_available

from mal_adapter.errors import AudioError, AudioTooLongError, HostError
from mal_adapter.ser.dialogue import Utterance

__all__ = ["PER_TOKEN", "AudioPrompt", "Waveform", "load_waveform"]

Waveform = npt.NDArray[np.float32]

#: Peak amplitude at or under which audio counts as silent: -80 dBFS, three steps of 16-bit sound.
SILENCE_PEAK = 1e-4
#: The inputs with one value per token of the prompt, (batch, seq_len).
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: How far an utterance may reach beyond the end of its file, or a file fall short of its header, through rounding.
TOLERANCE_S = 0.1


def load_waveform(utterance: Utterance, sampling_rate: int = 16_000) -> Waveform:
    """Decodes one utterance to mono float32, resampled, cut to its start and end.

    Reads WAV, FLAC, OGG and MP3 with soundfile and soxr, and whatever else transformers' `load_audio` reads
    where that is installed. Channels are averaged.

    Args:
        utterance: only `audio`, `start_s` and `end_s` are used.
        sampling_rate: of the result, in Hz.

    Returns:
        (samples,) float32, finite, at least one sample, not silent.

    Raises:
        AudioError: the file is missing, unreadable, cut short, empty, silent or not finite, or ends before the
            utterance does. The message names the file, the reason and what to do.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tone.wav"
        >>> soundfile.write(path, 0.1 * np.sin(np.arange(44_100 * 2) / 20), 44_100)
        >>> load_waveform(Utterance("d", "0", "A", path, start_s=0.5, end_s=1.5)).shape
        (16000,)
        >>> load_waveform(Utterance("d", "0", "A", path, start_s=0.5, end_s=9.5))
        Traceback (most recent call last):
        mal_adapter.errors.AudioError: ...: the utterance goes from 0.50 s to 9.50 s, but the file lasts 2.00 s; ...
    """
    path = utterance.audio
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: there is no such file; check the path") from error
    if not path.is_file():
        raise AudioError(f"{path}: this is not a file; give the sound file itself")
    if stat.st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes); record or copy it again")
    if utterance.start_s is None and utterance.end_s is None:
        waveform = _decode(path, sampling_rate)
    else:
        # The utterances of one long recording follow each other: decode it once.
        waveform = _decode_cached(path, sampling_rate, stat.st_mtime_ns, stat.st_size)
        waveform = _cut(waveform, utterance, sampling_rate)
    if waveform.size == 0:
        raise AudioError(f"{path}: the audio is empty (0 samples at {sampling_rate} Hz); record or cut it again")
    if not np.isfinite(waveform).all():
        raise AudioError(f"{path}: the audio contains values that are not finite (NaN or infinity); export it again")
    peak = float(np.abs(waveform).max())
    if peak <= SILENCE_PEAK:
        level = "all samples are zero" if peak == 0 else f"its peak is {20 * np.log10(peak):.0f} dBFS"
        raise AudioError(f"{path}: the audio is silent ({level}); check the recording or leave this utterance out")
    return waveform


def _cut(waveform: Waveform, utterance: Utterance, sampling_rate: int) -> Waveform:
    duration_s = waveform.size / sampling_rate
    start_s = utterance.start_s or 0.0
    end_s = duration_s if utterance.end_s is None else utterance.end_s
    if start_s >= duration_s or end_s > duration_s + TOLERANCE_S:
        raise AudioError(
            f"{utterance.audio}: the utterance goes from {start_s:.2f} s to {end_s:.2f} s, but the file lasts "
            f"{duration_s:.2f} s; check start_s and end_s, which are in seconds"
        )
    return waveform[round(start_s * sampling_rate) : round(end_s * sampling_rate)]


def _decode(path: Path, sampling_rate: int) -> Waveform:
    try:
        info = soundfile.info(str(path))
    except RuntimeError as error:
        if not is_torchcodec_available():
            reason = str(error).rsplit(": ", maxsplit=1)[-1].rstrip(".")
            raise AudioError(
                f"{path}: this can not be read as audio ({reason}); convert it to WAV, FLAC, OGG or MP3"
            ) from error
        info = None
    if info is not None:
        _check_complete(path, _wav_duration_s(path), info.frames / info.samplerate)
    try:
        if info is None:
            # Absolute, since load_audio takes a string that is not an existing file for base64.
            waveform = load_audio(str(path.absolute()), sampling_rate=sampling_rate)
        else:
            samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
            waveform = soxr.resample(samples.mean(axis=1), rate, sampling_rate)
    except (ImportError, MemoryError):  # not the file's fault
        raise
    except Exception as error:  # each library has its own exceptions, torchcodec's without a common base
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise AudioError(f"{path}: the audio can not be decoded ({reason}); convert or copy it again") from error
    if info is not None:
        _check_complete(path, info.frames / info.samplerate, len(waveform) / sampling_rate)
    return np.ascontiguousarray(waveform, dtype=np.float32)


@lru_cache(maxsize=2)
def _decode_cached(path: Path, sampling_rate: int, mtime_ns: int, size: int) -> Waveform:
    waveform = _decode(path, sampling_rate)
    waveform.flags.writeable = False
    return waveform


def _check_complete(path: Path, declared_s: float | None, found_s: float) -> None:
    """A file whose end is missing still decodes; half an utterance must not pass for the whole."""
    if declared_s is not None and declared_s - found_s > TOLERANCE_S + 0.01 * declared_s:
        raise AudioError(
            f"{path}: the file is cut short: {found_s:.2f} s of the {declared_s:.2f} s that its header declares; "
            "copy it again"
        )


def _wav_duration_s(path: Path) -> float | None:
    """The duration in a WAV header. None for other files, and for streams, whose header was written before their end.

    libsndfile corrects the header of a truncated WAV file silently, so it is read here.
    """
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or file.read(8)[4:] != b"WAVE":
            return None
        bytes_per_second = 0
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"data":
                streamed = size == 0 or size >= 0x7FFF_F000  # ffmpeg writes 0xFFFFFFFF, espeak-ng 0x7FFFF000
                return None if streamed or not bytes_per_second else size / bytes_per_second
            body = file.read(size + size % 2)
            if name == b"fmt " and len(body) >= 12:
                bytes_per_second = struct.unpack_from("<I", body, 8)[0]
    return None


class AudioPrompt:
    """A question about an utterance, as the inputs of one host: the audio first, then the question, in the user's turn.

    Args:
        processor: the host's processor. Its chat template is used where it has one.
        question: what is asked about the audio.

    Raises:
        HostError: the processor takes no audio, or its chat template has no place for it.

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

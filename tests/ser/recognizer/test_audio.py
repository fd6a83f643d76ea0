"""Every readable sound file gives the same second of audio; every bad one gives a typed error that says what to do."""

import os
import sys

import numpy as np
import pytest
import soundfile
import torch
import transformers

from mal_adapter.errors import AudioError, AudioTooLongError, HostError, MissingDependencyError
from mal_adapter.ser.corpora.folder import problem_of_clip
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.recognizer.prompt import AudioPrompt, _pad_left
from tests.ser.fixtures import CHUNK_S, tone


def load(path, start_s=None, end_s=None, sampling_rate=16_000):
    return load_waveform(Utterance("d", "0", "A", path, start_s, end_s), sampling_rate)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("sampling_rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_channels_and_format(extension, sampling_rate, channels, write_audio):
    path = write_audio(f"tone.{extension}", sampling_rate=sampling_rate, channels=channels)
    waveform = load(path)
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert abs(waveform.size - 16_000) <= 16  # one millisecond; MP3 has a delay
    assert abs(np.abs(np.fft.rfft(waveform[:16_000])).argmax() * 16_000 / min(16_000, waveform.size) - 220) < 2
    assert np.abs(waveform).max() == pytest.approx(0.32 if channels == 1 else 0.24, rel=0.2)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_wav_encodings(subtype, write_audio):
    assert np.abs(load(write_audio("tone.wav", subtype=subtype)) - tone()).max() < 0.02


def test_a_cut_is_exact_and_only_the_cut_is_decoded(write_audio, monkeypatch):
    path = write_audio("tone.flac", duration_s=3.0, sampling_rate=44_100)
    whole = load(path)
    frames = []
    read = soundfile.SoundFile.buffer_read_into

    def counted(self, out, dtype):
        frames.append(len(out))
        return read(self, out, dtype)

    monkeypatch.setattr(soundfile.SoundFile, "buffer_read_into", counted)
    parts = [load(path, start_s, start_s + 0.5) for start_s in np.arange(0, 3, 0.5)]
    assert np.abs(np.concatenate(parts) - whole).max() < 1e-6  # resampled from another start, in float32
    assert sum(frames) < 3.2 * 44_100
    assert load(path, start_s=2.5).size == load(path, end_s=0.5).size == 8_000
    assert load(path, 2.5, 3.05).size == 8_000  # a rounded annotation


def test_a_changed_file_is_decoded_again(write_audio):
    path = write_audio("tone.wav", duration_s=1.0)
    assert load(path, end_s=0.5).size == 8_000
    write_audio("tone.wav", duration_s=2.0)
    assert load(path, start_s=1.5).size == 8_000


def test_other_sampling_rates(write_audio):
    assert load(write_audio("tone.wav"), sampling_rate=24_000).size == 24_000


@pytest.fixture
def bad_file(tmp_path, write_audio):
    def make(kind):
        path = tmp_path / f"{kind}.wav"
        if kind == "text":
            path.write_text("this is not a sound\n" * 50)
        elif kind == "nothing":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "empty":
            soundfile.write(path, np.zeros(0), 16_000)
        elif kind == "silent":
            soundfile.write(path, np.zeros(16_000), 16_000)
        elif kind == "hum":
            soundfile.write(path, 5e-5 * tone(), 16_000, subtype="FLOAT")
        elif kind in ("nan", "inf"):
            wave = tone()
            wave[100] = float(kind)
            soundfile.write(path, wave, 16_000, subtype="FLOAT")
        elif kind.startswith("truncated"):
            path = write_audio(f"whole.{kind.split('-')[1]}", duration_s=2.0)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "this is a folder; give the sound files in it"),
        ("nothing", r"the file is empty \(0 bytes\)"),
        ("text", "can not be read as audio.*convert it to WAV"),
        ("empty", r"the audio is empty \(0 samples"),
        ("silent", r"silent \(all samples are zero\)"),
        ("hum", r"silent \(its peak is -9\d dBFS\)"),
        ("nan", "not finite"),
        ("inf", "not finite"),
        ("truncated-wav", r"cut short: 1\.00 s of the 2\.00 s"),
        ("truncated-flac", "can not be decoded|cut short"),
        ("truncated-ogg", "can not be read as audio|cut short|is empty"),
        ("truncated-mp3", "cut short"),
    ],
)
def test_bad_files(kind, message, bad_file):
    path = bad_file(kind)
    with pytest.raises(AudioError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "; " in str(caught.value)  # what to do
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0xFFFF_FFFF])
def test_a_streamed_wav_whose_header_was_written_too_early_is_not_cut_short(size, write_audio):
    path = write_audio("tone.wav")
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(content)
    assert load(path).size == 16_000


def test_a_wav_whose_header_has_a_wrong_byte_rate_is_not_cut_short(write_audio):
    path = write_audio("tone.wav")
    content = bytearray(path.read_bytes())
    at = content.index(b"fmt ") + 16
    content[at : at + 4] = (8_000).to_bytes(4, "little")  # a quarter of it, as if the file were four times as long
    path.write_bytes(content)
    assert load(path).size == 16_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name is Unicode")
def test_a_name_that_is_not_utf_8(write_audio, tmp_path):
    for name in ("tone.wav", "tone.flac"):
        path = tmp_path / os.fsdecode(b"caf\xe9-" + name.encode())
        write_audio(name).rename(path)
        assert load(path).size == 16_000
        assert problem_of_clip(path) is None


@pytest.mark.parametrize(("start_s", "end_s"), [(1.0, None), (2.0, 3.0), (0.5, 1.5)])
def test_an_utterance_beyond_the_end_of_its_file(start_s, end_s, write_audio):
    with pytest.raises(AudioError, match=r"the file lasts 1\.00 s; check start_s and end_s"):
        load(write_audio("tone.wav"), start_s, end_s)


def test_the_prompt_has_the_audio_before_the_question_in_the_users_turn(processor):
    prompt = AudioPrompt(processor, "How do they feel?")
    assert prompt.text.endswith(
        "<|audio_bos|><|AUDIO|><|audio_eos|>\nHow do they feel?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = prompt([tone(0.5), tone(1.0)])
    assert {"input_ids", "attention_mask", "input_features", "feature_attention_mask"} <= set(inputs)
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert inputs["attention_mask"][:, 0].tolist() == [0, 1]


def test_a_template_that_only_takes_strings_and_a_processor_without_template(processor):
    class Strings:
        audio_token, chat_template = "<|audio|>", "yes"

        def __call__(self, text=None, audios=None):
            raise AssertionError

        def apply_chat_template(self, messages, **_):
            content = messages[0]["content"]
            return f"USER: {content if isinstance(content, str) else ''} ASSISTANT:"

    assert AudioPrompt(Strings(), "Well?").text == "USER: <|audio|>Well? ASSISTANT:"
    plain = Strings()
    plain.chat_template = None
    assert AudioPrompt(plain, "Well?").text == "<|audio|>\nWell?\n"
    plain.audio_token = None
    with pytest.raises(HostError, match="neither a chat template nor an audio_token"):
        AudioPrompt(plain, "Well?")
    deaf = Strings()
    deaf.apply_chat_template = lambda *_, **__: "Hello!"
    with pytest.raises(HostError, match="leaves out the audio or the question"):
        AudioPrompt(deaf, "Well?")
    with pytest.raises(HostError, match="takes no audio"):
        AudioPrompt(processor.tokenizer.__class__.__call__, "Well?")


def test_a_processor_that_only_takes_encoded_files():
    received = []

    class LikeVoxtral:
        def __call__(self, text):
            raise AssertionError

        def apply_chat_template(self, conversations, tokenize, return_dict):
            import base64
            import io

            for (message,) in conversations:
                audio, question = message["content"]
                received.append((soundfile.read(io.BytesIO(base64.b64decode(audio["base64"])))[0], question["text"]))
            ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
            return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    waves = [tone(0.1), tone(0.2)]
    inputs = AudioPrompt(LikeVoxtral(), "Well?")(waves)
    assert inputs["input_ids"].tolist() == [[0, 5, 6], [5, 6, 7]]
    assert all(
        np.array_equal(wave, got) and question == "Well?" for wave, (got, question) in zip(waves, received, strict=True)
    )


def test_a_voxtral_without_its_own_tokenizer_says_what_to_install(processor):
    """What AutoProcessor of transformers 5 loads where mistral-common is missing."""
    voxtral = transformers.VoxtralProcessor.__new__(transformers.VoxtralProcessor)
    voxtral.feature_extractor = transformers.WhisperFeatureExtractor()
    voxtral.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=processor.tokenizer.backend_tokenizer)
    with pytest.raises(MissingDependencyError, match="mistral-common"):
        AudioPrompt(voxtral, "Well?")


def test_right_padding_moves_to_the_left_and_left_padding_stays():
    ids = torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4], [0, 0, 1, 2]])
    features = torch.arange(3)
    inputs = _pad_left({"input_ids": ids, "attention_mask": (ids != 0).long(), "input_features": features})
    assert inputs["input_ids"].tolist() == [[0, 0, 1, 2], [1, 2, 3, 4], [0, 0, 1, 2]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert inputs["input_features"] is features
    assert _pad_left({"input_ids": ids})["attention_mask"].all()


def test_audio_longer_than_the_host_processes_is_refused_with_both_durations(processor, tmp_path):
    prompt = AudioPrompt(processor, "Well?")
    prompt.check_length(tone(CHUNK_S), tmp_path / "long.wav")
    with pytest.raises(AudioTooLongError, match=r"long\.wav: the audio lasts 5\.50 s, but .* at most 4\.00 s"):
        prompt.check_length(tone(5.5), tmp_path / "long.wav")
    with pytest.raises(AudioTooLongError):
        prompt.check_length(tone(CHUNK_S + 0.01), tmp_path / "long.wav")


def test_a_host_that_splits_long_audio_itself_has_no_limit_but_its_own(processor, tmp_path):
    class Splitting:
        """As Audio Flamingo 3: windows of the feature extractor, cut after `max_audio_len` seconds."""

        feature_extractor, tokenizer, audio_token = processor.feature_extractor, processor.tokenizer, "<|AUDIO|>"
        chat_template, max_audio_len, calls = None, 10, []

        def __call__(self, text, audio, sampling_rate, **_):
            self.calls.append(len(audio[0]))  # shared with the copy that the recogniser makes
            wave = audio[0][: self.max_audio_len * sampling_rate]
            return {"input_ids": torch.ones(1, 1), "input_features": torch.tensor(wave)}

    splitting = Splitting()
    prompt = AudioPrompt(splitting, "Well?")
    prompt.check_length(tone(9.0), tmp_path / "long.wav")
    prompt.check_length(tone(9.5), tmp_path / "long.wav")
    assert len(splitting.calls) == 2  # tried once, then known
    with pytest.raises(AudioTooLongError, match=r"lasts 11\.00 s, but this host processes at most 10\.00 s"):
        prompt.check_length(tone(11.0), tmp_path / "long.wav")

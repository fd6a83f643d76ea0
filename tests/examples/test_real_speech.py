"""examples/real_speech makes a host of a Whisper checkpoint; the command line does the rest. Here at a tiny size."""

import json
import runpy
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from mal_adapter.ser.dialogue import Utterance, read_manifest
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.commands import mal_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "real_speech"
EMOTIONS = ("neutral", "happy", "angry", "sad")

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the host is trained with the modules of transformers 5"
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules; what they import by bare names is no one else's afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import make_host
    import prepare_clips
    import whisper_encoder

    yield SimpleNamespace(make_host=make_host, whisper_encoder=whisper_encoder, prepare_clips=prepare_clips)
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            sys.modules.pop(name)


@pytest.fixture
def run(scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def whisper() -> WhisperModel:
    """A Whisper of three layers with random weights."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64, encoder_layers=3, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
        encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=60, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = WhisperModel(config).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms begin as zeros and ones
    return model


def ctranslate2(model: WhisperModel, kind: str) -> bytes:
    """The encoder in CTranslate2's format, as its converter writes it; with 8 bits matrices have a scale per row."""
    weights = {name: value.detach().numpy() for name, value in model.encoder.state_dict().items()}
    out: dict[str, Any] = {}

    def put(theirs: str, ours: str, names: str = "weight bias") -> None:
        weight, bias = names.split()
        out[f"encoder/{theirs}/{weight}"], out[f"encoder/{theirs}/{bias}"] = (
            weights[f"{ours}.weight"],
            weights[f"{ours}.bias"],
        )

    for n in range(model.config.encoder_layers):
        ours, theirs = f"layers.{n}", f"layer_{n}"
        put(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", "gamma beta")
        rows = [weights[f"{ours}.self_attn.{q}_proj.weight"] for q in "qkv"]
        biases = [weights.get(f"{ours}.self_attn.{q}_proj.bias", np.zeros(64, np.float32)) for q in "qkv"]
        out[f"encoder/{theirs}/self_attention/linear_0/weight"] = np.concatenate(rows)
        out[f"encoder/{theirs}/self_attention/linear_0/bias"] = np.concatenate(biases)
        put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        put(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", "gamma beta")
        put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    put("conv1", "conv1")
    put("conv2", "conv2")
    put("layer_norm", "layer_norm", "gamma beta")
    out["encoder/position_encodings/encodings"] = weights["embed_positions.weight"]
    out["decoder/num_heads"] = np.array(1, np.int16)
    if kind == "int8":
        for name in [name for name in out if "linear" in name and name.endswith("/weight")]:
            scale = 127 / np.abs(out[name]).max(1)
            out[name], out[f"{name}_scale"] = np.rint(out[name] * scale[:, None]).astype(np.int8), scale.astype("f4")
    if kind == "float16":
        out = {name: value.astype("f2") if value.dtype == np.float32 else value for name, value in out.items()}
    types = {"f4": 0, "i1": 1, "i2": 2, "i4": 3, "f2": 4}

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(out))
    for name, value in out.items():
        data += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += struct.pack("<BI", types[value.dtype.str[1:]], value.nbytes) + value.tobytes()
    return data + struct.pack("<I", 0)  # no aliases


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("int8", 1e-2)])
@pytest.mark.parametrize("parts", [1, 11])
def test_a_ctranslate2_folder_has_the_same_encoder(kind, tolerance, parts, whisper, scripts, tmp_path: Path):
    data = ctranslate2(whisper, kind)
    if parts == 1:
        (tmp_path / "model.bin").write_bytes(data)
    for n in range(parts if parts > 1 else 0):
        cut = slice(n * len(data) // parts, (n + 1) * len(data) // parts)
        (tmp_path / f"model.bin.part{n + 1}").write_bytes(data[cut])
    found = scripts.whisper_encoder.load_encoder(str(tmp_path))
    expected = whisper.encoder.state_dict()
    assert (found.layers, found.heads, found.width, found.mel_bins) == (3, 1, 64, 80)
    assert set(found.weights) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found.weights[name], value, atol=tolerance * float(value.abs().max()), rtol=0)


def test_an_old_ctranslate2_file_is_refused(scripts):
    with pytest.raises(ValueError, match="format 4"):
        scripts.whisper_encoder.read_ctranslate2(struct.pack("<I", 4))


@pytest.mark.parametrize("layers", [1, 3])
def test_the_tower_is_the_first_layers_of_whisper(layers: int, whisper, scripts, tmp_path: Path):
    whisper.save_pretrained(tmp_path)
    encoder = scripts.whisper_encoder.load_encoder(str(tmp_path))
    options = {"layers": layers, "seconds": 4, "width": 32, "decoder_layers": 2, "seed": 0}
    model, processor = scripts.make_host.build_host(encoder, EMOTIONS, **options)

    sound = np.random.default_rng(0).normal(0, 0.1, 3 * 16_000).astype(np.float32)
    short = processor.feature_extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    whole = WhisperFeatureExtractor()(sound, sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(short, whole[:, :, :400], rtol=0, atol=0)

    truth = WhisperModel(WhisperConfig(**{**whisper.config.to_dict(), "max_source_positions": 200})).encoder.eval()
    weights = whisper.encoder.state_dict()
    truth.load_state_dict({**weights, "embed_positions.weight": weights["embed_positions.weight"][:200]})
    with torch.no_grad():
        states = truth(short, output_hidden_states=True).hidden_states
        # the states after the last layer are normed already
        expected = states[layers] if layers < 3 else None
        found = model.model.audio_tower(short).last_hidden_state
        if expected is None:
            hooked: list[torch.Tensor] = []
            handle = truth.layer_norm.register_forward_pre_hook(lambda _, inputs: hooked.append(inputs[0]))
            truth(short)
            handle.remove()
            expected = hooked[0]
        pooled = torch.nn.functional.avg_pool1d(expected.transpose(1, 2), 2, 2).transpose(1, 2)
        torch.testing.assert_close(found, truth.layer_norm(pooled), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seconds", [0.4, 1.13, 4.0])
def test_a_clip_is_trained_on_as_the_recogniser_hears_it(seconds: float, whisper, scripts, tmp_path: Path):
    """The encoded clip is the tower's output in the model's own forward, without its padding, and so are the logits."""
    whisper.save_pretrained(tmp_path)
    encoder = scripts.whisper_encoder.load_encoder(str(tmp_path))
    options = {"layers": 2, "seconds": 4, "width": 32, "decoder_layers": 2, "seed": 0}
    model, processor = scripts.make_host.build_host(encoder, EMOTIONS, **options)
    sound = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000))
    soundfile.write(tmp_path / "clip.wav", sound, 16_000, subtype="FLOAT")
    utterance = Utterance("call-42", "0", "A", tmp_path / "clip.wav", emotion="sad")
    (clip,) = scripts.make_host.encode(model, processor, [utterance])

    towers: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: towers.append(inputs[0]))
    recognizer = EmotionRecognizer(model.eval(), processor, None, EMOTIONS, scripts.make_host.QUESTIONS["emotion"])
    inputs = recognizer.prepare([utterance]).inputs
    with torch.no_grad():
        expected = recognizer.log_probs(inputs)
    handle.remove()
    assert int((inputs["input_ids"] == model.config.audio_token_index).sum()) == len(clip.audio)
    half = clip.audio.float()
    torch.testing.assert_close(towers[0][0, : len(half)], half, atol=float(half.abs().max()) * 1e-3, rtol=0)

    rows = scripts.make_host.Rows(processor)
    with torch.no_grad():
        (logits,), (answer,) = rows._logits(model, [clip], [towers[0][0, : len(half)]], ["emotion"])
    ids = processor.tokenizer.convert_tokens_to_ids(list(EMOTIONS))
    torch.testing.assert_close(logits.log_softmax(-1)[:, ids], expected, atol=1e-4, rtol=0)
    assert int(answer) == ids[EMOTIONS.index("sad")]


def test_silence_at_the_ends_is_cut_and_names_are_kept(run, tmp_path: Path):
    tone = 0.3 * np.sin(2 * np.pi * 200 * np.arange(48_000) / 48_000)
    (tmp_path / "in" / "Actor_01").mkdir(parents=True)
    padded = np.concatenate([np.zeros(48_000), tone, np.zeros(24_000)])
    soundfile.write(tmp_path / "in/Actor_01/03-01-03-01-01-01-01.wav", np.stack([padded, padded], 1), 48_000)
    soundfile.write(tmp_path / "in/long.flac", np.tile(tone, 5), 48_000)
    soundfile.write(tmp_path / "in/silent.wav", np.zeros(48_000), 48_000)
    printed = run("prepare_clips.py", tmp_path / "in", tmp_path / "out")
    assert "2 clips" in printed
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.wav")}
    assert made == {"Actor_01/03-01-03-01-01-01-01.wav", "long.wav"}
    sound, rate = soundfile.read(tmp_path / "out/Actor_01/03-01-03-01-01-01-01.wav")
    assert (rate, sound.ndim) == (16_000, 1)
    assert 1.0 <= len(sound) / rate <= 1.2
    assert soundfile.info(tmp_path / "out/long.wav").duration == 3.0


@pytest.mark.parametrize("hz", [90, 150, 250, 400])
@pytest.mark.parametrize("db", [-40, -20])
def test_voices_are_measured(hz: int, db: int, scripts):
    time = np.arange(16_000) / 16_000
    sound = sum(np.sin(2 * np.pi * hz * k * time) / k for k in range(1, 6))
    sound = (sound / np.sqrt(np.mean(sound**2)) * 10 ** (db / 20)).astype(np.float32)
    answers = scripts.make_host.voice_of(sound)
    low, high = scripts.make_host.PITCH_HZ
    expected = np.log(hz / low) / np.log(high / low) * 32
    assert abs(int(answers["pitch"]) + 0.5 - expected) <= 1.5
    assert abs(int(answers["loudness"]) + 0.5 - (db + 55) / 45 * 32) <= 1


def test_from_clips_to_a_report(run, whisper, tmp_path: Path):
    """All commands of the example's README, on voices that differ in pitch and emotions that differ in level."""
    order = np.random.default_rng(0)
    time = np.arange(6_400) / 16_000
    for speaker in range(12):
        for level, emotion in enumerate(EMOTIONS):
            for take in range(4):
                tone = 0.02 * 2**level * np.sin(2 * np.pi * (100 + 20 * speaker) * time)
                path = tmp_path / "clips" / str(speaker) / f"{emotion}_{take}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, tone + 0.01 * order.normal(size=6_400), 16_000)
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "model.bin").write_bytes(ctranslate2(whisper, "float16"))
    folder = tmp_path / "dialogues"
    common = ("--dialogues", 6, "--eval-dialogues", 2, "--turns", 4, "--host-share", 0.34, "--test-share", 0.3)
    pattern = ("--pattern", "{speaker}/{emotion}_{text}.wav")
    done = mal_adapter("simulate", tmp_path / "clips", *pattern, *common, "--dev-share", 0.4, "--output", folder)
    assert done.exit_code == 0, done.stderr

    host = tmp_path / "host"
    arguments = (host, "--whisper", tmp_path / "whisper", "--clips", folder / "host.jsonl", "--seconds", 1)
    arguments = (*arguments, "--layers", 2, "--width", 16, "--decoder-layers", 2, "--steps", 2)
    run("make_host.py", *arguments)
    first, encoded = (host / "model.safetensors").read_bytes(), tmp_path / "host-encoded.safetensors"
    made_at = encoded.stat().st_mtime_ns
    run("make_host.py", *arguments)
    assert ((host / "model.safetensors").read_bytes(), encoded.stat().st_mtime_ns) == (first, made_at)
    speakers = {turn.speaker for one in read_manifest(folder / "host.jsonl") for turn in one.utterances}

    model, processor = load_host(str(host))
    assert set(model.config.training_speakers) == speakers
    assert isinstance(model, transformers.Qwen2AudioForConditionalGeneration)
    recognizer = EmotionRecognizer(model, processor, None, EMOTIONS, "How does the speaker feel?")
    assert len(list(recognizer.recognize(read_manifest(folder / "test.jsonl")[0]))) == 4

    quick = ("--layers", 2, "--encoded", tmp_path / "all-encoded.safetensors", "--seeds", 1, "--steps", 50)
    table = run("levers.py", folder, "--whisper", tmp_path / "whisper", *quick).splitlines()
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in table if line.startswith("|"))}
    assert {"host alone", "control", "mean", "matrix, read-out without the clip"} < rows.keys()
    assert rows["control"][0] == rows["control"][1]  # without a past, another dialogue's is no other
    assert rows["control"][2].strip() == "+0.0 ± 0.0"

    settings = tmp_path / "settings.json"
    shipped = json.loads((FOLDER / "settings.json").read_text())
    settings.write_text(json.dumps({**shipped, "epochs": 1, "memory": {"memory_dim": 8, "num_heads": 1}}))
    asked = ("--model", host, "--layer", 0, "--prompt", "How does the speaker feel?")
    done = mal_adapter(
        "train", folder / "train.jsonl", "--dev", folder / "dev.jsonl", *asked, "--config", settings,
        "--output", tmp_path / "m",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    done = mal_adapter(
        "evaluate", folder / "test.jsonl", "--model", host, "--adapter", tmp_path / "m", "--output", tmp_path / "e"
    )
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "e" / "report.html").exists()

"""Training from cached activations has the losses and gradients of training without them."""

import dataclasses
import time
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mal_adapter.errors import ConfigError, HostError
from mal_adapter.ser.training import TrainingConfig, train_memory
from mal_adapter.ser.training.cached_host import CachedHost
from mal_adapter.ser.training.loss import DialogueLoss
from mal_adapter.ser.training.trainable import Trainable
from tests.ser.training_world import FAST, make_dialogues, make_recognizer, run


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("train"))


@pytest.fixture(autouse=True)
def _any_precision():
    AcceleratorState._reset_state()


def gradients(recognizer, host, dialogues):
    memory = recognizer.memory
    trainable = Trainable(recognizer.model, memory)
    loss = DialogueLoss(host, memory, torch.ones(len(recognizer.labels)), 3, torch.Tensor.backward, nullcontext)
    with trainable.frozen():
        trainable.train()
        memory.adapter.zero_grad()
        started = time.process_time()
        tally = loss(dialogues, {})
        elapsed_s = time.process_time() - started
    return [p.grad.clone() for p in memory.parameters()], tally, elapsed_s


def test_losses_and_gradients_are_those_without_the_cache(train, tmp_path):
    recognizer = make_recognizer(random=True)
    host = CachedHost(recognizer, recognizer.memory, tmp_path)
    utterances = [u for dialogue in train for u in dialogue.utterances]
    assert host.keep(utterances) == []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 19
    expected, tally, plain_s = gradients(recognizer, recognizer, train)
    found, cached_tally, cached_s = gradients(recognizer, host, train)
    assert cached_tally.loss == pytest.approx(tally.loss, rel=1e-5)
    assert (cached_tally.weight, cached_tally.utterances) == (tally.weight, tally.utterances)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * (b.norm() + 1e-3)
    again = CachedHost(recognizer, recognizer.memory, tmp_path)
    assert again.keep(utterances) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert not any("forward" in vars(layer) for layer in recognizer.memory.decoder_layers)
    assert cached_s < plain_s  # 124 ms against 430 ms of CPU, when it was written


def test_a_run_from_the_cache_ends_with_the_weights_of_a_run_without(train, tmp_path):
    missing = dataclasses.replace(train[1].utterances[0], audio=tmp_path / "missing.wav")
    dialogues = [train[0], dataclasses.replace(train[1], utterances=(missing, train[1].utterances[1])), *train[2:]]
    _, expected = run(tmp_path / "plain", dialogues, dropout=0.0)
    _, report = run(tmp_path / "cached", dialogues, dropout=0.0, cache_activations=True)
    assert report["left_out"] == expected["left_out"]
    assert len(report["left_out"]) == 1
    losses, others = ([entry["loss"] for entry in r["epochs"]] for r in (report, expected))
    assert losses == pytest.approx(others, rel=1e-3)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "cached"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=5e-4)


def test_dev_scores_from_the_cache_are_those_without(train, tmp_path):
    dev = make_dialogues(tmp_path / "dev", (3, 2, 4), "dev")
    missing = dataclasses.replace(dev[0].utterances[1], audio=tmp_path / "missing.wav")
    dev[0] = dataclasses.replace(dev[0], utterances=(dev[0].utterances[0], missing, dev[0].utterances[2]))
    _, expected = run(tmp_path / "plain", train, dev, dropout=0.0, epochs=1)
    _, report = run(tmp_path / "cached", train, dev, dropout=0.0, epochs=1, cache_activations=True)
    assert report["host_dev"] == pytest.approx(expected["host_dev"], abs=1e-5)
    assert report["epochs"][0]["dev"] == pytest.approx(expected["epochs"][0]["dev"], abs=2e-3)
    assert report["epochs"][0]["dev"]["utterances"] == 8
    assert report["left_out"] == expected["left_out"] == []
    assert len(list((tmp_path / "cached" / "activations").iterdir())) == 19 + 8


def test_a_batch_saves_the_same_activations_as_its_utterances_one_at_a_time(train, tmp_path):
    """Utterances of different length are padded in a batch; the saved activations have no padding."""
    recognizer = make_recognizer()
    whole = train[0].utterances[0]
    utterances = [whole, dataclasses.replace(whole, utterance_id="short", start_s=0.2, end_s=0.9), *train[1].utterances]
    missing = dataclasses.replace(whole, utterance_id="missing", audio=tmp_path / "missing.wav")
    together, alone = (CachedHost(recognizer, recognizer.memory, tmp_path / name) for name in ("together", "alone"))
    (failure,) = together.keep([missing, *utterances])
    assert failure.utterance == missing
    assert [alone.keep([utterance]) for utterance in utterances] == [[]] * 4
    lengths = set()
    for path in sorted((tmp_path / "alone").iterdir()):
        expected, found = load_file(path), load_file(tmp_path / "together" / path.name)
        lengths.add(len(expected["input_ids"]))
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["audio_mask"], expected["audio_mask"])
        torch.testing.assert_close(found["hidden"], expected["hidden"], rtol=1e-4, atol=1e-4)
    assert len(lengths) == 2
    assert len(list((tmp_path / "together").iterdir())) == 4
    assert not list(recognizer.memory.states)


def test_a_sound_file_with_another_letter_case_is_cached_too(train, tmp_path):
    sound = train[0].utterances[0]
    (tmp_path / "Turn.WAV").write_bytes(sound.audio.read_bytes())
    utterance = dataclasses.replace(sound, audio=tmp_path / "turn.wav")
    recognizer = make_recognizer()
    host = CachedHost(recognizer, recognizer.memory, tmp_path / "kept")
    assert host.keep([utterance]) == []
    assert host.prepare([utterance]).inputs["hidden"].shape[0] == 1
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_runs_can_share_a_folder_of_activations(train, tmp_path):
    folder = tmp_path / "shared"
    for name, width in (("one", 16), ("two", 8)):
        recognizer = make_recognizer(width=width)
        config = dataclasses.replace(FAST, epochs=1, cache_activations=True)
        train_memory(recognizer, train, output=tmp_path / name, config=config, activations=folder)
        kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert len(kept) == 19
        if name == "one":
            before = kept
    assert kept == before
    assert not (tmp_path / "two" / "activations").exists()
    with pytest.raises(ConfigError, match="cache_activations=True"):
        train_memory(recognizer, train, output=tmp_path / "three", config=FAST, activations=folder)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        train_memory(recognizer, train, output=tmp_path / "three", config=config, activations=tmp_path / "file")
    assert not (tmp_path / "three").exists()


def test_activations_of_another_host_are_refused(train, tmp_path):
    recognizer = make_recognizer()
    CachedHost(recognizer, recognizer.memory, tmp_path).keep(train[0].utterances[:1])
    with torch.no_grad():
        recognizer.memory.decoder_layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(HostError, match="scores differ"):
        CachedHost(recognizer, recognizer.memory, tmp_path).keep(train[0].utterances[:1])


def test_a_process_can_load_activations_that_another_process_saved(train, tmp_path):
    recognizer = make_recognizer(random=True)
    expected = gradients(recognizer, recognizer, train[1:2])[1]
    kept = CachedHost(recognizer, recognizer.memory, tmp_path)
    kept.keep(train[1].utterances)
    other = CachedHost(recognizer, recognizer.memory, tmp_path)
    assert gradients(recognizer, other, train[1:2])[1].loss == pytest.approx(expected.loss, rel=1e-5)


def test_another_dtype_has_files_of_its_own(train, tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        recognizer = make_recognizer()
        recognizer.model.to(dtype)
        assert CachedHost(recognizer, recognizer.memory, tmp_path).keep(train[0].utterances[:1]) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_settings_that_can_not_be_combined_with_the_cache_are_refused():
    for field in ({"lora_rank": 2}, {"gradient_checkpointing": True}):
        with pytest.raises(ConfigError, match=f"cache_activations.*{next(iter(field))}"):
            TrainingConfig(cache_activations=True, **field)

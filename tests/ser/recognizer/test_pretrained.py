"""From an adapter to its recogniser: the host it names, the LoRA beside it, its labels and question; plain files."""

import dataclasses
import shutil

import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration

from mal_adapter import MemoryAdapter, MemoryConfig, attach_memory, demo
from mal_adapter.demo.dialogues import make_dialogues, write_wavs
from mal_adapter.errors import AdapterNotFoundError, ConfigError, HostError, LabelError, ManifestError, SessionError
from mal_adapter.ser import Dialogue, EmotionRecognizer, Failure, load_host
from mal_adapter.ser.recognizer.pretrained import find_host, with_lora
from mal_adapter.stores import FolderStore

LABELS, PROMPT = ["neutral", "sad", "happy"], "How do they feel?"


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory):
    """A folder with `host`, and with `adapter`, which names it and differs from a fresh adapter."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "host")
    processor.save_pretrained(folder / "host")
    with attach_memory(model, layer_idx=0, config=MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)) as memory:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        memory.adapter.metadata = dataclasses.replace(
            memory.adapter.metadata, base_model_name_or_path=str(folder / "host")
        ).with_task(LABELS, PROMPT)
        memory.adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def renamed(saved, tmp_path):
    """renamed(name) -> a folder with the same adapter, which names another host."""

    def save(name):
        adapter = MemoryAdapter.from_pretrained(saved / "adapter")
        adapter.metadata = dataclasses.replace(adapter.metadata, base_model_name_or_path=name)
        adapter.save_pretrained(tmp_path / "renamed")
        return tmp_path / "renamed"

    return save


@pytest.fixture
def with_a_lora(saved, tmp_path):
    """The folder of an adapter with a LoRA that makes a difference."""
    peft = pytest.importorskip("peft")
    host = Qwen2AudioForConditionalGeneration.from_pretrained(saved / "host")
    names = [name for name, _ in host.named_modules() if "language_model" in name and name.endswith("q_proj")]
    tuned = peft.get_peft_model(host, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    MemoryAdapter.from_pretrained(saved / "adapter").save_pretrained(tmp_path / "with-lora")
    tuned.save_pretrained(str(tmp_path / "with-lora" / "lora"))
    return tmp_path / "with-lora"


def probabilities(results):
    return [list(result.probabilities.values()) for result in results]


@pytest.mark.parametrize("host", [None, demo.HOST_FOLDER])
def test_the_shipped_adapter_and_host_are_one_call(host):
    recognizer = EmotionRecognizer.from_pretrained(demo.ADAPTER_FOLDER, host)
    assert tuple(recognizer.labels) == demo.EMOTIONS
    assert recognizer.prompt == demo.PROMPT
    assert recognizer.memory.layer_idx == demo.LAYER_IDX


def test_an_adapter_brings_its_host_labels_and_question(saved, make_dialogue):
    dialogue = make_dialogue("d")
    recognizer = EmotionRecognizer.from_pretrained(saved / "adapter", dtype="float32", device="cpu")
    assert (list(recognizer.labels), recognizer.prompt) == (LABELS, PROMPT)
    host, processor = load_host(str(saved / "host"), dtype="float32", device="cpu")
    with attach_memory(host, adapter=saved / "adapter") as memory:
        expected = probabilities(EmotionRecognizer(host, processor, memory).recognize(dialogue))
    assert probabilities(recognizer.recognize(dialogue)) == expected


def test_every_way_to_give_a_host_answers_alike(saved, make_dialogue):
    dialogue = make_dialogue("d")
    adapter = MemoryAdapter.from_pretrained(saved / "adapter")
    answers = [
        probabilities(EmotionRecognizer.from_pretrained(given, host).recognize(dialogue))
        for given, host in [
            (saved / "adapter", None),
            (str(saved / "adapter"), saved / "host"),
            (saved / "adapter", str(saved / "host")),
            (adapter, None),
            (saved / "adapter", load_host(str(saved / "host"))),
        ]
    ]
    assert all(answer == answers[0] for answer in answers)


def test_options_reach_the_host_and_the_store(saved, make_dialogue, tmp_path):
    recognizer = EmotionRecognizer.from_pretrained(
        saved / "adapter", dtype="bfloat16", device="cpu", labels=["sad", "ne"], store=tmp_path / "states"
    )
    assert recognizer.model.dtype == torch.bfloat16
    assert list(recognizer.labels) == ["sad", "ne"]
    assert "sad or ne" in recognizer.prompt  # the adapter's question is about the adapter's labels
    list(recognizer.recognize(make_dialogue("d")))
    assert list(FolderStore(tmp_path / "states")) == ["d"]


def test_the_lora_beside_an_adapter_is_loaded_with_it(saved, with_a_lora, make_dialogue):
    from peft import PeftModel

    dialogue = make_dialogue("d")
    recognizer = EmotionRecognizer.from_pretrained(with_a_lora)
    answers = probabilities(recognizer.recognize(dialogue))
    assert answers != probabilities(EmotionRecognizer.from_pretrained(saved / "adapter").recognize(dialogue))
    host, processor = load_host(str(saved / "host"))
    tuned = PeftModel.from_pretrained(host, str(with_a_lora / "lora"))
    # A host that has the LoRA already does not get it twice.
    again = EmotionRecognizer.from_pretrained(with_a_lora, (tuned, processor))
    assert again.model is tuned
    assert probabilities(again.recognize(dialogue)) == answers


@pytest.mark.parametrize("damage", ["config", "weights", "other host"])
def test_a_lora_that_can_not_be_loaded_is_a_host_error(damage, saved, with_a_lora):
    lora = with_a_lora / "lora"
    host, _ = load_host(str(saved / "host"))
    if damage == "config":
        (lora / "adapter_config.json").write_text("{")
    if damage == "weights":
        (lora / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    if damage == "other host":
        host = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(HostError, match="lora"):
        with_lora(host, with_a_lora)


def test_an_adapter_that_names_no_host_says_what_to_pass(renamed):
    folder = renamed(None)
    with pytest.raises(HostError, match="model="):
        EmotionRecognizer.from_pretrained(folder)
    with pytest.raises(HostError, match="model="):
        EmotionRecognizer.from_pretrained(MemoryAdapter.from_pretrained(folder))


def test_a_relative_host_is_found_beside_the_adapter_and_first_in_the_working_directory(saved, tmp_path, monkeypatch):
    shutil.copytree(saved / "host", tmp_path / "models" / "host")
    adapter = MemoryAdapter.from_pretrained(saved / "adapter")
    adapter.metadata = dataclasses.replace(adapter.metadata, base_model_name_or_path="host")
    adapter.save_pretrained(tmp_path / "models" / "adapter")
    beside = tmp_path / "models" / "adapter"
    for given in (beside, f"{beside}/"):
        assert find_host(adapter.metadata, given) == str(tmp_path / "models" / "host")
    monkeypatch.chdir(tmp_path / "models")
    assert find_host(adapter.metadata, "adapter") == find_host(adapter.metadata, adapter) == "host"
    monkeypatch.chdir(tmp_path / "models" / "adapter")
    assert find_host(adapter.metadata, ".") == str(tmp_path / "models" / "host")


@pytest.mark.parametrize("name", ["/no/such/folder", "./host", "nobody/no-such-host"])
def test_an_adapter_whose_host_is_gone_says_what_to_pass(name, renamed):
    folder = renamed(name)
    with pytest.raises(HostError) as raised:
        EmotionRecognizer.from_pretrained(folder)
    assert all(part in str(raised.value) for part in (name, str(folder), "model="))
    with pytest.raises(HostError, match="/another/host"):
        EmotionRecognizer.from_pretrained(folder, "/another/host")


def test_a_model_that_is_neither_a_name_nor_a_pair_is_refused(saved, model, processor):
    for given in (model, 7, (model,), (processor, model), (model, processor, None)):
        with pytest.raises(ConfigError, match="model is"):
            EmotionRecognizer.from_pretrained(saved / "adapter", given)
    for options in ({"device": "cpu"}, {"dtype": "float32"}, {"device_map": "auto"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            EmotionRecognizer.from_pretrained(saved / "adapter", (model, processor), **options)


def test_a_missing_adapter_and_wrong_labels_are_found_before_the_host_is_loaded(saved, tmp_path):
    with pytest.raises(AdapterNotFoundError):
        EmotionRecognizer.from_pretrained(tmp_path / "nothing", "/no/host")
    with pytest.raises(LabelError):
        EmotionRecognizer.from_pretrained(saved / "adapter", "/no/host", labels=["sad"])


def test_a_failed_load_leaves_no_memory_on_a_loaded_model(saved, model, processor):
    with pytest.raises(ConfigError):
        EmotionRecognizer.from_pretrained(saved / "adapter", (model, processor), prompt=" ")
    attach_memory(model, layer_idx=0).detach()  # refused, if the layer had a memory


def test_plain_files_are_one_dialogue(tmp_path):
    recognizer = EmotionRecognizer.from_pretrained(demo.ADAPTER_FOLDER, demo.HOST_FOLDER)
    spoken = write_wavs(list(make_dialogues("test", seed=7, count=1)), tmp_path / "call")[0]
    files = [turn.audio for turn in spoken.utterances]
    results = list(recognizer.recognize(files))
    assert probabilities(results) == probabilities(recognizer.recognize(spoken))
    assert [result.utterance.utterance_id for result in results] == [file.name for file in files]
    assert recognizer.memory.states[files[0].parent.name].utterances == len(files)
    first = next(recognizer.recognize(str(files[0])))
    assert first.probabilities == results[0].probabilities
    assert isinstance(next(recognizer.recognize([tmp_path / "missing.wav"])), Failure)


def test_files_of_the_same_name_have_different_ids(tmp_path):
    dialogue = Dialogue.from_files([tmp_path / "a" / "1.wav", tmp_path / "b" / "1.wav", "2.wav"])
    assert dialogue.dialogue_id == "dialogue"  # no folder has them all
    assert [turn.utterance_id for turn in dialogue.utterances] == ["0-1.wav", "1-1.wav", "2.wav"]
    assert Dialogue.from_files("2.wav", "call-42").dialogue_id == "call-42"


@pytest.mark.parametrize("given", [[], [""], [7], [b"a.wav"], "calls.jsonl", ["a.wav", "calls.JSON"]])
def test_anything_but_sound_files_is_refused(given):
    with pytest.raises(ManifestError):
        Dialogue.from_files(given)


def test_a_detached_memory_is_refused(saved):
    recognizer = EmotionRecognizer.from_pretrained(saved / "adapter")
    recognizer.memory.detach()
    with pytest.raises(SessionError):
        EmotionRecognizer(recognizer.model, recognizer.processor, recognizer.memory)

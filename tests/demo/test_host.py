"""The shipped host is an ordinary model folder."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from mal_adapter.demo import EMOTIONS, FILES_FOLDER, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.dialogues import make_dialogues
from mal_adapter.ser.loading import load_host

HOST_LENGTH_S = 6
"""The longest audio that the host accepts."""


@pytest.fixture(scope="module")
def host():
    return load_host(str(HOST_FOLDER), device="cpu")


@pytest.fixture(scope="module")
def dialogues():
    return list(make_dialogues("test", 0, 6))


def prompt_text(processor, question):
    message = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def real_inputs(processor, dialogues, question=PROMPT):
    """The inputs of a user's code: the processor on whole audio, padded to the host's full length."""
    audio = [turn.audio for dialogue in dialogues for turn in dialogue.turns]
    texts = [prompt_text(processor, question)] * len(audio)
    return processor(text=texts, audio=audio, sampling_rate=16_000, return_tensors="pt", padding=True)


def test_the_folder_loads_with_the_ordinary_classes():
    assert isinstance(AutoProcessor.from_pretrained(HOST_FOLDER), Qwen2AudioProcessor)
    AutoTokenizer.from_pretrained(HOST_FOLDER)
    model, report = Qwen2AudioForConditionalGeneration.from_pretrained(HOST_FOLDER, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.model_type == "qwen2_audio"


def test_the_files_are_few_small_and_without_pickles():
    files = [path for path in FILES_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}


def test_every_label_is_one_token(host):
    ids = host[1].tokenizer(list(EMOTIONS), add_special_tokens=False)["input_ids"]
    assert [len(pieces) for pieces in ids] == [1] * len(EMOTIONS)


def test_audio_hidden_states_do_not_depend_on_the_question(host, dialogues):
    model, processor = host
    states = []
    for question in (PROMPT, "How high is the pitch?"):
        inputs = real_inputs(processor, dialogues[:1], question)
        mask = inputs["input_ids"] == model.config.audio_token_id
        with torch.no_grad():
            states.append(model(**inputs, output_hidden_states=True).hidden_states[LAYER_IDX + 1][mask])
    assert torch.allclose(*states, atol=1e-5)


def test_the_shipped_host_alone_is_better_than_chance_and_below_the_bound(host, dialogues):
    """60 utterances: the best possible reader of one utterance has an accuracy of 61 %, always neutral 38 %."""
    model, processor = host
    label_ids = [processor.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in EMOTIONS]
    labels = torch.tensor([turn.label for dialogue in dialogues for turn in dialogue.turns])
    with torch.no_grad():
        logits = model(**real_inputs(processor, dialogues)).logits[:, -1, label_ids]
    assert 0.42 < (logits.argmax(-1) == labels).float().mean() < 0.78


def test_audio_up_to_the_hosts_length_is_accepted(host):
    model, processor = host
    audio = np.random.default_rng(0).normal(0, 0.01, HOST_LENGTH_S * 16_000).astype(np.float32)
    inputs = processor(text=[prompt_text(processor, PROMPT)], audio=[audio], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()

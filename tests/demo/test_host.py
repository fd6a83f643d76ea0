"""The shipped host is an ordinary model folder, and the shortcuts used for training are the same function."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from mal_adapter.demo import EMOTIONS, FILES_FOLDER, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.activations import HostTail, cache_activations, emotion_prompt
from mal_adapter.demo.dialogues import make_dialogues
from mal_adapter.demo.features import features_of
from mal_adapter.demo.host import CHUNK_LENGTH_S, build_tokenizer, load_host, prompt_text
from mal_adapter.demo.host_training import layout, packed_losses, tokenise
from tests.demo.conftest import IN_TRAINING


@pytest.fixture(scope="module")
def host():
    return load_host(HOST_FOLDER)


@pytest.fixture(scope="module")
def dialogues():
    return list(make_dialogues("test", 0, 6))


@pytest.fixture(scope="module")
def features(dialogues):
    return features_of(dialogues)


def real_inputs(processor, dialogues, question=PROMPT):
    """What a user's code feeds the model: the processor on whole audio, padded to the host's full length."""
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


def test_any_text_encodes_and_decodes_without_loss():
    tokenizer = build_tokenizer()
    for text in ("How does the speaker feel?", "frustrated", "ünïcode 你好 😀", "\n\t a  b "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


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


@IN_TRAINING
def test_cached_activations_continue_to_the_full_forwards_logits(host, dialogues, features, tmp_path):
    model, processor = host
    activations = cache_activations(model, processor, features, tmp_path)
    inputs = real_inputs(processor, dialogues)
    with torch.no_grad():
        full = model(**inputs, output_hidden_states=True)
    ids, audio = emotion_prompt(processor)
    assert inputs["input_ids"].tolist() == [ids.tolist()] * len(inputs["input_ids"])
    assert torch.equal(activations.audio_mask, inputs["input_ids"][0] == model.config.audio_token_id)
    assert activations.audio == audio

    rows = activations.batch(range(len(dialogues)))[0].flatten(0, 1)
    # float16 features and activations: a relative step of 2^-11, seen through two layers
    assert torch.allclose(rows, full.hidden_states[LAYER_IDX + 1], atol=2e-2, rtol=2e-3)
    tail = HostTail(model, processor)
    expected = full.logits[:, -1, tail.label_ids]
    assert torch.allclose(tail(full.hidden_states[LAYER_IDX + 1]), expected, atol=1e-4)
    assert torch.allclose(tail(rows), expected, atol=0.1)


@IN_TRAINING
def test_a_residual_at_the_hook_and_in_the_tail_are_the_same(host, dialogues):
    model, processor = host
    inputs = real_inputs(processor, dialogues[:1])
    mask = inputs["input_ids"] == model.config.audio_token_id
    residual = 0.1 * torch.randn(model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = {}

    def hook(module, arguments, output):
        plain["hidden"] = output
        return output + mask[..., None] * residual

    handle = model.model.language_model.layers[LAYER_IDX].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    handle.remove()
    tail = HostTail(model, processor)
    added = residual.clone().requires_grad_()
    continued = tail(plain["hidden"] + mask[..., None] * added)
    assert torch.allclose(continued, logits[:, tail.label_ids], atol=1e-4)
    continued.sum().backward()
    assert added.grad.abs().sum() > 0


@IN_TRAINING
def test_packed_questions_are_the_same_function_as_separate_prompts(host, dialogues, features):
    model, processor = host
    prompts = tokenise(processor, features)
    asked = ["emotion", "pitch"]
    ids = torch.cat([prompts.start.expand(10, -1), *(prompts.tasks[task][:10] for task in asked)], dim=1)
    row = layout(prompts, asked)
    mels = torch.from_numpy(features.mels[0].astype(np.float32))
    with torch.no_grad():
        losses, _ = packed_losses(model, row, prompts.audio, mels, ids)
        for index, question in ((0, PROMPT), (2, "How high is the pitch?")):
            logits = model(**real_inputs(processor, dialogues[:1], question)).logits[:, -1]
            answers = ids[:, row.predicts[index] + 1]
            assert losses[index].item() == pytest.approx(
                torch.nn.functional.cross_entropy(logits, answers).item(), abs=2e-2
            )


@IN_TRAINING
def test_the_shipped_host_hears_but_cannot_know_the_speaker(host, dialogues):
    """60 utterances: the best possible reader of one utterance is right on 61 %, always neutral on 38 %."""
    model, processor = host
    tail = HostTail(model, processor)
    labels = torch.tensor([turn.label for dialogue in dialogues for turn in dialogue.turns])
    with torch.no_grad():
        logits = model(**real_inputs(processor, dialogues)).logits[:, -1, tail.label_ids]
    assert 0.42 < (logits.argmax(-1) == labels).float().mean() < 0.78


def test_audio_up_to_the_hosts_length_is_accepted(host):
    model, processor = host
    audio = np.random.default_rng(0).normal(0, 0.01, CHUNK_LENGTH_S * 16_000).astype(np.float32)
    inputs = processor(text=[prompt_text(processor, PROMPT)], audio=[audio], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()

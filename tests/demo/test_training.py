"""Training on cached activations trains the same function that the hooks run in the host."""

import pytest
import torch

from mal_adapter import MemoryAdapter, attach_memory
from mal_adapter.demo import EMOTIONS, HOST_FOLDER, LAYER_IDX, PROMPT
from mal_adapter.demo.activations import HostTail, cache_activations
from mal_adapter.demo.dialogues import make_dialogues
from mal_adapter.demo.features import features_of
from mal_adapter.demo.host import load_host, prompt_text
from mal_adapter.demo.training import answer_dialogues, audit, demo_config, fit
from tests.demo.conftest import IN_TRAINING

pytestmark = IN_TRAINING


@pytest.fixture(scope="module")
def host():
    return load_host(HOST_FOLDER)


@pytest.fixture(scope="module")
def dialogues():
    return list(make_dialogues("dev", 11, 3))


@pytest.fixture(scope="module")
def activations(host, dialogues, tmp_path_factory):
    return cache_activations(*host, features_of(dialogues), tmp_path_factory.mktemp("activations"))


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    adapter = MemoryAdapter(demo_config(96)).eval()
    torch.nn.init.normal_(adapter.readout_out.weight, std=0.7)
    return adapter


@torch.no_grad()
def test_the_cached_path_answers_as_the_hooked_host_does(host, dialogues, activations, adapter):
    model, processor = host
    ids = torch.tensor(processor.tokenizer(list(EMOTIONS), add_special_tokens=False)["input_ids"])[:, 0]
    hidden, _ = activations.batch([0, 1, 2])
    cached = answer_dialogues(adapter, hidden, activations.audio, HostTail(model, processor))
    with attach_memory(model, LAYER_IDX, adapter=adapter) as memory:
        for turn in range(10):
            with memory.session([d.dialogue_id for d in dialogues]):
                audio = [d.turns[turn].audio for d in dialogues]
                texts = [prompt_text(processor, PROMPT)] * 3
                inputs = processor(text=texts, audio=audio, sampling_rate=16_000, return_tensors="pt", padding=True)
                logits = model(**inputs).logits[:, -1, ids]
            # the cache is float16; the memory must not make more of that than it is
            torch.testing.assert_close(logits, cached[:, turn], rtol=0.02, atol=0.1)
    bare = HostTail(model, processor)(hidden.flatten(0, 1)).view_as(cached)
    assert (cached - bare).abs().max() > 0.5  # the memory was at work


def test_a_few_steps_lower_the_loss_and_touch_only_the_adapter(host, activations, adapter):
    tail = HostTail(*host)
    before = {name: tensor.clone() for name, tensor in host[0].state_dict().items()}
    hidden, labels = activations.batch([0, 1, 2])

    def loss():
        logits = answer_dialogues(adapter, hidden, activations.audio, tail)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    start = loss().item()
    fit(adapter, activations, tail, steps=20, batch_size=3)
    assert loss().item() < start - 0.1
    assert not adapter.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in host[0].state_dict().items())


def test_the_audit_of_a_fresh_adapter_finds_no_memory(host, activations):
    figures = audit(MemoryAdapter(demo_config(96)).eval(), activations, HostTail(*host))
    assert set(figures) == {"right", "reset", "swapped", "bare", "mixed", "shuffled"}
    assert figures["right"] == figures["reset"] == figures["swapped"] == figures["bare"] == figures["mixed"]
    assert sum(figures["shuffled"]) == pytest.approx(sum(figures["right"]))  # the same answers, at other turns

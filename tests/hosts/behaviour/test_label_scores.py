"""Labels of several tokens on every family: the scores of one whole forward per label, whatever the host's cache is.

Every test of this folder runs on every family of `builders.HOSTS`, on Ultravox and on Step-Audio 2, which has no cache.
"""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter.ser.recognizer import EmotionRecognizer
from tests.hosts.behaviour.common import attach
from tests.hosts.builders import TinyHost
from tests.hosts.probes import assert_states_close
from tests.hosts.spelling import END_ID, ByLetter

PREFIXES = ("ab", "abc", "abd", "q", "xyzwv")  # of one token to five, with common beginnings, one a prefix of another
NO_PREFIX = ("ab", "ac", "q", "xyzw")
CLIPS = [[4], [9], [5]]
TEXT = (24, 2, 6)  # longer than the sliding windows of the tiny hosts


def make_recognizer(model: PreTrainedModel, memory=None, labels=None) -> EmotionRecognizer:
    model.generation_config.eos_token_id = END_ID  # some have a checkpoint's own, which the tiny vocabulary lacks
    return EmotionRecognizer(model, ByLetter(), memory, labels)


def inputs_of(host: TinyHost, model: PreTrainedModel, recognizer: EmotionRecognizer, **options) -> dict[str, Tensor]:
    return recognizer.with_positions(host.make_inputs(model, CLIPS, text=TEXT, **options)[0])


def whole_forward(recognizer: EmotionRecognizer, inputs: dict[str, Tensor], label: int) -> Tensor:
    """(batch,) log-probability of a label: prompt and label in one forward, without a cache."""
    scorer = recognizer._scorer
    ids = torch.tensor(scorer.token_ids[label])
    rows, prompt_len = inputs["input_ids"].shape
    longer = dict(inputs)
    longer.pop("position_ids", None)  # the host counts the positions itself
    longer["input_ids"] = torch.cat((inputs["input_ids"], ids.expand(rows, -1)), 1)
    longer["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones(rows, len(ids), dtype=torch.long)), 1)
    for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
        longer[name] = torch.cat((inputs[name], torch.zeros(rows, len(ids), dtype=torch.long)), 1)
    log_probs = recognizer.model(**longer, use_cache=False).logits.log_softmax(-1)
    score = sum(log_probs[:, prompt_len - 1 + n, token] for n, token in enumerate(ids))
    return score + log_probs[:, -1, scorer.end_ids].logsumexp(-1) if scorer.end_ids else score


def forget_the_cache(model: PreTrainedModel) -> None:
    """Turn the host into one without a cache."""

    def hook(module, args, kwargs, output):
        assert not kwargs.get("past_key_values")
        output.past_key_values = None
        return output

    model.register_forward_hook(hook, with_kwargs=True, prepend=True)


@pytest.mark.parametrize(("names", "cached"), [(PREFIXES, True), (NO_PREFIX, True), (PREFIXES, False)])
def test_labels_have_the_scores_of_one_whole_forward_each(host: TinyHost, model, names, cached):
    recognizer = make_recognizer(model, labels=names)
    assert bool(recognizer._scorer.end_ids) == (names is PREFIXES)
    inputs = inputs_of(host, model, recognizer)
    with torch.no_grad():
        expected = torch.stack([whole_forward(recognizer, inputs, n) for n in range(len(names))], 1)
        if not cached:
            forget_the_cache(model)
        scores = recognizer.log_probs(inputs)
    assert (scores - expected).abs().max() < 2e-4
    assert (scores[0] - scores[1]).abs().max() > 1e-2  # the rows differ


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_labels_read_the_memory_of_the_prompt_and_write_it_once(host: TinyHost, model, cached):
    memory = attach(model)
    recognizer = make_recognizer(model, memory, PREFIXES)
    first, second = (inputs_of(host, model, recognizer, seed=seed) for seed in (1, 2))
    ids = ["a", "b", "c"]
    with torch.no_grad():
        with memory.session(ids):
            model(**first)
        past = [memory.states[i].clone() for i in ids]
        expected = []
        for label in range(len(PREFIXES)):
            with memory.session(ids, write=False):
                expected.append(whole_forward(recognizer, second, label))
        with memory.disabled():
            without = torch.stack([whole_forward(recognizer, second, n) for n in range(len(PREFIXES))], 1)
        with memory.session(ids):
            model(**second)
        written = [memory.states[i].clone() for i in ids]

        for i, state in zip(ids, past, strict=True):
            memory.states[i] = state
        if not cached:
            forget_the_cache(model)
        with memory.session(ids):
            scores = recognizer.log_probs(second)
    assert (scores - torch.stack(expected, 1)).abs().max() < 2e-4
    assert (scores - without).abs().max() > 1e-2  # the memory changes the scores
    for i, state in zip(ids, written, strict=True):
        assert_states_close(memory.states[i], state)
        assert (memory.states[i].utterances, memory.states[i].tokens) == (state.utterances, state.tokens)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_scores_have_the_gradients_of_whole_forwards(host: TinyHost, model, cached):
    """Through the memory's state too: the second utterance reads what the first wrote."""
    model.requires_grad_(False)
    memory = attach(model)
    recognizer = make_recognizer(model, memory, PREFIXES)
    memory.train()
    first, second = (inputs_of(host, model, recognizer, seed=seed) for seed in (1, 2))
    weights = torch.randn(3, len(PREFIXES), generator=torch.Generator().manual_seed(0))
    parameters = list(memory.parameters())
    loss = torch.zeros(())
    for label in range(len(PREFIXES)):
        with memory.session(["a", "b", "c"]):
            model(**first)
            loss = loss + (weights[:, label] * whole_forward(recognizer, second, label)).sum()
        memory.states.clear()
    expected = torch.autograd.grad(loss, parameters, materialize_grads=True)

    if not cached:
        forget_the_cache(model)
    with memory.session(["a", "b", "c"]):
        recognizer.log_probs(first)
        scores = recognizer.log_probs(second)
    found = torch.autograd.grad((weights * scores).sum(), parameters, materialize_grads=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm() + 1e-4

"""The recogniser: scores against brute force, batches against singles, one write per utterance, bad files."""

import copy
import math
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch

from mal_adapter import MemoryConfig, attach_memory
from mal_adapter.errors import ConfigError, HostError, LabelError
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction
from mal_adapter.ser.recognizer.audio import load_waveform
from mal_adapter.ser.recognizer.scoring import LabelScorer, end_ids
from tests.hosts.builders import FAMILIES
from tests.ser.fixtures import tone

WORDS = LabelSet(("neutral", "happy", "sad", "fear"))


@pytest.fixture
def memory(model):
    """A memory that makes a difference: a fresh adapter is a no-op, so its parameters are drawn at random."""
    config = MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)
    attached = attach_memory(model, layer_idx=0, config=config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    yield attached
    attached.detach()


def brute_force(recognizer, utterance):
    """Log-probability of each label by one whole forward per label, without a cache."""
    inputs = recognizer._audio([load_waveform(utterance)])
    inputs.pop("token_type_ids", None)
    scorer = recognizer._scorer
    keep = inputs["input_ids"].shape[1] - scorer.healed_tokens
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :keep], inputs["attention_mask"][:, :keep]
    scores = []
    for ids in scorer.token_ids:
        answer = torch.tensor([ids])
        whole = dict(inputs, input_ids=torch.cat((inputs["input_ids"], answer), 1))
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        with torch.no_grad():
            log_probs = recognizer.model(**whole, use_cache=False).logits[0].float().log_softmax(-1)
        score = sum(log_probs[keep - 1 + n, token] for n, token in enumerate(ids))
        if scorer.end_ids:
            score = score + log_probs[-1, scorer.end_ids].logsumexp(-1)
        scores.append(score)
    return torch.stack(scores).softmax(-1)


@pytest.mark.parametrize(
    "names",
    [
        ("sad", "ne"),  # one token each: no second forward at all
        ("sad", "neutral", "happy"),  # one token and many
        ("fear", "anger", "disgust"),  # many and many, of different lengths
        ("sad", "sadness", "sadder", "ne"),  # prefixes: the end decides
    ],
)
def test_probabilities_are_those_of_one_forward_per_label(names, model, processor, make_dialogue):
    recognizer = EmotionRecognizer(model, processor, labels=names)
    dialogue = make_dialogue("d")
    for result in recognizer.recognize(dialogue):
        expected = brute_force(recognizer, result.utterance)
        assert list(result.probabilities) == list(names)
        assert torch.tensor(list(result.probabilities.values())) == pytest.approx(expected, abs=1e-5)
        assert result.label == names[int(expected.argmax())]
        assert math.isclose(sum(result.probabilities.values()), 1, abs_tol=1e-5)


class Letters:
    """A tokenizer of one token per letter."""

    unk_token_id = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1 + ord(letter) % 40 for letter in text]}


@pytest.mark.parametrize(("names", "end_ids"), [(("ab", "c", "defg"), []), (("ab", "abc", "q"), [47, 48])])
@pytest.mark.parametrize(
    "family", ["qwen2_audio", "voxtral", "audioflamingo3", "phi4_multimodal", "qwen2_5_omni_thinker"]
)
def test_scores_on_the_cache_are_right_for_every_family(family, names, end_ids):
    """Padded batch, positions counted as generate() does, against whole forwards with the host's own positions."""
    host = FAMILIES[family]
    if not host.exists:
        pytest.skip("this version of transformers has no such family")
    model = host.build()
    inputs, _ = host.make_inputs(model, [[4], [9], [5]], padding_side="left")
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    scorer = LabelScorer(Letters(), LabelSet(names), "", end_ids)
    with torch.no_grad():
        outputs = model(**inputs, position_ids=positions, use_cache=True)
        scores = scorer.log_probs(model, outputs.logits[:, -1], outputs.past_key_values, mask, positions)
    for index, ids in enumerate(scorer.token_ids):
        answer = torch.tensor([ids] * 3)
        ids_and_mask = {
            "input_ids": torch.cat((inputs["input_ids"], answer), 1),
            "attention_mask": torch.cat((mask, torch.ones_like(answer)), 1),
        }
        with torch.no_grad():
            log_probs = model(**{**inputs, **ids_and_mask}, use_cache=False).logits.log_softmax(-1)
        expected = sum(log_probs[:, mask.shape[1] - 1 + n, token] for n, token in enumerate(ids))
        if end_ids:
            expected = expected + log_probs[:, -1, end_ids].logsumexp(-1)
        assert (scores[:, index] - expected).abs().max() < 1e-5


def test_the_end_of_the_answer_distinguishes_labels_with_a_common_prefix(processor):
    eos = processor.tokenizer.eos_token_id
    assert LabelScorer(processor.tokenizer, LabelSet(("sad", "sadness")), "", [eos]).end_ids == [eos]
    assert LabelScorer(processor.tokenizer, LabelSet(("sad", "glad")), "", [eos]).end_ids == []


def test_a_merge_across_the_boundary_belongs_to_the_label(model, processor, make_dialogue, monkeypatch):
    """':' + 'a' is one token: behind a prompt that ends in ':', the label 'anger' begins with it."""
    monkeypatch.setattr(
        processor, "chat_template", processor.chat_template.replace("assistant\\n", "assistant:").replace(
            "assistant\n", "assistant:"
        )
    )  # fmt: skip
    recognizer = EmotionRecognizer(model, processor, labels=("anger", "sad", "happy"))
    scorer, tokenizer = recognizer._scorer, processor.tokenizer
    assert recognizer._audio.text.endswith("assistant:")
    assert scorer.healed_tokens == 1
    assert tokenizer.convert_ids_to_tokens([ids[0] for ids in scorer.token_ids]) == [":a", ":", ":"]
    for result in recognizer.recognize(make_dialogue("d")):
        expected = brute_force(recognizer, result.utterance)
        assert torch.tensor(list(result.probabilities.values())) == pytest.approx(expected, abs=1e-5)


def test_all_end_tokens_are_scored(model, processor, make_dialogue, monkeypatch):
    eos, other = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    monkeypatch.setattr(model.generation_config, "eos_token_id", [eos, other])
    recognizer = EmotionRecognizer(model, processor, labels=("sad", "sadness"))
    assert recognizer._scorer.end_ids == [eos, other]
    result = next(recognizer.recognize(make_dialogue("d")))
    assert torch.tensor(list(result.probabilities.values())) == pytest.approx(
        brute_force(recognizer, result.utterance), abs=1e-5
    )
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert end_ids(model, processor.tokenizer) == [eos]


def by_utterance(results):
    return {
        (result.utterance.dialogue_id, result.utterance.utterance_id): list(result.probabilities.values())
        for result in results
    }


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_give_the_same_answers_as_single_utterances(
    with_memory, padding_side, batch_size, model, processor, memory, make_dialogue, monkeypatch
):
    monkeypatch.setattr(processor.tokenizer, "padding_side", padding_side)
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)
    if not with_memory:
        recognizer = recognizer.without_memory()
    dialogues = [make_dialogue(*args) for args in [("a",), ("b", [1.9]), ("c", [0.4, 0.9]), ("d", [1.0] * 4)]]
    singles = by_utterance(result for dialogue in dialogues for result in recognizer.recognize(dialogue))
    batched = by_utterance(recognizer.recognize_many(dialogues, batch_size=batch_size))
    assert batched.keys() == singles.keys()
    for key, probabilities in singles.items():
        assert batched[key] == pytest.approx(probabilities, abs=1e-4), key


def test_the_memory_is_read_and_written_once_per_utterance(model, processor, memory, make_dialogue):
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)  # labels of many tokens: a second forward each
    dialogue = make_dialogue("d")
    for count, _ in enumerate(recognizer.recognize(dialogue), start=1):
        assert memory.states["d"].utterances == count
    inputs = [recognizer._audio([load_waveform(utterance)]) for utterance in dialogue.utterances]
    audio_tokens = sum(int((one["input_ids"] == recognizer._inputs._audio_id).sum()) for one in inputs)
    assert memory.states["d"].tokens == audio_tokens


def test_the_past_makes_a_difference_and_only_with_memory(model, processor, memory, make_dialogue):
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)
    plain = recognizer.without_memory()
    dialogue = make_dialogue("d")
    alone = Dialogue("d", dialogue.utterances[-1:])
    last = list(recognizer.recognize(dialogue))[-1].probabilities
    first = next(recognizer.recognize(alone)).probabilities
    assert any(last[label] != pytest.approx(first[label], rel=1e-3) for label in WORDS)
    states = memory.states["d"].clone()
    assert list(plain.recognize(dialogue))[-1].probabilities == next(plain.recognize(alone)).probabilities
    assert memory.states["d"].utterances == states.utterances  # neither written nor started again
    assert torch.equal(memory.states["d"].weights[0], states.weights[0])


def test_without_memory_answers_like_the_plain_host(model, processor, make_dialogue):
    bare = by_utterance(EmotionRecognizer(model, processor, labels=WORDS).recognize(make_dialogue("d")))
    with attach_memory(model, layer_idx=0, config=MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)) as memory:
        recognizer = EmotionRecognizer(model, processor, memory, WORDS)
        assert by_utterance(recognizer.without_memory().recognize(make_dialogue("d"))) == bare
        assert len(memory.states) == 0


def test_recognize_starts_a_dialogue_again_and_answer_continues_it(model, processor, memory, make_dialogue):
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)
    dialogue = make_dialogue("d")
    first = by_utterance(recognizer.recognize(dialogue))
    assert by_utterance(recognizer.recognize(dialogue)) == first
    del memory.states["d"]
    stepwise = by_utterance(result for utterance in dialogue.utterances for result in recognizer.answer([utterance]))
    assert stepwise == first


def test_bad_files_among_good_ones(model, processor, memory, make_dialogue, tmp_path):
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)
    good = make_dialogue("d", [0.8, 0.9]).utterances
    soundfile.write(tmp_path / "short.wav", tone(300 / 16_000), 16_000)
    soundfile.write(tmp_path / "long.wav", tone(5.0), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    bad = [Utterance("d", name, "A", tmp_path / f"{name}.wav") for name in ("short", "long", "silent", "missing")]
    clean = by_utterance(recognizer.recognize(Dialogue("d", good)))
    results = list(recognizer.recognize(Dialogue("d", (bad[0], good[0], *bad[1:], good[1]))))
    kinds = [type(result) for result in results]
    assert kinds == [Failure, Prediction, Failure, Failure, Failure, Prediction]
    reasons = [str(result.error) for result in results if isinstance(result, Failure)]
    assert ["too short" in reasons[0], "5.00 s" in reasons[1], "silent" in reasons[2], "no such" in reasons[3]] == [
        True
    ] * 4
    assert "0.019 s" in reasons[0]
    assert by_utterance(result for result in results if isinstance(result, Prediction)) == clean
    # The same beside another dialogue in one batch: bad rows leave the others alone.
    both = [Dialogue("d", (bad[0], good[0], bad[2], good[1])), make_dialogue("e", [0.5] * 5)]
    batched = [result for result in recognizer.recognize_many(both) if isinstance(result, Prediction)]
    for key, probabilities in clean.items():
        assert by_utterance(batched)[key] == pytest.approx(probabilities, abs=1e-4)
    assert len(batched) == 7


def test_samples_are_answered_as_the_file_that_has_them(model, processor, memory, make_dialogue):
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)
    utterances = make_dialogue("d").utterances
    expected = list(recognizer.recognize(make_dialogue("d")))
    state = memory.states["d"]
    memory.states.forget(["d"])
    for place, (utterance, file) in enumerate(zip(utterances, expected, strict=True)):
        other = Utterance("other", "0", "A", utterances[0].audio)
        nowhere = Utterance("d", str(place), "A", "nowhere")
        given = recognizer.answer([nowhere, other], waveforms=[load_waveform(utterance), None])
        assert (given[0].audio_s, given[0].utterance) == (file.audio_s, nowhere)
        assert given[0].probabilities == pytest.approx(file.probabilities, abs=1e-6)
    torch.testing.assert_close(memory.states["d"].weights, state.weights)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(16_000, np.float32), "silent"),
        (np.zeros(0, np.float32), "empty"),
        (np.full(16_000, np.nan, np.float32), "not finite"),
        (tone(5.0), "at most 4.00 s"),
    ],
)
def test_samples_that_are_no_speech_are_failures(model, processor, memory, samples, message):
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)
    (result,) = recognizer.answer([Utterance("d", "0", "A", "call-42")], waveforms=[samples])
    assert isinstance(result, Failure)
    assert message in str(result.error)
    assert str(result.error).startswith("call-42: ")
    assert "d" not in memory.states
    with pytest.raises(ConfigError, match="a waveform per utterance"):
        recognizer.answer([Utterance("d", "0", "A", "call-42")], waveforms=[])


def test_the_longest_utterance_is_taken_and_a_longer_one_is_not(model, processor):
    recognizer = EmotionRecognizer(model, processor, labels=WORDS)
    assert recognizer.longest_s == 4.0
    utterance = Utterance("d", "0", "A", "call-42")
    assert isinstance(recognizer.answer([utterance], waveforms=[tone(4.0)])[0], Prediction)
    assert isinstance(recognizer.answer([utterance], waveforms=[tone(4.1)])[0], Failure)


def test_a_failed_forward_writes_nothing_and_is_not_hidden(model, processor, memory, make_dialogue, monkeypatch):
    recognizer = EmotionRecognizer(model, processor, memory, WORDS)
    results = recognizer.recognize(make_dialogue("d"))
    next(results)

    @contextmanager
    def broken():
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        yield
        handle.remove()

    with broken(), pytest.raises(RuntimeError, match="no memory"):
        next(results)
    assert memory.states["d"].utterances == 1


def test_results_are_yielded_as_soon_as_they_are_known(model, processor, make_dialogue):
    dialogue = make_dialogue("d")
    dialogue.utterances[2].audio.unlink()
    results = EmotionRecognizer(model, processor, labels=WORDS).recognize(dialogue)
    first = next(results)
    assert first.utterance is dialogue.utterances[0]
    assert first.audio_s == pytest.approx(0.7)
    assert 0 < first.elapsed_s < 30
    assert isinstance(list(results)[-1], Failure)


def test_a_bf16_host_takes_the_features_in_its_dtype(model, processor, make_dialogue):
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    with attach_memory(half, layer_idx=0, config=MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)) as memory:
        results = list(EmotionRecognizer(half, processor, memory, WORDS).recognize(make_dialogue("d")))
        assert all(math.isclose(sum(result.probabilities.values()), 1, abs_tol=1e-5) for result in results)
        assert memory.states["d"].utterances == 3


def test_wrong_arguments_are_typed_errors(model, processor, make_dialogue):
    recognizer = EmotionRecognizer(model, processor)
    dialogue = make_dialogue("d")
    with pytest.raises(ConfigError, match="batch_size=0"):
        next(recognizer.recognize_many([dialogue], batch_size=0))
    with pytest.raises(ConfigError, match="'d'"):
        list(recognizer.recognize_many([dialogue, dialogue]))
    with pytest.raises(ConfigError, match=r"\['d', 'd'\]"):
        recognizer.answer(dialogue.utterances[:2])
    with pytest.raises(LabelError, match="sad"):
        EmotionRecognizer(model, processor, labels=["sad"])


def test_only_the_last_logits_are_computed_if_the_host_can(model, processor, make_dialogue, monkeypatch):
    expected = by_utterance(EmotionRecognizer(model, processor, labels=WORDS).recognize(make_dialogue("d")))
    forward, kept = model.forward, []

    def with_logits_to_keep(logits_to_keep=0, **kwargs):
        kept.append(logits_to_keep)
        output = forward(**kwargs)
        output.logits = output.logits[:, -logits_to_keep:]
        return output

    monkeypatch.setattr(model, "forward", with_logits_to_keep)
    recognizer = EmotionRecognizer(model, processor, labels=WORDS)
    assert by_utterance(recognizer.recognize(make_dialogue("d"))) == expected
    assert kept == [1, 0] * 3


def test_an_answer_of_nan_is_an_error(model, processor, make_dialogue, monkeypatch):
    head = model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda hidden: torch.full((*hidden.shape[:-1], head.out_features), math.nan))
    recognizer = EmotionRecognizer(model, processor, labels=WORDS)
    with pytest.raises(HostError, match=r"NaN in torch\.float32"):
        list(recognizer.recognize(make_dialogue("d")))


def test_a_saved_host_loads_as_its_own_class(model, processor, make_dialogue, tmp_path):
    model.save_pretrained(tmp_path / "host")
    processor.save_pretrained(tmp_path / "host")
    loaded, its_processor = load_host(str(tmp_path / "host"))
    assert type(loaded) is type(model)
    assert not loaded.training
    dialogue = make_dialogue("d")
    expected = by_utterance(EmotionRecognizer(model, processor, labels=WORDS).recognize(dialogue))
    assert by_utterance(EmotionRecognizer(loaded, its_processor, labels=WORDS).recognize(dialogue)) == expected
    with pytest.raises(OSError, match="nowhere"):
        load_host(str(tmp_path / "nowhere"))


def test_a_memory_of_another_model_is_refused(model, processor, memory):
    with pytest.raises(HostError, match="attached to another model"):
        EmotionRecognizer(copy.deepcopy(model), processor, memory)


def test_a_revision_is_used_for_config_and_processor_too(model, processor, tmp_path):
    """In a cache as the Hub's client leaves it, where the main branch has no files at all."""
    cached = tmp_path / "models--org--host"
    folder = cached / "snapshots" / ("1" * 40)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("1" * 40)
    loaded, its_processor = load_host("org/host", revision="v1", cache_dir=str(tmp_path), local_files_only=True)
    assert type(loaded) is type(model)
    assert its_processor.audio_token == processor.audio_token

"""Training: gradients against a plain loop, what changes and what does not, and which errors stop it."""

import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from mal_adapter import MemoryAdapter, attach_memory
from mal_adapter.demo import EMOTIONS, PROMPT
from mal_adapter.errors import ConfigError, LabelError, TrainingError
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer import EmotionRecognizer, Prediction
from mal_adapter.ser.training import TrainingConfig, train_memory
from mal_adapter.ser.training.batches import batches_of_epoch, side_by_side
from mal_adapter.ser.training.loss import DialogueLoss, class_weights
from mal_adapter.ser.training.trainable import Trainable
from tests.ser.training_world import FAST, make_dialogues, make_recognizer, parameters_of, run


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return make_dialogues(tmp_path_factory.mktemp("dev"), (3, 2), "dev")


@pytest.fixture(autouse=True)
def _any_precision():
    AcceleratorState._reset_state()


def changed(dialogue, row, **fields):
    turns = list(dialogue.utterances)
    turns[row] = dataclasses.replace(turns[row], **fields)
    return Dialogue(dialogue.dialogue_id, tuple(turns))


def gradients(recognizer, dialogues, *, window=None, weights=None, checkpointing=False, lora_rank=None):
    """Gradients of the summed loss of `dialogues`, run side by side, and the tally."""
    memory = recognizer.memory
    torch.manual_seed(0)
    trainable = Trainable(recognizer.model, memory, lora_rank, gradient_checkpointing=checkpointing)
    weights = torch.ones(len(recognizer.labels)) if weights is None else weights
    loss = DialogueLoss(recognizer, memory, weights, window, torch.Tensor.backward, nullcontext)
    with trainable.frozen():
        trainable.train()
        for parameter in trainable.parameters.values():
            parameter.grad = None
        tally = loss(dialogues, {})
    return {name: p.grad.clone() for name, p in trainable.parameters.items() if p.grad is not None}, tally


def plain_gradients(recognizer, dialogues):
    """The same by a loop over dialogues and utterances, one at a time."""
    memory, model = recognizer.memory, recognizer.model
    answers = torch.tensor(recognizer.processor.tokenizer(list(EMOTIONS), add_special_tokens=False)["input_ids"])[:, 0]
    model.requires_grad_(False)
    memory.train()
    memory.adapter.zero_grad()
    total = 0.0
    for dialogue in dialogues:
        loss = 0
        with memory.session():
            for utterance in dialogue.utterances:
                inputs = recognizer.prepare([utterance]).inputs
                logits = model(**inputs, use_cache=False).logits[:, -1, answers]
                if utterance.emotion is not None:
                    loss = loss + F.cross_entropy(logits, torch.tensor([EMOTIONS.index(utterance.emotion)]))
        loss.backward()
        total += loss.item()
    memory.eval()
    return {f"adapter.{name}": p.grad.clone() for name, p in memory.adapter.named_parameters()}, total


def assert_close(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-3), name


# ------------------------------------------------------------------------------------------------------- gradients


def test_a_window_as_long_as_the_dialogues_gives_the_gradient_of_the_plain_loop(train):
    """Dialogues of 4, 2, 3 and 5 turns end one after the other; one utterance has no label."""
    recognizer = make_recognizer(random=True)
    dialogues = [train[0], train[1], changed(train[2], 1, emotion=None), train[3]]
    expected, total = plain_gradients(recognizer, dialogues)
    found, tally = gradients(recognizer, dialogues)
    assert tally.loss == pytest.approx(total, rel=1e-5)
    assert (tally.weight, tally.utterances) == (13, 14)
    assert_close(found, expected)


def test_a_truncated_window_has_the_same_losses_and_another_gradient(train):
    recognizer = make_recognizer(random=True)
    whole, tally = gradients(recognizer, train[:4])
    for window in (2, 3):
        found, truncated = gradients(recognizer, train[:4], window=window)
        assert truncated.loss == pytest.approx(tally.loss, rel=1e-6)
        name = "adapter.in_proj.weight"
        assert (found[name] - whole[name]).norm() > 1e-3 * whole[name].norm()
        assert not list(recognizer.memory.states)


def test_a_truncated_gradient_is_that_of_a_loop_with_detached_states(train):
    recognizer, window = make_recognizer(random=True), 2
    memory, dialogue = recognizer.memory, train[3]
    memory.train()
    memory.adapter.zero_grad()
    for start in range(0, 5, window):
        loss = 0
        with memory.session("by hand"):  # the states that a block leaves are detached
            for utterance in dialogue.utterances[start : start + window]:
                scores = recognizer.log_probs(recognizer.prepare([utterance]).inputs)
                loss = loss + F.cross_entropy(scores, torch.tensor([EMOTIONS.index(utterance.emotion)]))
        loss.backward()
    expected = {f"adapter.{name}": p.grad.clone() for name, p in memory.adapter.named_parameters()}
    assert_close(gradients(recognizer, [dialogue], window=window)[0], expected)


def test_labels_of_several_tokens_are_learned_through_the_cache(train):
    """Against whole forwards without a cache, one per label."""
    names = ("neutral", "happiness", "angry", "sadness")
    recognizer = make_recognizer(random=True, labels=names)
    assert recognizer.labels_need_cache
    dialogue = Dialogue(
        "d", tuple(dataclasses.replace(u, dialogue_id="d", emotion="happiness") for u in train[1].utterances)
    )
    found, tally = gradients(recognizer, [dialogue])
    memory, scorer = recognizer.memory, recognizer._scorer
    memory.train()
    memory.adapter.zero_grad()
    total = 0
    with memory.session():
        for utterance in dialogue.utterances:
            inputs = recognizer.prepare([utterance]).inputs
            inputs.pop("position_ids", None)
            before, scores = memory._hooks.session.state, []
            for ids in scorer.token_ids:
                memory._hooks.session.state, memory._hooks.session._prompts = before, []
                answer = torch.tensor([ids])
                whole = inputs | {
                    "input_ids": torch.cat((inputs["input_ids"], answer), 1),
                    "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(answer)), 1),
                }
                log_probs = recognizer.model(**whole, use_cache=False).logits.log_softmax(-1)[0, -len(ids) - 1 : -1]
                scores.append(log_probs.gather(1, answer.T).sum())
            total = total + F.cross_entropy(torch.stack(scores)[None], torch.tensor([1]))
    total.backward()
    assert tally.loss == pytest.approx(total.item(), rel=1e-4)
    expected = {f"adapter.{name}": p.grad.clone() for name, p in memory.adapter.named_parameters()}
    assert_close(found, expected, tolerance=1e-3)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_dropout_off(train):
    plain = make_recognizer(random=True)
    expected, _ = gradients(plain, train[:2], lora_rank=2)
    recognizer = make_recognizer(random=True)
    calls = []
    for layer in recognizer.memory.decoder_layers:
        layer.self_attn.register_forward_hook(lambda module, *_: calls.append(module.training))
    found, _ = gradients(recognizer, train[:2], lora_rank=2, checkpointing=True)
    assert_close(found, expected)
    # forward and, again, backward
    assert len(calls) == 2 * len(recognizer.memory.decoder_layers) * 4
    assert not any(calls)
    assert not any(module.training for module in recognizer.model.modules())


def test_class_weights_are_those_of_torchs_cross_entropy(train):
    recognizer = make_recognizer(random=True)
    labels = LabelSet(EMOTIONS)
    weights = class_weights("balanced", train, labels)
    emotions = [u.emotion for d in train for u in d.utterances]
    present = set(emotions)
    for name, weight in zip(EMOTIONS, weights.tolist(), strict=True):
        expected = len(emotions) / (len(present) * emotions.count(name)) if name in present else 1
        assert weight == pytest.approx(expected)
    assert class_weights({"Sad": 3}, train, labels).tolist() == [1, 1, 1, 3]
    _, tally = gradients(recognizer, train[:3], weights=weights)
    scores, targets = [], []
    recognizer.memory.train()
    for dialogue in train[:3]:
        with recognizer.memory.session(), torch.no_grad():
            for utterance in dialogue.utterances:
                scores.append(recognizer.log_probs(recognizer.prepare([utterance]).inputs))
                targets.append(EMOTIONS.index(utterance.emotion))
    expected = F.cross_entropy(torch.cat(scores), torch.tensor(targets), weights)
    assert tally.loss / tally.weight == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ConfigError, match="the labels are neutral"):
        class_weights({"joy": 2.0}, train, labels)


# --------------------------------------------------------------------------------------------------------- batches


def test_every_epoch_has_all_dialogues_once_in_another_order(train):
    orders = [batches_of_epoch(train * 9, 4, seed=0, epoch=epoch) for epoch in range(3)]
    for batches in orders:
        assert sorted(index for batch in batches for index in batch) == list(range(54))
        spread = [len({len(train[i % 6].utterances) for i in batch}) for batch in batches]
        assert np.mean(spread) < 2  # of four lengths
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == batches_of_epoch(train * 9, 4, seed=0, epoch=0)


def test_unusable_utterances_are_reported_once_and_the_next_one_takes_their_place(train, tmp_path, caplog):
    recognizer = make_recognizer()
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    first = changed(changed(train[0], 1, audio=tmp_path / "missing.wav"), 2, audio=silent)
    second = changed(changed(train[1], 0, audio=silent), 1, audio=silent)  # none of its utterances is usable
    unusable = {}
    for _ in range(2):
        turns = list(side_by_side(recognizer, [first, second, train[2]], unusable))
        assert [[u.utterance_id[-8:] for u in turn.utterances] for turn in turns] == [
            ["00000-00", "00002-00"],
            ["00000-03", "00002-01"],
            ["00002-02"],
        ]
    assert len(unusable) == len(caplog.messages) == 4
    assert "no such file" in unusable["train-7-00000", "train-7-00000-01"]


# ------------------------------------------------------------------------------------------------------- whole runs


def test_the_loss_falls_and_only_the_adapter_changes(train, tmp_path):
    recognizer = make_recognizer(labels=EMOTIONS)
    host = {name: tensor.clone() for name, tensor in recognizer.model.state_dict().items()}
    required = [p.requires_grad for p in recognizer.model.parameters()]
    before = parameters_of(recognizer)
    config = dataclasses.replace(FAST, epochs=12, batch_size=3, side_by_side=3, schedule="constant", learning_rate=0.03)
    report = train_memory(recognizer, train[:3], output=tmp_path, config=config)
    losses = [entry["loss"] for entry in report["epochs"]]
    assert losses[-1] < 0.5 * losses[0]
    assert [entry["utterances"] for entry in report["epochs"]] == [9] * 12
    after = recognizer.model.state_dict()
    assert after.keys() == host.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in host.items())
    assert [p.requires_grad for p in recognizer.model.parameters()] == required
    assert all(not torch.equal(p, before[name]) for name, p in recognizer.memory.adapter.named_parameters())
    assert not recognizer.memory.adapter.training
    assert not list(recognizer.memory.states)


def test_a_saved_adapter_has_labels_and_prompt_for_a_recogniser(train, dev, tmp_path):
    recognizer = make_recognizer(labels=LabelSet(EMOTIONS, {"joy": "happy"}))
    train = [changed(train[0], 0, emotion="joy"), changed(train[1], 0, emotion="bored"), *train[2:]]
    report = train_memory(recognizer, train, dev, output=tmp_path, config=FAST, datasets=["user/calls"])
    loaded = MemoryAdapter.from_pretrained(tmp_path)
    assert loaded.fingerprint() == recognizer.memory.adapter.fingerprint()
    assert loaded.metadata.task == {"labels": list(EMOTIONS), "prompt": PROMPT, "aliases": {"joy": "happy"}}
    assert loaded.metadata.datasets == ["user/calls"]
    assert loaded.metadata.training_data.startswith("6 dialogues of 19 utterances")
    assert json.loads((tmp_path / "training.json").read_text()) == report
    assert report["train"]["not_judged"] == {"bored": 1}
    assert report["versions"]["torch"] == torch.__version__
    fresh = make_recognizer()
    fresh.memory.detach()
    memory = attach_memory(fresh.model, adapter=tmp_path)
    again = EmotionRecognizer(
        fresh.model, fresh.processor, memory, loaded.metadata.task["labels"], loaded.metadata.task["prompt"]
    )
    for dialogue in dev:
        answers = zip(again.recognize(dialogue), recognizer.recognize(dialogue), strict=True)
        assert all(a.probabilities == b.probabilities for a, b in answers if isinstance(a, Prediction))


def test_a_lora_is_trained_beside_the_memory_and_saved_in_pefts_format(train, dev, tmp_path):
    from peft import PeftModel

    recognizer, report = run(tmp_path, train, dev, lora_rank=2, epochs=1)
    base = make_recognizer()
    lora = {n: p for n, p in recognizer.model.named_parameters() if "lora_B" in n}
    assert lora
    assert all(p.any() and ".layers." in n and "audio_tower" not in n for n, p in lora.items())
    trained = {n.replace(".base_layer", ""): p for n, p in recognizer.model.state_dict().items() if "lora_" not in n}
    assert all(torch.equal(trained[name], tensor) for name, tensor in base.model.state_dict().items())
    base.memory.detach()
    PeftModel.from_pretrained(base.model, tmp_path / "lora")
    memory = attach_memory(base.model, adapter=tmp_path)
    again = EmotionRecognizer(base.model, base.processor, memory, EMOTIONS, PROMPT)
    answers = zip(again.recognize(dev[0]), recognizer.recognize(dev[0]), strict=True)
    assert all(a.probabilities == b.probabilities for a, b in answers)
    assert report["host_dev"]["loss"] != report["epochs"][0]["dev"]["loss"]


def test_training_stops_when_the_dev_loss_stops_falling_and_keeps_the_best_epoch(train, dev, tmp_path):
    # Later steps are so large that they undo what the first, small ones have learned.
    recognizer, report = run(
        tmp_path, train, dev, epochs=30, patience=2, learning_rate=0.3, warmup=1.0, select_by="loss"
    )
    losses = [entry["dev"]["loss"] for entry in report["epochs"]]
    best = report["best_epoch"]
    assert len(losses) == best + 2 < 30
    assert losses[best - 1] == min(losses)
    answers = [r for dialogue in dev for r in recognizer.recognize(dialogue)]
    found = np.mean([-np.log(r.probabilities[r.utterance.emotion]) for r in answers])
    assert found == pytest.approx(min(losses), rel=1e-4)


def test_a_loss_that_is_not_finite_names_the_utterance_and_the_run_can_be_resumed(train, tmp_path, monkeypatch):
    target = train[3].utterances[2].utterance_id
    good, _ = run(tmp_path / "good", train)
    broken = {"on": True}
    prepare = EmotionRecognizer.prepare

    def poisoned(self, utterances):
        prepared = prepare(self, utterances)
        for row, utterance in enumerate(utterances):
            if broken["on"] and utterance.utterance_id == target:
                prepared.inputs["input_features"][row] = torch.nan
        return prepared

    monkeypatch.setattr(EmotionRecognizer, "prepare", poisoned)
    with pytest.warns(match="not finite"), pytest.raises(TrainingError, match=f"train-7-00003, utterance {target}"):
        run(tmp_path / "bad", train)
    broken["on"] = False
    recognizer, _ = run(tmp_path / "bad", train, resume=True)
    expected = parameters_of(good)
    assert all(torch.equal(p, expected[name]) for name, p in parameters_of(recognizer).items())


def test_a_gradient_that_is_not_finite_does_not_change_the_adapter(train, tmp_path, monkeypatch):
    recognizer = make_recognizer()
    before = parameters_of(recognizer)
    backward = torch.Tensor.backward

    def poisoned(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        recognizer.memory.adapter.norm.weight.grad[0] = torch.inf

    monkeypatch.setattr(torch.Tensor, "backward", poisoned)
    with pytest.raises(TrainingError, match="gradient is not finite after the dialogues train-7-0000"):
        train_memory(recognizer, train, output=tmp_path, config=FAST)
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(recognizer).items())


def test_bfloat16_autocast_has_about_the_same_loss(train, tmp_path):
    _, expected = run(tmp_path / "32", train, epochs=1)
    _, report = run(tmp_path / "16", train, epochs=1, mixed_precision="bf16")
    assert report["epochs"][0]["loss"] == pytest.approx(expected["epochs"][0]["loss"], rel=0.05)
    assert report["epochs"][0]["loss"] != expected["epochs"][0]["loss"]


def test_a_tracker_of_accelerate_logs_losses_and_dev_metrics(train, dev, tmp_path):
    recognizer = make_recognizer()
    train_memory(recognizer, train, dev, output=tmp_path, config=FAST, log_with="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    assert len(events.Scalars("loss")) == 6
    assert len(events.Scalars("dev_weighted_f1")) == 2


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields",
    [{"window": 1}, {"epochs": 0}, {"learning_rate": float("nan")}, {"warmup": 1.5}, {"schedule": "linear"},
     {"class_weights": "inverse"}, {"class_weights": {"sad": -1}}, {"lora_rank": True}, {"mixed_precision": "fp16"},
     {"gradient_checkpointing": 1}, {"max_grad_norm": 0}],
)  # fmt: skip
def test_the_error_names_a_field_that_is_out_of_range(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        TrainingConfig(**fields)


def test_a_config_survives_a_round_trip_through_json():
    config = TrainingConfig(class_weights={"sad": 2.0}, window=None)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="learning_rat"):
        TrainingConfig.from_dict({"learning_rat": 1})


def test_arguments_that_can_not_be_trained_raise_before_anything_is_written(train, tmp_path):
    recognizer = make_recognizer()
    with pytest.raises(ConfigError, match="two training dialogues have the id"):
        train_memory(recognizer, [train[0], train[0]], output=tmp_path)
    with pytest.raises(LabelError, match="no utterance of the training dialogues has one of"):
        train_memory(make_recognizer(labels=("good", "bad")), train, output=tmp_path)
    bare = EmotionRecognizer(recognizer.model, recognizer.processor, None, EMOTIONS)
    with pytest.raises(ConfigError, match="no memory"):
        train_memory(bare, train, output=tmp_path)
    several = make_recognizer(labels=("happy", "sadness"))
    with pytest.raises(ConfigError, match="one token each"):
        train_memory(several, train, output=tmp_path, config=TrainingConfig(gradient_checkpointing=True))
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_of_another_run_is_refused(train, tmp_path):
    run(tmp_path, train)
    with pytest.raises(TrainingError, match="already exists"):
        run(tmp_path, train)
    with pytest.raises(TrainingError, match=r"learning_rate=0\.01 \(here 0\.5\)"):
        run(tmp_path, train, resume=True, learning_rate=0.5)
    with pytest.raises(TrainingError, match="dialogues"):
        run(tmp_path, train[1:], resume=True)
    path = tmp_path / "checkpoint" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TrainingError, match="not a readable checkpoint"):
        run(tmp_path, train, resume=True)


def test_a_session_can_be_narrowed_to_some_of_its_dialogues(train):
    """As `side_by_side` needs it: some rows end, and the others have the states of a session of their own."""
    recognizer = make_recognizer(random=True)
    memory, states = recognizer.memory, {}
    with memory.session(["a", "b", "c"]) as session, torch.no_grad():
        recognizer.log_probs(recognizer.prepare([train[n].utterances[0] for n in range(3)]).inputs)
        session.narrow(["c", "a"])
        recognizer.log_probs(recognizer.prepare([train[2].utterances[1], train[0].utterances[1]]).inputs)
    states = dict(memory.states)
    for name, turns in (("a", train[0].utterances[:2]), ("b", train[1].utterances[:1]), ("c", train[2].utterances[:2])):
        with memory.session("alone"), torch.no_grad():
            for turn in turns:
                recognizer.log_probs(recognizer.prepare([turn]).inputs)
        alone = memory.states.pop("alone")
        assert states[name].utterances.tolist() == [len(turns)]
        for found, expected in zip(states[name].weights, alone.weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_gates_of_a_fresh_memory_start_for_the_length_of_the_utterances(train, tmp_path):
    recognizer = make_recognizer()
    (answer,) = recognizer.answer_from(train[0].utterances[:1], [None])  # all utterances of the demo are equally long
    train_memory(recognizer, train, output=tmp_path / "measured", config=dataclasses.replace(FAST, epochs=1))
    adapter = recognizer.memory.adapter
    assert adapter.config.utterance_tokens == int(answer.state.tokens)
    assert MemoryAdapter.from_pretrained(tmp_path / "measured").config == adapter.config
    before = adapter.in_proj.bias.clone()
    small = dataclasses.replace(FAST, epochs=1, learning_rate=1e-9)
    train_memory(recognizer, train, output=tmp_path / "continued", config=small)  # it is not fresh any more
    assert torch.allclose(adapter.in_proj.bias, before, atol=1e-6)


def test_a_given_length_of_utterances_is_kept(train, tmp_path):
    recognizer = make_recognizer()
    recognizer.memory.adapter.start_gates(750)
    train_memory(recognizer, train, output=tmp_path / "given", config=dataclasses.replace(FAST, epochs=1))
    assert recognizer.memory.adapter.config.utterance_tokens == 750

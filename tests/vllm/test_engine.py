"""The memory in a real vLLM engine answers as it does in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vllm.engines import TOLERANCE, Ask, Engine, through_transformers

pytest.importorskip("vllm")


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.fixture
def check(engine: Engine, transformers_host: Any, adapter_folder: Path) -> Any:
    """Checks that vLLM's answers and states to requests queued at once are those of transformers, one by one."""

    def same(asks: list[Ask]) -> list[Tensor]:
        answers = engine.answer(asks)
        expected, states = through_transformers(transformers_host, adapter_folder, asks)
        assert apart(answers, expected) <= TOLERANCE
        for session, state in states.items():
            held = engine.memory.sessions.states[session]
            assert int(held.utterances) == int(state.utterances)
            assert int(held.tokens) == int(state.tokens)
            assert apart(list(held.weights), list(state.weights)) <= TOLERANCE
        return answers

    return same


def test_dialogues_queued_at_once_equal_transformers(engine: Engine, check: Any):
    asks = [Ask(f"call-{i % 6}", (i,), turn=i // 6, seconds=0.3 + 0.1 * (i % 5)) for i in range(30)]
    answers = check(asks)
    assert engine.counters.reads == engine.counters.writes == 30
    assert engine.counters.errors == engine.counters.conflicts == 0
    # and the memory is what makes them so
    without = engine.answer([Ask(None, ask.clips, seconds=ask.seconds) for ask in asks])
    assert apart(answers, without) > 0.1


def test_utterances_of_one_dialogue_in_one_step_go_in_waves(engine: Engine, check: Any):
    check([Ask(f"call-{i // 4}", (i,)) for i in range(16)])
    assert engine.counters.waves == 4


def test_requests_without_session_or_audio_are_the_bare_hosts(engine: Engine, check: Any):
    check([Ask(None, (1,)), Ask("call", (2,)), Ask("call", ()), Ask(None, ()), Ask("call", (3,)), Ask(None, (1,))])
    assert engine.counters.writes == 2


def test_two_clips_are_one_utterance(engine: Engine, check: Any):
    check([Ask("call", (1, 2)), Ask("call", (3,)), Ask("call", (4, 5, 6), seconds=0.4)])
    assert engine.counters.writes == 3


def test_a_clip_of_one_token(engine: Engine, check: Any):
    check([Ask("call", (1,), seconds=0.03), Ask("call", (2,), seconds=0.03), Ask("call", (3,))])


def test_prefills_beside_decodes(engine: Engine, transformers_host: Any, adapter_folder: Path):
    long = [Ask(f"long-{i}", (i,), tokens=20) for i in range(4)]
    short = [Ask(f"short-{i % 2}", (10 + i,)) for i in range(4)]
    core = engine.llm.llm_engine
    for i, ask in enumerate(long):
        core.add_request(f"l{i}", engine.inputs(ask), engine.params(ask))
    for _ in range(5):
        core.step()
    for i, ask in enumerate(short):
        core.add_request(f"s{i}", engine.inputs(ask), engine.params(ask))
    done = {}
    while core.has_unfinished_requests():
        done |= {output.request_id: output for output in core.step() if output.finished}
    expected, _ = through_transformers(transformers_host, adapter_folder, long + short)
    for name, want in zip([*(f"l{i}" for i in range(4)), *(f"s{i}" for i in range(4))], expected, strict=True):
        first = done[name].outputs[0].logprobs[0]
        got = torch.tensor([first[token].logprob for token in range(len(first))])
        assert apart([got], [want]) <= TOLERANCE

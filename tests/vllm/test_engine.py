"""The memory in a real vLLM engine answers as it does in transformers.

Tests that start an engine of their own are in other files, which come later: as it stops, it ends what vLLM shares in a
process.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mal_adapter import MemoryState
from mal_adapter.errors import ConfigError, HostMismatchError
from mal_adapter.vllm.config import admission_is_installed
from tests.vllm.engines import Ask, Engine, apart, assert_same, start, through_transformers
from tests.vllm.hosts import save_adapter

pytest.importorskip("vllm")


@pytest.fixture
def check(engine: Engine, transformers_host: Any, adapter_folder: Path) -> Any:
    """Checks that vLLM's answers and states to requests queued at once are those of transformers, one by one."""

    def same(asks: list[Ask]) -> list[Tensor]:
        answers = engine.answer(asks)
        expected, states = through_transformers(transformers_host, adapter_folder, asks)
        assert_same(answers, expected)
        for session, state in states.items():
            held = engine.memory.sessions.states[session]
            assert int(held.utterances) == int(state.utterances)
            assert int(held.tokens) == int(state.tokens)
            assert_same(list(held.weights), list(state.weights))
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
        assert_same([got], [want])


def test_a_request_that_is_aborted_while_it_decodes_leaves_the_engine_as_it_was(engine: Engine, check: Any):
    core = engine.llm.llm_engine
    ask = Ask("call", (1,), turn=0, tokens=50)
    core.add_request("aborted", engine.inputs(ask), engine.params(ask))
    for _ in range(4):
        core.step()
    core.abort_request(["aborted"], internal=False)
    while core.has_unfinished_requests():
        core.step()
    # The client does not know whether it was written. With the turn number, it is written once.
    check([Ask("call", (1,), turn=0), Ask("call", (2,), turn=1)])
    assert (engine.counters.repeated, engine.counters.writes) == (1, 2)
    assert engine.call("look", "call")[1]["next_turn"] == 2


def test_hostile_parameters_are_refused_and_the_engine_serves_on(engine: Engine, check: Any):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError  # answered with status 400

    bad: list[dict[str, Any]] = [
        {"session_id": value} for value in ("", 1, 1.5, [], {}, ["a"], "a" * 81, "a\0", "a\n", "\ud800", True)
    ]
    bad += [{"session_id": "a", "turn": value} for value in (-1, 2**31, 1.0, "1", [], {}, True)]
    bad += [{"turn": 1}]
    refused = 0
    for extra in bad:
        with pytest.raises(VLLMValidationError, match=r"session|turn"):
            engine.llm.generate(engine.inputs(Ask("a", (1,))), SamplingParams(extra_args=extra), use_tqdm=False)
        refused += 1
    with pytest.raises(VLLMValidationError, match="n=1"):
        engine.llm.generate(engine.inputs(Ask("a", (1,))), engine.params(Ask("a", (1,)), n=2, temperature=1))
    assert refused == len(bad) == 19
    assert engine.call("list")[1]["total"] == 0
    check([Ask("a", (1,)), Ask("a", (2,))])


def test_an_error_in_the_worker_is_an_answer_without_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.memory.adapter, "read_tokens", lambda *a, **k: 1 / 0)
        (broken,) = engine.answer([Ask("a", (1,))])
    (bare, fine) = engine.answer([Ask(None, (1,)), Ask("a", (1,))])
    assert_same([broken], [bare])
    assert apart([fine], [bare]) > 0.01
    assert (engine.counters.errors, engine.counters.writes) == (1, 1)


def test_sessions_are_looked_at_forked_moved_and_dropped(engine: Engine, check: Any):
    check([Ask("a", (1,), turn=0), Ask("a", (2,), turn=1)])
    assert engine.call("list") == (200, {"sessions": ["a"], "total": 1})
    status, look = engine.call("look", "a")
    assert (status, look["utterances"], look["next_turn"], look["saved"]) == (200, 2, 2, True)
    assert look["last"]["written"]
    assert look["last"]["read"]
    assert engine.call("fork", "a", "b")[0] == 200
    assert engine.call("fork", "a", "b")[0] == 409
    status, data = engine.call("download", "a")
    assert status == 200
    assert engine.call("upload", "c", data)[1]["utterances"] == 2
    third = [engine.answer([Ask(session, (3,), turn=2)])[0] for session in ("a", "b", "c")]
    assert torch.equal(third[0], third[1])
    assert torch.equal(third[0], third[2])
    assert engine.call("drop", "b")[0] == 200
    assert engine.call("drop", "b")[0] == 404
    assert engine.call("look", "b")[0] == 404
    assert engine.call("upload", "d", b"not a state")[0] == 422
    for bad in ("", "a" * 81, "a\0"):
        assert engine.call("upload", bad, data)[0] == engine.call("fork", "a", bad)[0] == 400
    assert engine.call("upload", "d", with_nan(data))[0] == 422
    assert engine.call("stats")[1]["writes"] == 5
    assert engine.call("__class__")[0] == 400


def with_nan(data: bytes) -> bytes:
    state = MemoryState.from_bytes(data)
    state.weights[0][0, 0, 0, 0] = float("nan")
    return state.to_bytes()


UNSAFE = {
    "enable_chunked_prefill": (True, "--no-enable-chunked-prefill"),
    "enable_prefix_caching": (True, "--no-enable-prefix-caching"),
    "mm_processor_cache_gb": (4, "--mm-processor-cache-gb 0"),
    "scheduling_policy": ("priority", "--scheduling-policy"),
    "logits_processors": (None, "--logits-processors"),
}


@pytest.mark.parametrize("option", UNSAFE)
def test_an_unsafe_engine_does_not_start(host_folder: Path, adapter_folder: Path, option: str):
    value, flag = UNSAFE[option]
    if option == "logits_processors" and admission_is_installed():
        pytest.skip("mal-adapter is installed here, so that vLLM finds the check by itself")
    with pytest.raises(ConfigError, match=flag):
        start(host_folder, adapter_folder, **{option: value})


def test_an_adapter_of_another_host_is_refused(host_folder: Path, tmp_path: Path):
    with pytest.raises(HostMismatchError, match="voxtral"):
        start(host_folder, save_adapter(tmp_path / "other", "voxtral"))

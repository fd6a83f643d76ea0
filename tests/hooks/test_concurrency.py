"""Threads and asyncio tasks that share one model each have their own dialogue."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, attach_memory
from mal_adapter.errors import SessionError
from tests.hosts.builders import HOSTS, Prompt, TinyHost
from tests.hosts.probes import assert_states_close, random_adapter

LAYER, THREADS, TURNS = 1, 32, 2
TASKS = {"qwen2_audio": 200, "phi4_multimodal": 50}  # as many as README says on one of them


@pytest.fixture(params=["qwen2_audio", "phi4_multimodal"])
def host(request: pytest.FixtureRequest) -> TinyHost:
    return HOSTS[request.param]


def dialogues(host: TinyHost, callers: int) -> list[list[Prompt]]:
    """The utterances of each caller; no two alike."""
    return [
        [host.prompt([3 + (who + turn) % 5], seed=100 * who + turn) for turn in range(TURNS)] for who in range(callers)
    ]


@pytest.fixture
def served(host: TinyHost) -> tuple[PreTrainedModel, AttachedMemory]:
    """A model with a memory, whose layers take a while, so that forwards of several callers overlap."""
    model = host.build(num_layers=3)
    memory = attach_memory(model, layer_idx=LAYER, adapter=random_adapter())
    for layer in host.layers(model):
        layer.register_forward_hook(lambda *_: time.sleep(0.001))
    return model, memory


def speak(host: TinyHost, model: PreTrainedModel, prompt: Prompt) -> Tensor:
    with torch.no_grad():
        return model(**host.collate(model, [prompt])[0], use_cache=False).logits[0, -1]


def serially(
    host: TinyHost, model: PreTrainedModel, memory: AttachedMemory, calls: list[list[Prompt]]
) -> list[list[Tensor]]:
    answers = []
    for who, prompts in enumerate(calls):
        with memory.session(f"serial {who}"):
            answers.append([speak(host, model, prompt) for prompt in prompts])
    return answers


def assert_as_serial(memory: AttachedMemory, answers: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for who in range(len(expected)):
        for answer, wanted in zip(answers[who], expected[who], strict=True):
            torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-5)
        assert_states_close(memory.states[f"call {who}"], memory.states[f"serial {who}"], 1e-6)
        assert memory.states[f"call {who}"].utterances.tolist() == [TURNS]


def test_threads_with_sessions_of_their_own_answer_as_one_after_another(host: TinyHost, served):
    model, memory = served
    calls = dialogues(host, THREADS)
    expected = serially(host, model, memory, calls)
    begin = threading.Barrier(THREADS)

    def caller(who: int) -> list[Tensor]:
        begin.wait()
        with memory.session(f"call {who}"):
            return [speak(host, model, prompt) for prompt in calls[who]]

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(caller, range(THREADS)))
    assert_as_serial(memory, answers, expected)


def test_threads_generate_at_once_and_one_reads_only_while_another_is_disabled(host: TinyHost, served):
    """The three kinds of scope side by side, each in its thread."""
    model, memory = served
    first, second = host.prompt([4], seed=1), host.prompt([4], seed=2)
    inputs, _ = host.collate(model, [second])
    for name in ("writer", "reader"):
        with memory.session(name):
            speak(host, model, first)
    begin = threading.Barrier(3)

    def scores(scope) -> Tensor:
        begin.wait()
        with scope, torch.no_grad():
            return model.generate(
                **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
            ).scores[0]

    with ThreadPoolExecutor(3) as pool:
        scopes = (memory.session("writer"), memory.session("reader", write=False), memory.disabled())
        written, read, bare = (future.result() for future in [pool.submit(scores, scope) for scope in scopes])
    torch.testing.assert_close(written, read)
    assert not torch.allclose(bare, read, atol=1e-3)
    assert memory.states["writer"].utterances.tolist() == [2]
    assert memory.states["reader"].utterances.tolist() == [1]


def test_asyncio_tasks_with_interleaved_utterances_answer_as_one_after_another(host: TinyHost, served):
    """Each task awaits between its utterances inside its session; half of them compute in a worker thread."""
    model, memory = served
    tasks = TASKS[host.name]
    calls = dialogues(host, tasks)
    expected = serially(host, model, memory, calls)
    order: list[int] = []

    async def caller(who: int) -> list[Tensor]:
        answers = []
        with memory.session(f"call {who}"):
            for prompt in calls[who]:
                order.append(who)
                if who % 2:
                    answers.append(await asyncio.to_thread(speak, host, model, prompt))
                else:
                    answers.append(speak(host, model, prompt))
                    await asyncio.sleep(0)
        return answers

    async def everyone() -> list[list[Tensor]]:
        return await asyncio.gather(*map(caller, range(tasks)))

    answers = asyncio.run(everyone())
    assert order != sorted(order)  # they did interleave
    assert_as_serial(memory, answers, expected)


def test_a_dialogue_is_open_in_one_place_at_a_time(host: TinyHost, served):
    _, memory = served
    opened, done = threading.Event(), threading.Event()

    def holder() -> None:
        with memory.session(["mine", "ours"]):
            opened.set()
            done.wait(10)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(holder)
        assert opened.wait(10)
        with pytest.raises(SessionError, match="ours"), memory.session(["ours", "theirs"]):
            pass
        with memory.session("theirs"):  # the refused block held nothing back
            pass
        done.set()
        future.result()
    with memory.session(["mine", "ours"]):
        pass


def test_many_short_sessions_from_many_threads_lose_no_update(host: TinyHost, served):
    """One dialogue, continued by whoever holds it; a refused thread tries again."""
    model, memory = served
    prompt = host.prompt([3], seed=1)

    def caller(_: int) -> None:
        while True:
            try:
                with memory.session("shared"):
                    speak(host, model, prompt)
                return
            except SessionError:
                time.sleep(0.002)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(caller, range(2 * THREADS)))
    assert memory.states["shared"].utterances.tolist() == [2 * THREADS]
    for _ in range(2 * THREADS):
        with memory.session("one by one"):
            speak(host, model, prompt)
    assert_states_close(memory.states["shared"], memory.states["one by one"], 1e-6)

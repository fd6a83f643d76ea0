"""A block and its forwards in other contexts, threads and tasks than one would think of: the forward uses the memory of
the block that its caller means, or raises. No block stays open or active anywhere after it is left."""

import asyncio
import contextvars
import gc
import itertools
import sys
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from torch import Tensor
from transformers import PreTrainedModel

from mal_adapter import AttachedMemory, attach_memory
from mal_adapter.errors import AudioOutsideSessionWarning, SessionError
from tests.hosts.builders import HOSTS
from tests.hosts.probes import assert_states_close, random_adapter, same_bits

HOST = HOSTS["qwen2_audio"]


class Served:
    """A tiny model with a memory, and what a caller does with it."""

    def __init__(self) -> None:
        self.model: PreTrainedModel = HOST.build(num_layers=3)
        self.memory: AttachedMemory = attach_memory(self.model, layer_idx=1, adapter=random_adapter())
        self.turns = [HOST.collate(self.model, [HOST.prompt([3 + n], seed=n)])[0] for n in range(4)]
        self.running = threading.Event()  # a forward has reached the last layer
        self.hold: threading.Event | None = None  # and waits there until this is set
        HOST.layers(self.model)[-1].register_forward_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.running.set()
        if self.hold is not None:
            self.hold.wait(10)

    def _open(self, name: str) -> None:
        with self.memory.session(name, write=False):
            pass

    @torch.no_grad()
    def forward(self, turn: int = 0) -> Tensor:
        return self.model(**self.turns[turn], use_cache=False).logits[0, -1]

    def generate(self, turn: int = 0, **options: Any) -> Tensor:
        return self.model.generate(**self.turns[turn], max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)

    def utterances(self, session_id: str) -> int:
        return self.memory.states[session_id].utterances.item() if session_id in self.memory.states else 0

    def is_idle(self) -> bool:
        """Whether no session is open or active here, by what a user can see: a new block works, and bare is bare."""
        with self.memory.disabled():
            bare = self.forward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AudioOutsideSessionWarning)
            outside = self.forward()
        for name in (*self.memory.states, "new"):
            contextvars.copy_context().run(self._open, name)
        return same_bits(bare, outside) and "0 open" in repr(self.memory.states)


@pytest.fixture(scope="module")
def built() -> Served:
    return Served()


@pytest.fixture
def served(built: Served) -> Iterator[Served]:
    built.memory.states.clear()
    built.running.clear()
    built.hold = None
    yield built
    assert built.is_idle()


# ------------------------------------------------------------------------------------------ a block in another context


def fresh_context(function: Callable[[], Any]) -> Any:
    """In a context that has nothing of this one, as a new thread's."""
    return contextvars.Context().run(function)


def new_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def executor_of_a_loop(function: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, function)

    return asyncio.run(main())


@pytest.mark.parametrize("elsewhere", [fresh_context, new_thread, executor_of_a_loop])
def test_audio_in_a_context_without_the_block_raises(served: Served, elsewhere: Callable[..., Any]):
    with served.memory.session("call"):
        with pytest.raises(SessionError, match="copy_context"):
            elsewhere(served.forward)
        assert served.utterances("call") == 0
        served.forward()
    assert served.utterances("call") == 1


@pytest.mark.parametrize("elsewhere", [fresh_context, new_thread, executor_of_a_loop])
def test_a_disabled_forward_in_another_context_is_bare(served: Served, elsewhere: Callable[..., Any]):
    def bare() -> Tensor:
        with served.memory.disabled():
            return served.forward()

    with served.memory.session("call"):
        served.forward(1)
        assert same_bits(elsewhere(bare), bare())
    assert served.utterances("call") == 1


def test_a_context_that_is_handed_on_has_the_memory(served: Served):
    async def in_tasks() -> None:
        with served.memory.session("tasks"):
            await asyncio.to_thread(served.forward, 0)
            await asyncio.create_task(asyncio.to_thread(served.forward, 1))
            await run_in_threadpool(served.forward, 2)

    asyncio.run(in_tasks())
    with served.memory.session("pool"), ThreadPoolExecutor(1) as pool:
        for turn in range(3):
            pool.submit(contextvars.copy_context().run, served.forward, turn).result()
    with served.memory.session("serial"):
        for turn in range(3):
            served.forward(turn)
    for name in ("tasks", "pool"):
        assert_states_close(served.memory.states[name], served.memory.states["serial"], 0)


def test_a_consumer_task_that_was_there_before_gets_the_error(served: Served):
    async def main() -> object:
        queue: asyncio.Queue[asyncio.Future[Tensor]] = asyncio.Queue()

        async def consumer() -> None:
            while True:
                answer = await queue.get()
                try:
                    answer.set_result(served.forward())
                except SessionError as error:
                    answer.set_exception(error)

        task = asyncio.create_task(consumer())
        with served.memory.session("call"):
            answer = asyncio.get_running_loop().create_future()
            await queue.put(answer)
            result = (await asyncio.gather(answer, return_exceptions=True))[0]
        task.cancel()
        return result

    assert isinstance(asyncio.run(main()), SessionError)


def test_a_task_that_outlives_the_block_gets_the_error(served: Served):
    async def main() -> object:
        left = asyncio.Event()

        async def later() -> Tensor:
            await left.wait()
            return served.forward()

        with served.memory.session("call"):
            served.forward()
            task = asyncio.create_task(later())
        left.set()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    with pytest.raises(SessionError, match="was left before this forward"):
        raise asyncio.run(main())
    assert served.utterances("call") == 1


def test_a_task_that_outlives_the_block_may_open_its_own_or_go_without(served: Served):
    async def main() -> None:
        left = asyncio.Event()

        async def later() -> None:
            await left.wait()
            with served.memory.session("call"):
                served.forward(1)
            with served.memory.disabled():
                served.forward(1)

        with served.memory.session("call"):
            served.forward(0)
            task = asyncio.create_task(later())
        left.set()
        await task

    asyncio.run(main())
    assert served.utterances("call") == 2


@pytest.mark.parametrize("generates", [False, True])
def test_a_block_that_is_left_while_its_forward_runs_loses_nothing_unnoticed(served: Served, generates: bool):
    """As asyncio.wait_for does, whose thread goes on after the time is up."""
    served.hold = threading.Event()
    run = served.generate if generates else served.forward

    async def main() -> object:
        with served.memory.session("call"):
            task = asyncio.create_task(asyncio.to_thread(run))
            await asyncio.to_thread(served.running.wait, 10)
        with served.memory.session("call"):  # the block is free at once
            pass
        assert served.hold is not None
        served.hold.set()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    result = asyncio.run(main())
    assert isinstance(result, SessionError)
    assert "was left while this forward ran" in str(result)
    assert served.utterances("call") == 0


@contextmanager
def of_a_generator(scope: Any) -> Iterator[None]:
    with scope:
        yield


@pytest.mark.parametrize("kind", ["session", "disabled"])
@pytest.mark.parametrize("entered_in", [fresh_context, new_thread, executor_of_a_loop])
def test_a_block_may_be_left_in_another_context(served: Served, entered_in: Callable[..., Any], kind: str):
    scope = served.memory.session("call") if kind == "session" else served.memory.disabled()
    entered_in(scope.__enter__)
    scope.__exit__(None, None, None)
    assert served.is_idle()


def test_the_context_that_entered_a_block_is_free_when_another_leaves_it(served: Served):
    """A thread of a pool has one context for all that it runs."""
    with ThreadPoolExecutor(1) as pool:
        for kind in (served.memory.session, lambda _: served.memory.disabled()):
            scope = kind("call")
            pool.submit(scope.__enter__).result()
            scope.__exit__(None, None, None)
            assert pool.submit(served.is_idle).result()


def test_a_block_entered_in_a_task_and_left_in_its_child_is_left_everywhere(served: Served):
    async def main() -> None:
        scope = served.memory.session("call")
        scope.__enter__()

        async def leave() -> None:
            served.forward()
            scope.__exit__(None, None, None)

        await asyncio.create_task(leave())
        assert served.is_idle()

    asyncio.run(main())
    assert served.utterances("call") == 1


def test_a_generator_that_nobody_finishes_leaves_its_block_when_it_is_collected(served: Served):
    def turns() -> Iterator[Tensor]:
        with served.memory.session("call"):
            for turn in range(3):
                yield served.forward(turn)

    generator = turns()
    contextvars.copy_context().run(next, generator)
    del generator
    gc.collect()
    assert served.is_idle()
    assert served.utterances("call") == 1


def test_an_async_generator_that_another_task_closes(served: Served):
    async def turns() -> AsyncIterator[Tensor]:
        with served.memory.session("call"):
            for turn in range(3):
                yield served.forward(turn)

    async def main() -> None:
        generator = turns()
        await asyncio.create_task(anext(generator))  # type: ignore[arg-type]
        await asyncio.create_task(generator.aclose())  # type: ignore[attr-defined]
        assert served.is_idle()

    asyncio.run(main())


def test_what_is_made_in_a_block_and_run_after_it_raises(served: Served):
    with served.memory.session("call"):
        answers = (served.forward(turn) for turn in range(2))

    def late() -> None:
        with pytest.raises(SessionError, match="was left before this forward"):
            next(answers)

    contextvars.copy_context().run(late)
    with served.memory.disabled():
        served.forward()
    with served.memory.session("call"):
        served.forward()
    assert served.utterances("call") == 1


def test_a_block_that_an_error_ended_leaves_no_trace(served: Served):
    with pytest.raises(FileNotFoundError), served.memory.session("call"):
        raise FileNotFoundError
    assert served.is_idle()


def test_blocks_left_in_another_order_than_they_were_entered(served: Served):
    disabled, session = served.memory.disabled(), served.memory.session("call")
    disabled.__enter__()
    session.__enter__()
    disabled.__exit__(None, None, None)
    served.forward()
    session.__exit__(None, None, None)
    assert served.utterances("call") == 1
    assert served.is_idle()


def test_blocks_of_two_memories_do_not_meet_in_a_context(served: Served):
    other = Served()
    with ExitStack() as first:
        first.enter_context(served.memory.session("call"))
        with other.memory.session("call"):
            first.close()  # leaving one must not leave, or bring back, the other
            other.forward()
        assert other.is_idle()
    assert (served.utterances("call"), other.utterances("call")) == (0, 1)


def test_a_left_session_is_freed_though_contexts_remember_its_block(served: Served):
    with served.memory.session("call") as session:
        served.forward()
        context = contextvars.copy_context()
        features = weakref.ref(session._prompts[-1].features)
    assert features() is None or features() is served.turns[0]["input_features"]
    assert session._prompts == []
    del context


# ------------------------------------------------------------------------------------------------------ web frameworks


def answers(app: Any, path: str = "/call") -> object:
    """The status of a reply, or the error that reached the server."""
    try:
        return TestClient(app).post(path).status_code
    except Exception as error:
        return error


def test_fastapi_a_dependency_of_def_raises_and_one_of_async_def_works(served: Served):
    app = FastAPI()

    def in_a_thread(call: str) -> Iterator[None]:
        with served.memory.session(call):
            yield

    async def in_the_task(call: str) -> AsyncIterator[None]:
        with served.memory.session(call):
            yield

    @app.post("/sync/{call}")
    def heard_sync(call: str, _: None = Depends(in_a_thread)) -> None:
        served.forward()

    @app.post("/async/{call}")
    def heard_async(call: str, _: None = Depends(in_the_task)) -> None:
        served.forward()

    @app.post("/coroutine/{call}")
    async def heard_coroutine(call: str, _: None = Depends(in_the_task)) -> None:
        await run_in_threadpool(served.forward)

    assert isinstance(answers(app, "/sync/a"), SessionError)
    assert served.is_idle()
    assert answers(app, "/async/b") == answers(app, "/coroutine/c") == 200
    assert [served.utterances(name) for name in "abc"] == [0, 1, 1]


def test_fastapi_many_requests_at_once_with_a_dependency_of_async_def(served: Served):
    app = FastAPI()

    async def opened(call: str) -> AsyncIterator[None]:
        with served.memory.session(call):
            yield

    @app.post("/{call}")
    def answer(call: str, _: None = Depends(opened)) -> None:
        served.forward()

    client = TestClient(app)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda n: client.post(f"/call-{n % 8}-{n}").status_code, range(24)))
    assert statuses == [200] * 24
    assert {served.utterances(name) for name in served.memory.states} == {1}


def test_starlette_a_middleware_around_the_endpoint_works(served: Served):
    class Opened(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Callable[..., Any]) -> Any:
            with served.memory.session(request.url.path[1:]):
                return await call_next(request)

    def endpoint(_: Request) -> PlainTextResponse:
        served.forward()
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/{call}", endpoint, methods=["POST"])])
    app.add_middleware(Opened)
    assert answers(app) == 200
    assert served.utterances("call") == 1


@pytest.mark.parametrize("kind", ["sync", "async", "background"])
def test_what_runs_after_the_endpoint_has_returned_raises(served: Served, kind: str):
    """A streamed body, and a background task, run when the block of a route is over."""
    app = FastAPI()
    errors: list[SessionError] = []

    def late() -> str:
        try:
            served.forward()
        except SessionError as error:
            errors.append(error)
            raise
        return "."

    def parts() -> Iterator[str]:
        yield late()

    async def async_parts() -> AsyncIterator[str]:
        yield late()

    @app.post("/{call}")
    async def endpoint(call: str, tasks: BackgroundTasks) -> Any:
        with served.memory.session(call):
            context = contextvars.copy_context()
            if kind == "background":
                tasks.add_task(context.run, late)
                return {}
            body = parts() if kind == "sync" else async_parts()
            return StreamingResponse(_within(context, body) if kind == "sync" else body)

    assert isinstance(answers(app), SessionError)
    assert served.utterances("call") == 0


def _within(context: contextvars.Context, body: Iterator[str]) -> Iterator[str]:
    while (part := context.run(next, body, None)) is not None:
        yield part


def test_a_streamed_body_with_the_block_in_its_generator_raises_from_the_second_part_on(served: Served):
    """Starlette takes each part of a plain generator in another copy of the context."""
    app, seen = FastAPI(), []

    @app.post("/{call}")
    def endpoint(call: str) -> StreamingResponse:
        def parts() -> Iterator[str]:
            with served.memory.session(call):
                for turn in range(3):
                    served.forward(turn)
                    seen.append(turn)
                    yield "."

        return StreamingResponse(parts())

    assert isinstance(answers(app), SessionError)
    assert seen == [0]
    assert served.utterances("call") == 1
    gc.collect()


def test_a_streamed_body_with_a_block_per_part_works(served: Served):
    app = FastAPI()

    @app.post("/{call}")
    def endpoint(call: str) -> StreamingResponse:
        def parts() -> Iterator[str]:
            for turn in range(3):
                with served.memory.session(call):
                    served.forward(turn)
                yield "."

        return StreamingResponse(parts())

    assert answers(app) == 200
    assert served.utterances("call") == 3


@pytest.mark.slow
def test_gradio_a_block_in_the_handler_works_and_one_around_its_yields_raises(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    """A real server and client."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio
    from gradio_client import Client

    def respond(name: str) -> str:
        with served.memory.session(name):
            served.forward()
        return name

    def block_per_step(name: str) -> Iterator[str]:
        for turn in range(3):
            with served.memory.session(name):
                served.forward(turn)
            yield name

    def one_block(name: str) -> Iterator[str]:
        with served.memory.session(name):
            for turn in range(3):
                served.forward(turn)
                yield name

    with gradio.Blocks() as page:
        for handler in (respond, block_per_step, one_block):
            gradio.Interface(handler, "text", "text", api_name=handler.__name__)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, show_error=True)
    try:
        client = Client(url, verbose=False)
        assert client.predict("a", api_name="/respond") == "a"
        assert client.predict("b", api_name="/block_per_step") == "b"
        with pytest.raises(Exception, match="session"):
            client.predict("c", api_name="/one_block")
    finally:
        page.close()
    gc.collect()
    assert [served.utterances(name) for name in "abc"] == [1, 3, 1]


# -------------------------------------------------------------------------------------------- two forwards in one block


def both(first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
    """Two at once in threads that share this context; answers or errors."""

    async def main() -> list[Any]:
        return await asyncio.gather(asyncio.to_thread(first), asyncio.to_thread(second), return_exceptions=True)

    return asyncio.run(main())


@pytest.fixture
def switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(
    "run",
    [
        Served.forward,
        Served.generate,
        lambda s, turn: s.generate(turn, use_cache=False),
        lambda s, turn: s.generate(turn, num_beams=2),
    ],
    ids=["forward", "generate", "without cache", "beams"],
)
def test_each_answer_of_two_forwards_at_once_is_written_once_or_is_an_error(
    served: Served, run: Callable[[Served, int], Any]
):
    for n in range(12):
        name = f"call {n}"
        with served.memory.session(name):
            results = both(lambda: run(served, 0), lambda: run(served, 1))
        failed = [r for r in results if isinstance(r, BaseException)]
        assert all(isinstance(error, SessionError) for error in failed), failed
        assert served.utterances(name) == 2 - len(failed)


def test_the_second_of_two_forwards_that_meet_is_refused_and_the_first_is_whole(served: Served):
    with served.memory.session("alone"):
        expected = served.forward(0)
    served.hold = threading.Event()
    served.running.clear()

    def second() -> Tensor:
        assert served.running.wait(10)
        try:
            return served.forward(1)
        finally:
            assert served.hold is not None
            served.hold.set()

    with served.memory.session("call"):
        answer, refused = both(lambda: served.forward(0), second)
        assert isinstance(refused, SessionError)
        assert "one at a time" in str(refused)
        assert same_bits(answer, expected)
        served.forward(1)  # the block is still good
    assert served.utterances("call") == 2


def test_forwards_that_only_read_may_meet(served: Served):
    served.hold = threading.Event()
    meet = threading.Barrier(2)

    def reader(turn: int) -> Tensor:
        meet.wait(10)
        threading.Timer(0.05, served.hold.set).start()  # type: ignore[union-attr]
        return served.forward(turn)

    with served.memory.session("call", write=False):
        results = both(lambda: reader(0), lambda: reader(1))
    assert all(isinstance(result, Tensor) for result in results)


def test_text_may_pass_while_an_utterance_is_written(served: Served):
    text = {name: served.turns[0][name][:, :2] for name in ("input_ids", "attention_mask")}
    served.hold = threading.Event()

    def second() -> Tensor:
        assert served.running.wait(10)
        threading.Timer(0.05, served.hold.set).start()  # type: ignore[union-attr]
        with torch.no_grad():
            return served.model(**text).logits

    with served.memory.session("call"):
        results = both(served.forward, second)
    assert all(isinstance(result, Tensor) for result in results)
    assert served.utterances("call") == 1


def test_a_thread_that_died_in_its_forward_holds_nobody_up(served: Served):
    def dies(*_: object) -> None:
        raise SystemExit  # not an Exception: torch calls no hook at the end of such a forward

    handle = HOST.layers(served.model)[-1].register_forward_hook(dies)
    with served.memory.session("call"):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(served.forward,))
        thread.start()
        thread.join()
        handle.remove()
        served.forward()
    assert served.utterances("call") == 1


def test_two_step_by_step_decoders_in_one_block_are_two_utterances(served: Served):
    """Without a KV cache, each step feeds its own prompt again."""

    async def decode(turn: int) -> None:
        inputs = dict(served.turns[turn])
        for _ in range(3):
            with torch.no_grad():
                token = served.model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat((inputs["input_ids"], token), 1)
            inputs["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones_like(token)), 1)
            await asyncio.sleep(0)

    async def main() -> None:
        with served.memory.session("call"):
            await asyncio.gather(decode(0), decode(1))

    asyncio.run(main())
    assert served.utterances("call") == 2


@pytest.mark.parametrize("family", ["voxtral_realtime", "kyutai_speech_to_text"])
def test_streams_that_interleave_in_one_block_are_refused_before_one_is_lost(family: str):
    from tests.hosts.builders import ADDITIVE_HOSTS

    host = ADDITIVE_HOSTS[family]
    model = host.build(num_layers=3)
    memory = attach_memory(model, layer_idx=1, adapter=random_adapter())
    speeches = [host.speech(model, [6], seed=seed) for seed in (1, 2)]
    turn = itertools.cycle((0, 1))
    gates = [threading.Semaphore(1), threading.Semaphore(0)]

    def stream(number: int) -> Any:
        def step(*_: object) -> None:  # the streams take turns, forward by forward
            if threading.current_thread() is threads[number]:
                gates[number].acquire(timeout=10)

        def stepped(*_: object) -> None:
            if threading.current_thread() is threads[number]:
                gates[1 - number].release()

        threads[number] = threading.current_thread()
        handles = [model.register_forward_pre_hook(step), model.register_forward_hook(stepped, always_call=True)]
        try:
            return model.generate(**speeches[number], do_sample=False)
        finally:
            for handle in handles:
                handle.remove()
            for _ in range(20):
                gates[1 - number].release()

    threads: dict[int, threading.Thread] = {}
    del turn
    with memory.session("call"):
        results = both(lambda: stream(0), lambda: stream(1))
    assert any(isinstance(result, SessionError) for result in results), results
    assert all(isinstance(result, (Tensor, SessionError)) for result in results)


def test_a_pool_of_callers_shares_one_block_and_every_utterance_counts(served: Served):
    def caller(turn: int) -> None:
        while True:
            try:
                served.forward(turn % 4)
                return
            except SessionError:
                time.sleep(0.001)

    with served.memory.session("call"), ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda turn, context: context.run(caller, turn),
                range(24),
                [contextvars.copy_context() for _ in range(24)],
            )
        )
    assert served.utterances("call") == 24


def test_unused_blocks_do_not_keep_earlier_sessions(served: Served):
    sessions = []
    for number in range(3):
        with served.memory.session(f"call-{number}") as session:
            sessions.append(weakref.ref(session))
        del session
    gc.collect()
    assert [reference() is None for reference in sessions] == [True, True, False]


def test_a_block_left_in_another_thread_while_its_forward_runs_is_an_error(served: Served):
    block = served.memory.session("call")
    block.__enter__()

    def leave(*_: object) -> None:
        thread = threading.Thread(target=block.__exit__, args=(None, None, None))
        thread.start()
        thread.join()

    handle = served.memory.decoder_layers[0].register_forward_pre_hook(leave)
    try:
        with pytest.raises(SessionError, match="was left"):
            served.forward(0)
    finally:
        handle.remove()
    assert "call" not in served.memory.states

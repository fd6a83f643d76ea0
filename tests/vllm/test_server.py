"""`vllm serve` with a memory: chat completions in sessions, refusals, session routes and metrics."""

import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mal_adapter import MemoryState
from tests.stores.servers import RedisServer
from tests.vllm.engines import TOLERANCE, Ask, assert_same, start, through_transformers
from tests.vllm.hosts import QUESTION

pytest.importorskip("vllm")
httpx = pytest.importorskip("httpx")

from tests.vllm.servers import Server  # noqa: E402


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """It keeps its data when it is killed."""
    with tempfile.TemporaryDirectory(prefix="mal") as folder:
        redis = RedisServer(Path(folder), "--appendonly", "yes", "--appendfsync", "always").start()
        yield redis
        redis.kill()


@pytest.fixture(scope="module")
def server(
    redis: RedisServer, host_folder: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    server = Server(host_folder, adapter_folder, tmp_path_factory.mktemp("server"), store=redis.url)
    yield server
    server.stop()


def test_a_dialogue_equals_transformers(server: Server, transformers_host: Any, adapter_folder: Path):
    asks = [Ask("call/42", (i,), turn=i) for i in range(4)]
    expected, _ = through_transformers(transformers_host, adapter_folder, asks)
    for ask, want in zip(asks, expected, strict=True):
        got = server.answer(ask)
        assert_same([torch.tensor(list(got.values()))], [want[list(got)]])
    again = server.answer(asks[-1])  # the client did not get the answer, and sends it again
    assert max(abs(got[token] - value) for token, value in again.items()) <= TOLERANCE
    look = server.client.get("/v1/sessions/call/42").json()
    assert (look["utterances"], look["next_turn"], look["saved"]) == (4, 4, True)
    assert look["last"]["reason"] == "turn 3 is already written"


def test_bad_requests_are_answered_400_with_what_to_do(server: Server):
    for ask, others, advice in (
        (Ask("", (1,)), {}, "non-empty string"),
        (Ask("a" * 81, (1,)), {}, "use up to 80"),
        (Ask("a", (1,), turn=-1), {}, "0 for the first"),
        (Ask(None, (1,), turn=1), {}, "session_id"),
        (Ask("a", (1,)), {"n": 2, "temperature": 1}, "n=1"),
        (Ask("a", (1,)), {"vllm_xargs": {"session_id": 3}}, "not a string"),
    ):
        reply = server.chat(ask, **others)
        assert reply.status_code == 400, reply.text
        assert advice in reply.json()["error"]["message"]
    assert server.client.get("/v1/sessions/a").status_code == 404


def test_routes_of_sessions(server: Server):
    server.answer(Ask("r1", (1,), turn=0))
    client = server.client
    assert "r1" in client.get("/v1/sessions").json()["sessions"]
    assert client.post("/v1/sessions/r1/fork", params={"to": "r2"}).json()["utterances"] == 1
    assert client.post("/v1/sessions/r1/fork", params={"to": "r2"}).status_code == 409
    data = client.get("/v1/sessions/r1/state").content
    assert int(MemoryState.from_bytes(data).utterances) == 1
    assert client.put("/v1/sessions/r3/state", content=data).json()["next_turn"] == 1
    answers = [server.answer(Ask(session, (2,), turn=1)) for session in ("r1", "r2", "r3")]
    assert answers[0] == answers[1] == answers[2]
    assert client.put("/v1/sessions/r4/state", content=data[:-3]).status_code == 422
    assert client.delete("/v1/sessions/r2").json() == {"session": "r2", "dropped": True}
    for reply in (
        client.delete("/v1/sessions/r2"),
        client.get("/v1/sessions/r2"),
        client.get("/v1/sessions/r2/state"),
        client.post("/v1/sessions/r2/fork", params={"to": "r5"}),
    ):
        assert reply.status_code == 404
        assert "does not exist" in reply.json()["error"]["message"]
    assert httpx.get(str(client.base_url.join("/v1/sessions"))).status_code == 401  # without the key


def test_counters_are_on_metrics(server: Server):
    before = server.client.get("/v1/sessions-stats").json()["writes"]
    server.answer(Ask("metrics", (1,)))
    for _ in range(40):
        text = server.client.get("/metrics").text
        found = re.search(r"^mal_adapter_writes_total (\S+)", text, re.M)
        if found and float(found[1]) == before + 1:
            break
        time.sleep(0.25)
    else:
        raise AssertionError(f"{found} in {re.findall('mal_adapter.*', text)}")
    assert "vllm:num_requests_running" in text
    assert "mal_adapter_conflicts_total" in text


def test_300_hostile_requests_do_not_stop_the_server(server: Server):
    generator = random.Random(0)
    values = [
        "",
        0,
        -1,
        1.5,
        2**63,
        10**30,
        True,
        None,
        [],
        ["a"],
        {},
        {"a": [1]},
        "a" * 10_000,
        "\0",
        "é" * 50,
        "../..",
        "a\nb",
    ]
    body = {"model": "host", "messages": [{"role": "user", "content": QUESTION}], "max_completion_tokens": 1}
    statuses = set()
    for _ in range(300):
        extra = {name: generator.choice(values) for name in ("session_id", "turn") if generator.random() < 0.8}
        chosen = generator.choice(
            [
                {"vllm_xargs": extra},
                {"vllm_xargs": extra, "n": generator.choice([0, 2, -1, 10**6])},
                {"vllm_xargs": generator.choice(values)},
                {"vllm_xargs": extra, "messages": generator.choice(values)},
                {"vllm_xargs": extra, "max_completion_tokens": generator.choice([0, -1, 10**9])},
            ]
        )
        statuses.add(server.client.post("/v1/chat/completions", json={**body, **chosen}).status_code)
    assert statuses <= {200, 400, 422}
    for _ in range(30):  # with audio, which is processed before a request is admitted
        session, turn = generator.choice(values), generator.choice(values)
        extra = {"session_id": session, "turn": turn}
        reply = server.chat(Ask(None, (generator.randrange(9),), seconds=0.05), vllm_xargs=extra)
        assert reply.status_code == 400, extra
    for data in ("", "AAAA", "%%%", "UklGRg=="):
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        message = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
        close = {"Connection": "close"}  # vLLM ends it after an error of its own, such as a missing decoder
        reply = server.client.post("/v1/chat/completions", json={**body, "messages": [message]}, headers=close)
        assert reply.status_code >= 400
    for path in ("%00", "..%2f..%2fetc", "a" * 5000, "%ff%fe", "%0a"):
        for reply in (
            server.client.get(f"/v1/sessions/{path}"),
            server.client.put(f"/v1/sessions/{path}/state", content=b"\0" * 1000),
            server.client.delete(f"/v1/sessions/{path}"),
        ):
            assert 400 <= reply.status_code < 500, (path, reply.text)
    assert server.client.get("/v1/sessions", params={"limit": -1}).status_code == 400
    server.answer(Ask("after", (1,), turn=0))
    assert server.client.get("/v1/sessions/after").json()["utterances"] == 1
    assert server.client.get("/v1/sessions-stats").json()["errors"] == 0


def test_two_engines_on_one_redis_continue_each_others_dialogues(
    server: Server, redis: RedisServer, host_folder: Path, adapter_folder: Path, transformers_host: Any
):
    asks = [Ask("shared", (i,), turn=i) for i in range(6)]
    expected, _ = through_transformers(transformers_host, adapter_folder, asks)
    other = start(host_folder, adapter_folder, store=redis.url)
    try:
        for i, ask in enumerate(asks):
            got = server.answer(ask) if i % 2 else dict(enumerate(other.answer([ask])[0].tolist()))
            assert_same([torch.tensor(list(got.values()))], [expected[i][list(got)]])
    finally:
        other.stop()


def test_while_the_store_is_away_answers_have_no_memory(
    server: Server, redis: RedisServer, transformers_host: Any, adapter_folder: Path
):
    asks = [Ask("away", (1,), turn=0), Ask(None, (2,)), Ask("away", (3,), turn=1)]
    expected, _ = through_transformers(transformers_host, adapter_folder, asks)

    def check(index: int, got: dict[int, float]) -> None:
        assert_same([torch.tensor(list(got.values()))], [expected[index][list(got)]])

    check(0, server.answer(asks[0]))
    before = server.client.get("/v1/sessions-stats").json()
    redis.kill()
    check(1, server.answer(Ask("away", (2,), turn=1)))  # as without a session
    assert server.client.get("/v1/sessions/away").status_code == 503
    after = server.client.get("/v1/sessions-stats").json()
    assert (after["unavailable"], after["writes"]) == (before["unavailable"] + 1, before["writes"])
    redis.start()
    time.sleep(1.2)  # for a second after a failure the store is not asked
    check(2, server.answer(asks[2]))

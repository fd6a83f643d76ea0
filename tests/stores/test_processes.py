"""Processes that share a store lose none of each other's utterances."""

import multiprocessing
from pathlib import Path

import pytest

from mal_adapter.stores import open_store
from tests.stores.servers import RedisServer
from tests.stores.states import count_up, state_of

TIMES = 150


def _count_up_in(where: str, start, conflicts) -> None:
    store = open_store(where)
    start.wait()
    conflicts.put(count_up(store, "call", TIMES))


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_two_processes_lose_no_update(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    if kind == "redis":
        server: RedisServer = request.getfixturevalue("server")
        where = f"redis://:s3cret@127.0.0.1:{server.port}/7"  # a database of its own, since open_store has no prefix
    else:
        where = str(tmp_path)
    context = multiprocessing.get_context("fork")  # the children need not import torch again
    start, conflicts = context.Barrier(2), context.SimpleQueue()
    writers = [context.Process(target=_count_up_in, args=(where, start, conflicts)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    print(f"2 processes x {TIMES} utterances, {conflicts.get() + conflicts.get()} conflicts")
    assert open_store(where).get("call").state.equals(state_of(2 * TIMES))

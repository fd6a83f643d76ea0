"""`Batcher` runs each item at most once, in order, in batches that are no larger than allowed."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.server.batcher import Batcher, UnwantedError
from mal_adapter.server.limits import Limits

FOREVER = 3600.0


async def wanted() -> bool:
    return True


async def unwanted() -> bool:
    return False


def together(
    limits: Limits, run: Callable[[Sequence[int]], Sequence[int | Exception]], *submits: tuple[int, float, object]
) -> list[object]:
    """The outcomes of items that are submitted in one step of the event loop."""

    async def main() -> list[object]:
        batcher: Batcher[int, int] = Batcher(run, limits)
        batcher.start()
        calls: list[Awaitable[int]] = [batcher.submit(item, timeout, ask) for item, timeout, ask in submits]  # type: ignore[arg-type]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert len(batcher) == 0
        await batcher.stop()
        return list(outcomes)

    return asyncio.run(main())


@given(
    st.lists(st.sampled_from(["good", "bad", "unwanted"]), max_size=30),
    st.integers(1, 7),
    st.sampled_from([0.0, 1.0]),
)
def test_each_item_has_its_own_outcome_and_batches_are_in_order(kinds: list[str], batch: int, wait_ms: float):
    batches: list[list[int]] = []
    lock = threading.Lock()

    def run(items: Sequence[int]) -> list[int | Exception]:
        with lock:
            batches.append(list(items))
        return [ValueError(str(i)) if kinds[i] == "bad" else 10 * i for i in items]

    submits = [(i, FOREVER, unwanted if kind == "unwanted" else wanted) for i, kind in enumerate(kinds)]
    outcomes = together(Limits(batch=batch, wait_ms=wait_ms), run, *submits)
    for i, (kind, outcome) in enumerate(zip(kinds, outcomes, strict=True)):
        if kind == "good":
            assert outcome == 10 * i
        else:
            assert isinstance(outcome, ValueError if kind == "bad" else UnwantedError)
    assert all(len(items) <= batch for items in batches)
    # Two threads may begin in either order, but no item is before an earlier one within a batch, and none runs twice.
    assert sorted(i for items in batches for i in items) == [i for i, kind in enumerate(kinds) if kind != "unwanted"]
    assert all(items == list(range(items[0], items[-1] + 1)) or "unwanted" in kinds for items in batches)


def test_an_error_of_the_whole_batch_is_the_outcome_of_each_item():
    def run(items: Sequence[int]) -> list[int | Exception]:
        raise MemoryError("all of it")

    outcomes = together(Limits(batch=2, wait_ms=0.0), run, *[(i, FOREVER, wanted) for i in range(5)])
    assert [type(outcome) for outcome in outcomes] == [MemoryError] * 5


def test_what_waits_while_a_batch_runs_is_one_batch_and_what_waits_too_long_is_not_processed():
    batches: list[list[int]] = []
    running, release = threading.Event(), threading.Event()

    def run(items: Sequence[int]) -> list[int | Exception]:
        batches.append(list(items))
        running.set()
        assert release.wait(60)
        return list(items)

    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(run, Limits(batch=8, wait_ms=0.0))
        batcher.start()
        first = asyncio.create_task(batcher.submit(0, FOREVER, wanted))
        while not running.is_set():
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.submit(i, FOREVER, wanted)) for i in (1, 2, 3)]
        with pytest.raises(TimeoutError):
            await batcher.submit(99, 0.0, wanted)
        gone = asyncio.create_task(batcher.submit(98, FOREVER, wanted))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert len(batcher) == 3
        release.set()
        assert await asyncio.gather(first, *others) == [0, 1, 2, 3]
        await batcher.stop()

    asyncio.run(main())
    assert batches == [[0], [1, 2, 3]]


def test_a_full_batch_begins_while_another_one_runs():
    """So that its sound is decoded meanwhile."""
    both = threading.Barrier(2, timeout=60)

    def run(items: Sequence[int]) -> list[int | Exception]:
        both.wait()
        return list(items)

    outcomes = together(Limits(batch=2, wait_ms=1000 * FOREVER), run, *[(i, FOREVER, wanted) for i in range(4)])
    assert outcomes == [0, 1, 2, 3]


def test_a_batch_that_is_cancelled_by_its_callers_does_not_end_the_batcher():
    running, release = threading.Event(), threading.Event()

    def run(items: Sequence[int]) -> list[int | Exception]:
        running.set()
        assert release.wait(60)
        return list(items)

    async def main() -> int:
        batcher: Batcher[int, int] = Batcher(run, Limits(batch=1, wait_ms=0.0))
        batcher.start()
        first = asyncio.create_task(batcher.submit(0, FOREVER, wanted))
        while not running.is_set():
            await asyncio.sleep(0.001)
        first.cancel()
        release.set()
        answer = await batcher.submit(1, FOREVER, wanted)
        await batcher.stop()
        return answer

    assert asyncio.run(main()) == 1

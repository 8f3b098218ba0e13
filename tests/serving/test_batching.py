"""Requests that wait become one call; first come, first served; nobody else's fault is one's own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import pytest

from qsteer.serving.batching import Batcher, BatchLimits, RefusedError


class Ask(NamedTuple):
    """A request: its reply is ten times its number."""

    number: int
    key: Any = None


class Worker:
    """Acts, remembers calls, and can be held back."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.threads: set[str] = set()
        self.go, self.busy = threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, requests: Sequence[Ask]) -> list[int | Exception]:
        self.threads.add(threading.current_thread().name)
        self.calls.append([each.number for each in requests])
        self.busy.set()
        assert self.go.wait(20)
        if any(each.number < 0 for each in requests):
            raise ZeroDivisionError("of one of them")
        return [ValueError("its own") if each.number == 99 else 10 * each.number for each in requests]

    async def hold(self, batcher: Batcher) -> asyncio.Task:
        """Begin a call that lasts until ``go`` is set."""
        self.go.clear()
        first = asyncio.create_task(batcher.submit(Ask(0, "hold")))
        while not self.busy.is_set():
            await asyncio.sleep(0.001)
        return first


def run(
    test: Callable[[Batcher, Worker], Coroutine[Any, Any, None]],
    limits: BatchLimits = BatchLimits(wait=0.0),  # noqa: B008
    clients: Callable[[], int] | None = None,
) -> Worker:
    worker = Worker()

    async def main() -> None:
        async with Batcher(worker, limits, clients=clients) as batcher:
            try:
                await test(batcher, worker)
            finally:
                worker.go.set()

    asyncio.run(asyncio.wait_for(main(), 30))
    return worker


def asks(batcher: Batcher, *requests: Ask) -> list[asyncio.Task]:
    return [asyncio.create_task(batcher.submit(each)) for each in requests]


def test_what_waits_becomes_one_call_in_its_order() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        first = await worker.hold(batcher)
        tasks = asks(batcher, *map(Ask, range(1, 6)))
        await asyncio.sleep(0)
        assert batcher.waiting == 5
        worker.go.set()
        assert await asyncio.gather(first, *tasks) == [0, 10, 20, 30, 40, 50]

    worker = run(test, BatchLimits(batch=4, wait=0.0))
    assert worker.calls == [[0], [1, 2, 3, 4], [5]]
    assert len(worker.threads) == 1 and threading.current_thread().name not in worker.threads


def test_other_keys_are_other_calls_and_the_oldest_goes_first() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        first = await worker.hold(batcher)
        tasks = asks(batcher, Ask(1, "a"), Ask(2, "b"), Ask(3, "a"), Ask(4, "b"))
        await asyncio.sleep(0)
        worker.go.set()
        assert await asyncio.gather(first, *tasks) == [0, 10, 20, 30, 40]

    assert run(test).calls == [[0], [1, 3], [2, 4]]


def test_a_free_worker_waits_for_others_but_not_for_long() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        (one,) = asks(batcher, Ask(1))
        await asyncio.sleep(0.05)
        (two,) = asks(batcher, Ask(2))
        assert await asyncio.gather(one, two) == [10, 20]
        assert await batcher.submit(Ask(3)) == 30  # alone, after the wait

    assert run(test, BatchLimits(wait=0.4)).calls == [[1, 2], [3]]


def test_nobody_waits_once_all_clients_do() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        assert await asyncio.gather(*asks(batcher, Ask(1), Ask(2))) == [10, 20]

    assert run(test, BatchLimits(wait=25.0), clients=lambda: 2).calls == [[1, 2]]


def test_a_full_batch_waits_for_nobody() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        assert await asyncio.gather(*asks(batcher, Ask(1), Ask(2))) == [10, 20]

    assert run(test, BatchLimits(batch=2, wait=25.0)).calls == [[1, 2]]


def test_a_full_queue_refuses() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        first = await worker.hold(batcher)
        tasks = asks(batcher, Ask(1), Ask(2))
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="at most 2 requests"):
            await batcher.submit(Ask(3))
        worker.go.set()
        assert await asyncio.gather(first, *tasks) == [0, 10, 20]

    run(test, BatchLimits(queue=2, wait=0.0))


def test_who_has_gone_costs_no_call() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        first = await worker.hold(batcher)
        gone, stays = asks(batcher, Ask(1), Ask(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 1
        worker.go.set()
        assert await asyncio.gather(first, stays) == [0, 20]

    assert run(test).calls == [[0], [2]]


def test_who_waits_too_long_is_told() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        first = await worker.hold(batcher)
        (late,) = asks(batcher, Ask(1))
        for task in (late, first):  # in the queue, and in the call
            with pytest.raises(RefusedError, match=r"within 0\.3 s"):
                await task
        worker.go.set()
        assert await batcher.submit(Ask(2)) == 20

    assert run(test, BatchLimits(timeout=0.3, wait=0.0)).calls == [[0], [2]]


def test_a_call_that_fails_is_made_for_each_alone() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        first = await worker.hold(batcher)
        tasks = asks(batcher, Ask(1), Ask(-2), Ask(3), Ask(99))
        await asyncio.sleep(0)
        worker.go.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [found[i] for i in (0, 1, 3)] == [0, 10, 30]
        assert isinstance(found[2], ZeroDivisionError) and isinstance(found[4], ValueError)

    assert run(test).calls == [[0], [1, -2, 3, 99], [1], [-2], [3], [99]]


def test_leaving_finishes_what_was_taken_and_takes_no_more() -> None:
    async def test(batcher: Batcher, worker: Worker) -> None:
        first = await worker.hold(batcher)
        tasks = asks(batcher, Ask(1), Ask(2))
        await asyncio.sleep(0)
        draining = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="while it stops"):
            await batcher.submit(Ask(3))
        worker.go.set()
        assert await asyncio.gather(first, *tasks) == [0, 10, 20]
        await draining

    run(test, BatchLimits(wait=25.0, batch=8), clients=lambda: 1)


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"queue": 0}, {"wait": -1.0}, {"timeout": 0.0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"BatchLimits.{next(iter(wrong))}"):
        BatchLimits(**wrong)

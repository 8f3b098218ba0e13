"""Learning takes its share of the time in which robots wait, and no more; and all of the rest."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from qsteer.serving.batching import Batcher, BatchLimits
from qsteer.serving.share import WINDOW, Share


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("call", "step"), [(0.02, 0.003), (0.003, 0.02)])
def test_the_share_is_kept_while_requests_wait(share: float, call: float, step: float) -> None:
    clock = Clock()
    shared, spent, acted = Share(share, clock), 0.0, 0.0
    shared.learn(step, waiting=False)  # nobody waited: it does not count
    for _ in range(600):
        clock.now += call
        shared.act(call)
        acted += call
        while shared.allows():
            clock.now += step
            shared.learn(step, waiting=True)
            spent += step
        assert spent <= share * (spent + acted) + 1e-6
    assert spent >= 0.9 * share * (spent + acted) - 2 * step


def test_only_the_last_seconds_count() -> None:
    clock = Clock()
    shared = Share(0.5, clock)
    shared.act(5.0)
    shared.learn(1.0, waiting=True)
    assert shared.allows()
    clock.now = WINDOW + 1
    assert not shared.allows()  # nothing was acted of late


def test_no_such_share() -> None:
    with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\], got 1.5"):
        Share(1.5)


class Ask(NamedTuple):
    number: int
    key: str = ""


def test_at_most_one_step_between_two_calls_and_all_the_time_without_requests() -> None:
    events: list[str] = []

    def act(requests: Sequence[Ask]) -> list[int | Exception]:
        events.append("act")
        return [each.number for each in requests]

    left = 50

    def idle(waiting: bool) -> bool:
        nonlocal left
        if waiting:
            events.append("step")
            return True
        events.append("idle" if left else "nothing")
        left -= left > 0
        return left > 0

    async def main() -> None:
        async with Batcher(act, BatchLimits(batch=1, wait=0.0), idle=idle) as batcher:
            await asyncio.gather(*(batcher.submit(Ask(i)) for i in range(20)))
            while left:
                await asyncio.sleep(0.01)
            events.append("run")
            await batcher.run(lambda: None)
            while events[-1] != "nothing":
                await asyncio.sleep(0.01)

    asyncio.run(main())
    first, last = events.index("act"), len(events) - 1 - events[::-1].index("act")
    busy = events[first : last + 1]
    assert busy.count("act") == 20 and busy.count("step") == 19
    assert all(a != b for a, b in itertools.pairwise(busy))  # one step between two calls
    assert events.count("idle") == 50
    # What ran in between may have made work, and so it was asked for again.


def test_what_runs_beside_is_not_asked_for_again_and_again() -> None:
    asked = 0

    def idle(waiting: bool) -> bool:
        nonlocal asked
        asked += 1
        return False

    async def main() -> None:
        async with Batcher(lambda requests: [0], BatchLimits(wait=0.0), idle=idle) as batcher:
            await batcher.submit(Ask(0))
            await asyncio.sleep(0.2)
            assert asked <= 3

    asyncio.run(main())

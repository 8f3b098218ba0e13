"""Requests that wait become one call: an asyncio front, and one worker thread that owns the policy."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

from qsteer.checks import check_at_least, check_positive


class RefusedError(RuntimeError):
    """A request that is not answered for a reason that the client may know."""


@runtime_checkable
class Batchable(Protocol):
    """What is batched: requests of one ``key`` may share a call."""

    @property
    def key(self) -> Hashable:
        """What requests of one call have in common."""
        ...


@dataclass(frozen=True)
class BatchLimits:
    """How requests are gathered.

    Attributes:
        batch: most requests of a call.
        wait: longest time in seconds that a request waits for others while the worker is free.
        queue: most requests that wait; more are refused.
        timeout: longest time in seconds from a request to its reply.

    Raises:
        ValueError: a number is out of its range.
    """

    batch: int = 16
    wait: float = 0.005
    queue: int = 64
    timeout: float = 30.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_at_least(self, 1, "batch", "queue")
        check_at_least(self, 0, "wait")
        check_positive(self, "timeout")


@dataclass(eq=False)
class _Waiting[R, D]:
    """A request in the queue."""

    request: R
    reply: "asyncio.Future[D]"
    since: float = field(default_factory=time.monotonic)


class Batcher[R: Batchable, D]:
    """Gathers requests into calls of ``act``, first come first served.

    The oldest request's call takes the others of its ``key`` in the order in which they came. While the
    worker is busy, what comes waits; when it is free, a call begins as soon as ``limits.batch`` requests
    wait, or as many as there are ``clients``, each of which waits for its reply, or the oldest has waited
    for ``limits.wait``. A request whose caller has gone is dropped before it costs a call.

    A call that fails is made again for each of its requests alone, so that only those fail that must.

    Args:
        act: ``requests -> replies``, one each, in the worker thread; a reply may be an exception.
        limits: how requests are gathered.
        clients: how many may have a request in flight; None: not known.
        on_call: is told how many requests a call takes, and how many go on waiting.
        idle: ``waiting -> more``: does a little other work in the worker thread, and says whether there is
            more: once between two calls while requests wait, and again and again while none does.

    Use it inside the event loop: ``async with Batcher(act) as batcher: await batcher.submit(request)``.
    Leaving finishes what was taken.
    """

    def __init__(
        self,
        act: Callable[[Sequence[R]], Sequence[D | Exception]],
        limits: BatchLimits = BatchLimits(),
        *,
        clients: Callable[[], int] | None = None,
        on_call: Callable[[int, int], None] | None = None,
        idle: Callable[[bool], bool] | None = None,
    ) -> None:
        self.act, self.limits, self.clients, self.on_call = act, limits, clients, on_call
        self.idle = idle
        self._waiting: deque[_Waiting[R, D]] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self._worker = ThreadPoolExecutor(1, "qsteer-policy")
        self._dispatcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Batcher[R, D]":
        self._dispatcher = asyncio.create_task(self._dispatch())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()

    @property
    def waiting(self) -> int:
        """How many requests wait for their call to begin."""
        return len(self._waiting)

    async def submit(self, request: R) -> D:
        """Return the reply to a request; cancelling it drops the request.

        Raises:
            RefusedError: the queue is full, the time is over, or the batcher is closing.
            Exception: what ``act`` raises.
        """
        if self._closing or self._dispatcher is None:
            raise RefusedError("server: expected to be running, got a request while it stops; connect again")
        if len(self._waiting) >= self.limits.queue:
            raise RefusedError(
                f"queue: expected at most {self.limits.queue} requests that wait, got one more; ask again "
                "later, or raise the server's --max-queue"
            )
        entry = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._changed.set()
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await entry.reply
        except TimeoutError:
            raise RefusedError(
                f"timeout: expected a reply within {self.limits.timeout:g} s, got none; ask again, use fewer "
                "robots, or raise the server's --timeout"
            ) from None
        finally:
            entry.reply.cancel()
            if entry in self._waiting:
                self._waiting.remove(entry)
            self._changed.set()

    async def run[T](self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns in the worker thread, between two calls."""
        try:
            return await self._run(work)
        finally:
            self._changed.set()  # there may be something to do while nothing waits

    async def _run[T](self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def drain(self, last: Callable[[], None] | None = None) -> None:
        """Take no more requests, finish those taken, do the ``last`` work, and let the worker go."""
        self._closing = True
        self._changed.set()
        if self._dispatcher is not None:
            await self._dispatcher
        if last is not None:
            await self._run(last)
        self._worker.shutdown(wait=False)

    async def _dispatch(self) -> None:
        while True:
            self._changed.clear()
            if not self._waiting:
                if self._closing:
                    return
                if self.idle is None or not await self._run(partial(self.idle, False)):
                    await self._changed.wait()
                continue
            left = self._waiting[0].since + self.limits.wait - time.monotonic()
            if left > 0 and not self._closing and len(self._next()) < self._enough():
                try:
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                continue
            await self._call(self._next())
            if self.idle is not None and self._waiting:
                await self._run(partial(self.idle, True))

    def _enough(self) -> int:
        """Return how many requests need not wait for others."""
        return self.limits.batch if self.clients is None else min(self.limits.batch, max(1, self.clients()))

    def _next(self) -> list[_Waiting[R, D]]:
        """Return what the oldest request's call takes."""
        key = self._waiting[0].request.key
        return [entry for entry in self._waiting if entry.request.key == key][: self.limits.batch]

    async def _call(self, taken: list[_Waiting[R, D]]) -> None:
        for entry in taken:
            self._waiting.remove(entry)
        if self.on_call is not None:
            self.on_call(len(taken), len(self._waiting))
        replies = await self._run(partial(self._reply, [entry.request for entry in taken]))
        for entry, reply in zip(taken, replies, strict=True):
            if entry.reply.done():
                continue  # its caller has gone
            if isinstance(reply, Exception):
                entry.reply.set_exception(reply)
            else:
                entry.reply.set_result(reply)

    def _reply(self, requests: list[R]) -> Sequence[D | Exception]:
        """Call ``act`` in the worker thread; where it fails, for each request alone."""
        try:
            replies = self.act(requests)
            if len(replies) != len(requests):
                raise RuntimeError(f"act: expected {len(requests)} replies, got {len(replies)}")
            return replies
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [self._reply([request])[0] for request in requests]

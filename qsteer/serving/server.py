"""The openpi websocket protocol, for many robots at once.

On connecting a client gets one message, the metadata; then each of its messages is a request, or tells what
came of the last reply, and gets one reply. What cannot be answered gets a text, and the connection is closed
with 1011. The event loop reads, writes and waits; a worker thread owns the policy
(:mod:`qsteer.serving.batching`).
"""

import asyncio
import logging
import random
import secrets
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from itertools import count
from typing import Any, NamedTuple

from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.typing import Data

import qsteer
from qsteer.sampling import nested
from qsteer.serving.batching import Batcher, BatchLimits, RefusedError
from qsteer.serving.codec import CodecError, pack, unpack
from qsteer.serving.door import SCHEME, Rate, ServerLimits, is_allowed, is_loopback, respond
from qsteer.serving.lanes import Lanes
from qsteer.serving.learning import RobotLearning
from qsteer.serving.metrics import CONTENT_TYPE, Metrics
from qsteer.serving.options import OWN, RequestError, Told
from qsteer.serving.page import page, show
from qsteer.serving.requests import Decision, Request
from qsteer.serving.served import Served
from qsteer.serving.watch import Watch

logger = logging.getLogger(__name__)
_websockets = logging.getLogger(f"{__name__}.websockets")
_websockets.setLevel(logging.CRITICAL)  # a stranger's broken handshake is not worth a traceback

GOING_AWAY, FAULT = 1001, 1011
"""Codes with which a connection is closed: the server stops; a request was not answered."""
INLINE = 2**16
"""Bytes of a message that are read on the event loop; larger ones take another thread."""


class Answer(NamedTuple):
    """What the worker thread makes of a request: the decision, its call's seconds, what its robot is told."""

    decision: Decision
    seconds: float
    told: dict[str, int | str]


class Server:
    """Serves a policy; ``async with Server(served) as server:`` listens until the block is left.

    Entering acts once, so that the first robot does not wait. Leaving takes no more requests, answers those
    that were taken, and closes the connections with 1001.

    Args:
        served: the policy, which the server's worker thread owns from now on.
        host: address to listen at.
        port: 0: any that is free, see :attr:`port`.
        batching: how requests become calls.
        limits: what clients may take.
        key: which clients send as ``Authorization: Api-Key KEY``; None: all are let in.
        tls: certificate and key; None: no encryption.
        insecure: listen beyond this machine without a key.
        seed: of the seeds that are drawn for requests without one; None: the system's randomness.
        on_decision: is given each request with its decision, in the worker thread, after the call.
        learning: of the served policy's critic, from the robots; None: what they tell is counted. Leaving
            closes it.

    Raises:
        ValueError: the address is not this machine's alone, and there is no key.
    """

    def __init__(
        self,
        served: Served,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        batching: BatchLimits = BatchLimits(),  # noqa: B008 (frozen)
        limits: ServerLimits = ServerLimits(),  # noqa: B008 (frozen)
        key: str | None = None,
        tls: ssl.SSLContext | None = None,
        insecure: bool = False,
        seed: int | None = None,
        on_decision: Callable[[Request, Decision], None] | None = None,
        learning: RobotLearning | None = None,
    ) -> None:
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ValueError("key: expected printable ASCII without spaces around it, got something else")
        if not is_loopback(host):
            if key is None and not insecure:
                raise ValueError(
                    f"host: expected a loopback address without a key, got {host!r}, at which anybody on the "
                    "network could drive the robots; give a key, or pass insecure (--insecure)"
                )
            if key is None or tls is None:
                missing = "a key" if key is None else "TLS: the key travels in clear"
                logger.warning("listening beyond this machine without %s", missing)
        self.served, self.batching, self.limits = served, batching, limits
        self.metrics, self.on_decision = Metrics(), on_decision
        self._host, self._port, self._key, self._tls = host, port, key, tls
        self._seeds = random.Random(seed)
        self._method = served.rule, served.sampler  # which a critic that learns may not use yet
        self._robots: set[ServerConnection] = set()
        self.learning, self._numbers = learning, count(1)
        self.lanes = (
            Lanes(served.interface.horizon, limits.connections) if learning is None else learning.lanes
        )
        self.lanes.on_end = self._end
        self.watch = Watch(self.lanes)
        self._learnt: dict[str, Any] = {}  # how far learning is

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told when it connects."""
        rule, sampler = self._method
        return {
            "server": "qsteer",
            "version": qsteer.__version__,
            "rule": None if rule is None else type(rule).__name__,
            "sampler": ", ".join(type(each).__name__ for each in nested(sampler)),
            "exact": self.served.exact is not None,
            "learns": self.learning is not None,
            **self.served.interface.describe(),
        }

    @property
    def port(self) -> int:
        """Where the server listens, in the block."""
        return self._listener.sockets[0].getsockname()[1]

    async def __aenter__(self) -> "Server":
        self._stopping = asyncio.Event()
        learning = self.learning
        self._batcher: Batcher[Request, Answer] = Batcher(
            self._act,
            self.batching,
            clients=lambda: len(self._robots),
            on_call=lambda rows, waiting: self.metrics.rows.observe(rows),
            idle=None if learning is None else self._idle,
        )
        self.metrics.queue.set_function(lambda: self._batcher.waiting)
        self.metrics.connections.set_function(lambda: len(self._robots))
        await self._batcher.__aenter__()
        try:
            await self._batcher.run(self.served.warm_up)
            if learning is not None:
                await self._batcher.run(learning.begin)
            self._listener: Listener = await serve(
                self._meet,
                self._host,
                self._port,
                process_request=self._admit,
                origins=[None],  # no page of a browser
                compression=None,
                max_size=self.limits.message.bytes,
                max_queue=2,
                open_timeout=self.limits.handshake,
                ping_interval=self.limits.send,
                ping_timeout=self.limits.send,
                close_timeout=self.limits.send,
                server_header=None,
                logger=_websockets,
                ssl=self._tls,
            )
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.close(close_connections=False)
        try:
            async with asyncio.timeout(self.limits.grace):
                await self._listener.wait_closed()
        except TimeoutError:
            logger.warning("stopping: %d robots did not go in time", len(self._robots))
            for connection in [*self._robots]:
                connection.transport.abort()
        await self._close()

    async def _close(self) -> None:
        await self._batcher.drain(None if self.learning is None else self.learning.close)

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer what is no websocket, and refuse who may not come in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return respond(connection, HTTPStatus.OK, "OK\n")
        browser = "Upgrade" not in request.headers
        if not is_allowed(request, self._key, browser=browser):
            return respond(
                connection,
                HTTPStatus.UNAUTHORIZED,
                f"expected Authorization: {SCHEME} KEY, got no or another\n",
                {"WWW-Authenticate": 'Basic realm="qsteer", charset="UTF-8"'} if browser else None,
            )
        if path == "/metrics":
            text = self.metrics.text().decode()
            return respond(connection, HTTPStatus.OK, text, {"Content-Type": CONTENT_TYPE})
        if path == "/" and browser:
            return respond(connection, HTTPStatus.OK, *page())
        if path == "/state" and browser:
            learning = None if self.learning is None else self._learnt
            shown = {"server": self.metadata, "learning": learning, **self.watch.state()}
            return respond(connection, HTTPStatus.OK, *show(shown))
        if len(self._robots) >= self.limits.connections:
            return respond(connection, HTTPStatus.SERVICE_UNAVAILABLE, self._full())
        return None

    def _full(self) -> str:
        return f"connections: expected at most {self.limits.connections}, got one more; connect again later\n"

    async def _meet(self, connection: ServerConnection) -> None:
        """Serve one robot until it goes, or asks something that cannot be answered."""
        if len(self._robots) >= self.limits.connections:  # several shook hands at once
            return await self._refuse(connection, self._full().strip())
        self._robots.add(connection)
        robot = next(self._numbers)
        self.watch.enter(robot)
        try:
            await self._converse(connection, robot)
        except ConnectionClosed:
            pass
        except (CodecError, RequestError, RefusedError) as error:
            self.metrics.requests.labels("refused").inc()
            await self._refuse(connection, str(error))
        except Exception:
            self.metrics.requests.labels("fault").inc()
            number = secrets.token_hex(4)
            logger.exception("fault %s", number)
            await self._refuse(
                connection, f"server: expected to answer, got a fault of its own; its log has it as {number}"
            )
        finally:
            self._robots.discard(connection)
            self.watch.leave(robot)
            with suppress(RuntimeError):  # of a worker that has gone
                await self._batcher.run(partial(self.lanes.leave, robot))

    async def _converse(self, connection: ServerConnection, robot: int) -> None:
        await self._send(connection, pack(self.metadata))
        rate, timing = Rate(self.limits.rate), {}
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            while (message := await self._receive(connection)) is not None:
                since = time.monotonic()
                rate.take()
                request = await self._read(message)
                if isinstance(request, Told):
                    self._check_command(str(connection.remote_address[0]), request)
                    await self._send(connection, pack(await self._batcher.run(self._teller(robot, request))))
                    continue
                answer = await self._ask(replace(request, robot=robot), gone)
                timing["infer_ms"] = 1e3 * (time.monotonic() - since)
                reply = (
                    answer.decision.message()
                    | answer.told
                    | {
                        "policy_timing": {"infer_ms": 1e3 * answer.seconds},
                        "server_timing": timing,
                    }
                )
                await self._send(connection, pack(reply))
                total = time.monotonic() - since
                self.metrics.latency.observe(total)
                self.metrics.requests.labels("answered").inc()
                timing = {"prev_total_ms": 1e3 * total}
            await connection.close(GOING_AWAY, "the server stops")
        finally:
            gone.cancel()

    async def _receive(self, connection: ServerConnection) -> Data | None:
        """Return the next message; None: the server stops.

        Raises:
            RefusedError: there is none for too long.
        """
        if self._stopping.is_set():
            return None
        message = asyncio.ensure_future(connection.recv())
        stop = asyncio.ensure_future(self._stopping.wait())
        both: set[asyncio.Future[Any]] = {message, stop}
        try:
            done, _ = await asyncio.wait(both, timeout=self.limits.idle, return_when=asyncio.FIRST_COMPLETED)
            if message in done:
                return message.result()
            if stop in done:
                return None
            raise RefusedError(
                f"idle: expected a request within {self.limits.idle:g} s, got none; connect again"
            )
        finally:
            message.cancel()
            stop.cancel()

    async def _read(self, message: Data) -> Request | Told:
        """Return the request in a message; a large one is read in another thread."""
        if not isinstance(message, bytes):
            raise CodecError("message: expected a binary frame of msgpack, got text; use openpi-client")
        if len(message) <= INLINE:
            return self._decode(message)
        return await asyncio.to_thread(self._decode, message)

    def _decode(self, message: bytes) -> Request | Told:
        return self.served.interface.read(
            unpack(message, self.limits.message), lambda: self._seeds.getrandbits(63)
        )

    def _check_command(self, address: str, told: Told) -> None:
        """Raise RequestError if a command comes from an address that may not give it."""
        if told.command is None:
            return
        if self.learning is None:
            raise RequestError(
                f"{OWN}.command: expected a server that learns, got one that does not; start it with --learn"
            )
        if self._key is None and not is_loopback(address):
            raise RequestError(
                f"{OWN}.command: expected a key, or a client on the server's machine, got neither; start the "
                "server with a key"
            )

    async def _ask(self, request: Request, gone: asyncio.Future[None]) -> Answer:
        """Return what is decided; a request whose robot has gone is dropped."""
        answer = asyncio.ensure_future(self._batcher.submit(request))
        both: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise ConnectionClosed(None, None)
        finally:
            answer.cancel()

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        """Send a message; who does not read it in time is cut off."""
        try:
            async with asyncio.timeout(self.limits.send):
                await connection.send(message)
        except TimeoutError:
            connection.transport.abort()
            raise ConnectionClosed(None, None) from None

    async def _refuse(self, connection: ServerConnection, text: str) -> None:
        """Say why there is no answer, and close."""
        logger.info("refused: %s", text)
        with suppress(ConnectionClosed):
            await self._send(connection, text)
            await connection.close(FAULT, "see the text before")

    def _teller(self, robot: int, told: Told) -> Callable[[], dict[str, Any]]:
        """Return what takes in what a robot tells, or does what is commanded, in the worker thread."""

        def tell() -> dict[str, Any]:
            try:
                if told.command is not None and self.learning is not None:
                    return self.learning.command(told.command)
                if told.feedback is not None:
                    self.lanes.hear(robot, told.feedback)
                return dict(self.lanes.reply(robot))
            finally:
                self._look()

        return tell

    def _act(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        """Take in what the robots tell, then call the policy, in the worker thread."""
        refused = {i: error for i, request in enumerate(requests) if (error := self._hear(request))}
        asking = [request for i, request in enumerate(requests) if i not in refused]
        since, lost = time.monotonic(), self.served.trace.fallbacks
        decisions = self.served.act(asking) if asking else []
        seconds = time.monotonic() - since
        if self.learning is not None:
            self.learning.share.act(seconds)
        self.metrics.observe(decisions, seconds)
        self.metrics.fallbacks.inc(self.served.trace.fallbacks - lost)
        for request, decision in zip(asking, decisions, strict=True):
            if isinstance(decision, Decision):
                self.lanes.remember(request.robot, decision.seen)
                self._tell(request, decision)
        self._look()
        self.watch.observe(asking, decisions, self._learnt)
        made = iter(zip(asking, decisions, strict=True))
        answers: list[Answer | Exception] = []
        for i in range(len(requests)):
            if i in refused:
                answers.append(refused[i])
                continue
            request, decision = next(made)
            if isinstance(decision, Decision):
                answers.append(Answer(decision, seconds, self.lanes.reply(request.robot)))
            else:
                answers.append(decision)
        return answers

    def _hear(self, request: Request) -> Exception | None:
        """Take in what a robot tells with a request; return what is wrong with it."""
        try:
            if request.feedback is not None:
                self.lanes.hear(request.robot, request.feedback)
        except Exception as error:
            return error
        return None

    def _tell(self, request: Request, decision: Decision) -> None:
        if self.on_decision is not None:
            try:
                self.on_decision(request, decision)
            except Exception:  # of what watches; the robots go on
                logger.exception("on_decision")

    def _idle(self, waiting: bool) -> bool:
        """Learn a little, in the worker thread."""
        assert self.learning is not None
        try:
            return self.learning.slice(waiting)
        finally:
            self._look()

    def _look(self) -> None:
        """Note how far learning is, for others to see."""
        if self.learning is not None:
            self._learnt = self.learning.state()
            self.metrics.observe_learning(self._learnt)

    def _end(self, robot: int, success: bool, total: float, length: int) -> None:
        self.metrics.episodes.inc()
        self.metrics.successes.inc(success)
        self.watch.end(robot, success, total, length)

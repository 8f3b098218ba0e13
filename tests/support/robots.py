"""Robots for tests of the server: a policy of plain arithmetic, and clients that speak its protocol."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from qsteer.samplers import Euler
from qsteer.serving import Decision, Input, Interface, Request, Served, Server
from qsteer.serving.codec import pack, unpack

STATE = "observation.state"
INTERFACE = Interface({STATE: Input("numbers", (3,))}, {}, horizon=2, action_dim=3)


class Arithmetic(Served):
    """Adds the seed to the state; remembers the size of each call, and may take its time, or fail."""

    def __init__(self, seconds: float = 0.0, interface: Interface = INTERFACE) -> None:
        super().__init__(interface, None, Euler())
        self.seconds, self.calls = seconds, []
        self.go = threading.Event()
        self.go.set()

    def warm_up(self) -> None:
        pass

    def act(self, requests: Sequence[Request]) -> list[Decision | Exception]:
        self.calls.append(len(requests))
        self.go.wait()
        time.sleep(self.seconds)
        return [self.decide(request) for request in requests]

    def decide(self, request: Request) -> Decision | Exception:
        state = request.observation[STATE]
        if state[0] == 13:
            raise ZeroDivisionError("a secret of the server's")
        return Decision(np.tile(state + request.seed, (2, 1)), 1.0, 0.5, 0.1, None, request.seed)

    def _plan(self, requests: Any, rule: Any, sampler: Any) -> Any:
        raise AssertionError


def state(*numbers: float) -> np.ndarray:
    return np.array([*numbers, 0, 0, 0][:3], np.float32)


def observation(value: float = 0.0, **own: Any) -> dict[str, Any]:
    return {STATE: state(value), "qsteer": {"seed": 0} | own}


def request(value: float = 0.0, key: Any = None) -> Request:
    return Request({STATE: state(value)}, 0, key=key)


@asynccontextmanager
async def robot(server: Server, **options: Any) -> AsyncIterator[ClientConnection]:
    """A connection, after its metadata."""
    address = f"ws://127.0.0.1:{server.port}"
    async with connect(address, compression=None, max_size=None, proxy=None, **options) as connection:
        assert unpack(await connection.recv())["server"] == "qsteer"
        yield connection


async def ask(connection: ClientConnection, message: Any) -> Any:
    """The reply; of an error its text."""
    await connection.send(message if isinstance(message, bytes | str) else pack(message))
    reply = await connection.recv()
    return reply if isinstance(reply, str) else unpack(reply)


async def http(port: int, path: str, key: str | None = None) -> tuple[int, str]:
    """Status and body of a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    header = "" if key is None else f"Authorization: Api-Key {key}\r\n"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


def same(a: Decision | Exception, b: Decision | Exception, *, bits: bool) -> None:
    """Two decisions are equal, to the bit or up to rounding."""
    assert isinstance(a, Decision) and isinstance(b, Decision)
    for name, mine in a._asdict().items():
        its = getattr(b, name)
        if mine is None or bits:
            assert (mine is None) == (its is None) and np.array_equal(mine, its), name
        else:
            np.testing.assert_allclose(mine, its, rtol=2e-4, atol=2e-4, err_msg=name)


def requests_of(served: Served, count: int, twin: bool = False) -> list[Request]:
    """Requests with observations and seeds of their own."""
    found = [served.interface.example(seed) for seed in range(1, count + 1)]
    key = found[0].key
    return [replace(each, unsteered_twin=twin, key=key) for each in found]

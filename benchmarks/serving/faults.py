"""What a server of robots survives: floods, nonsense, robots that go, kills, stopped clocks, a full disk.

python benchmarks/serving/faults.py OUT [--only kills disk] [--scale 0.01]

From the root of the checkout. Each fault is brought about, often, at ``qsteer serve`` in a process of its own
(the policy of cube-single); a count that is not as it should be ends the run with an error. Results are added
to OUT. Needs ``qsteer[serve,dev]``; a full disk is made by a small file system, which only root may mount.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from qsteer.files import read_json, write_json
from qsteer.serving.codec import pack, unpack

CHECKPOINT = Path("examples/checkpoints/cube-single")
STATE, NUMBERS = "observation.state", 28
STEERED = ("--critic", str(CHECKPOINT / "critic"), "--rule", "qgf=0.06")
PLAIN = ("--max-rate", "1e6", "--max-message-mb", "1")
MEMORY = 24
"""MiB that a server may grow by, once it is warm, however much it is asked."""


class Body:
    """``qsteer serve`` in a process of its own."""

    def __init__(self, *options: str, code: str = "", out: Path | None = None) -> None:
        program = (
            f"{code}\nfrom qsteer.cli import main\nmain()" if code else "from qsteer.cli import main; main()"
        )
        command = [
            sys.executable,
            "-c",
            program,
            "serve",
            "--policy",
            str(CHECKPOINT / "policy"),
            "--port",
            "0",
        ]
        learns = () if out is None else ("--learn", str(out))
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*command, *STEERED, *PLAIN, *learns, *options],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.port, self.rows, self.updates = 0, 0, 0

    def listen(self) -> "Body":
        """Wait until it listens."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"learning: .*, (\d+) rows, (\d+) updates", line):
                self.rows, self.updates = map(int, found.groups())
            if line.startswith("listening: "):
                self.port = int(line.rsplit(":", 1)[1])
                return self
        raise SystemExit(f"the server did not start:\n{self.said()}")

    def said(self) -> str:
        """Return what it wrote to its log."""
        self.log.seek(0)
        return self.log.read()

    def memory(self) -> float:
        """Return its own memory in MiB, without mapped files."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+)", text)[0]) / 1024

    def files(self) -> int:
        """Return how many files and sockets it holds."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def get(self, path: str) -> str:
        """Return what it answers over HTTP."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        text = (await reader.read()).decode().partition("\r\n\r\n")[2]
        writer.close()
        return text

    async def count(self, name: str) -> float:
        """Return one of its metrics."""
        found = re.findall(rf"^{re.escape(name)} (\S+)$", await self.get("/metrics"), re.MULTILINE)
        return float(found[0]) if found else 0.0

    async def learning(self) -> dict[str, Any]:
        """Return how far its learning is."""
        return json.loads(await self.get("/state"))["learning"]

    def stop(self) -> int:
        """Ask it to stop; return its exit code."""
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def served(*options: str, **others: Any) -> Iterator[Body]:
    """A server that listens; at the end it must stop as it should, and its log be without a traceback."""
    body = Body(*options, **others)
    try:
        yield body.listen()
        expect(body.stop() == 0, f"the server to stop, got {body.process.returncode}:\n{body.said()}")
        expect("Traceback" not in body.said(), f"no traceback, got:\n{body.said()}")
    finally:
        body.process.kill()
        body.process.wait()


@asynccontextmanager
async def robot(body: Body, **options: Any) -> AsyncIterator[ClientConnection]:
    """A connection, after its metadata."""
    async with connect(
        f"ws://127.0.0.1:{body.port}", compression=None, proxy=None, max_size=None, **options
    ) as one:
        await one.recv()
        yield one


def state(seed: int = 0) -> np.ndarray:
    """Return an observation."""
    return np.random.default_rng(seed).normal(size=NUMBERS).astype(np.float32)


async def ask(one: ClientConnection, message: dict[str, Any]) -> dict[str, Any]:
    """Return the reply."""
    await one.send(pack(message))
    reply = await asyncio.wait_for(one.recv(), 60)
    expect(isinstance(reply, bytes), f"an answer, got {reply!r}")
    return unpack(reply)


def expect(holds: bool, what: str) -> None:
    """Raise SystemExit if something is not as it should be."""
    if not holds:
        raise SystemExit(f"expected {what}")


class Life:
    """A robot's episodes on a server that learns: ten rows each, every reward of its own.

    Attributes:
        acknowledged: rewards that the server has said are stored.
    """

    def __init__(self, numbers: Iterator[int], name: str) -> None:
        self.numbers, self.name, self.episode, self.row = numbers, name, 0, 0
        self.told: dict[str, Any] = {}
        self.waiting: list[float] = []
        self.acknowledged: list[float] = []
        self.stored = 0

    async def step(self, one: ClientConnection) -> dict[str, Any]:
        """Ask, execute, and at an episode's end tell; return the last reply."""
        own = {"episode": f"{self.name}-{self.episode}", **self.told}
        reply = await ask(one, {STATE: state(self.row), "qsteer": own})
        self.note(reply)
        reward = -next(self.numbers) / 2**22  # exact in float32, and in a row's sum
        self.told = {"rewards": [reward, *[0.0] * (len(reply["actions"]) - 1)]}
        self.waiting.append(reward)
        self.row += 1
        if self.row % 10 == 0:
            end = {"episode": own["episode"], **self.told, "done": True, "success": self.row % 20 == 0}
            self.told = {}
            reply = await ask(one, {"qsteer": end})
            self.note(reply)
            self.episode += 1
        return reply

    def note(self, reply: dict[str, Any]) -> None:
        """Take in how many rows are stored."""
        new = reply["stored"] - self.stored
        self.acknowledged += self.waiting[:new]
        self.waiting, self.stored = self.waiting[new:], reply["stored"]


def endurance(scale: float) -> dict[str, Any]:
    """Steered requests of 16 robots, one after the other, to one server."""
    total, robots, every = int(100_000 * scale), 16, max(1, int(5_000 * scale))

    async def live(body: Body) -> list[float]:
        done, memory = 0, []

        async def one(number: int) -> None:
            nonlocal done
            async with robot(body) as mine:
                for i in range(total // robots):
                    reply = await ask(mine, {STATE: state(i), "qsteer": {"seed": number}})
                    expect(reply["strength"] > 0, f"a steered reply, got {reply}")
                    done += 1
                    if done % every == 0:
                        memory.append(body.memory())

        await asyncio.gather(*map(one, range(robots)))
        return memory

    with served() as body:
        since = time.monotonic()
        memory = asyncio.run(live(body))
        seconds = time.monotonic() - since
    warm = memory[len(memory) // 10 :]
    grown = warm[-1] - warm[0]
    expect(grown < MEMORY, f"flat memory, got {memory}")
    return {
        "requests": total // robots * robots,
        "seconds": round(seconds),
        "memory_mib": memory,
        "grown_mib": grown,
    }


def nonsense() -> st.SearchStrategy[list[bytes | str]]:
    """Return messages of a connection: valid ones cut, bent, out of order and too large, and plain noise."""
    good = {STATE: state(), "prompt": "push"}
    numbers = st.integers() | st.floats() | st.booleans()
    leaves = st.none() | numbers | st.text(max_size=8) | st.binary(max_size=8)
    trees = st.recursive(
        leaves,
        lambda inside: (
            st.lists(inside, max_size=4)
            | st.dictionaries(st.text(max_size=8) | st.binary(max_size=8) | numbers, inside, max_size=4)
        ),
        max_leaves=12,
    )
    array = st.fixed_dictionaries(
        {
            b"__ndarray__": st.just(True) | leaves,
            b"data": st.binary(max_size=64) | st.just(bytes(4 * NUMBERS)),
            b"dtype": st.sampled_from(["<f4", ">f4", "<f8", "|O", "<U4", "<M8[s]", "|b1", "f4", ""]) | leaves,
            b"shape": st.lists(st.integers(-2, 2**63), max_size=4) | st.just([NUMBERS]) | leaves,
        }
    )
    names = st.sampled_from(
        ["episode", "rewards", "done", "truncated", "success", "seed", "unsteered_twin", "command", "x"]
    )
    flags = st.booleans() | leaves
    feedback = st.fixed_dictionaries(
        {"episode": st.sampled_from(["a", "b", 1])},
        optional={
            "rewards": st.lists(st.floats(-1, 1) | st.just(1e30), max_size=6) | leaves,
            "done": flags,
            "truncated": flags,
            "success": flags,
        },
    )
    own = st.dictionaries(names, trees, max_size=4) | feedback | trees
    requests = st.builds(lambda o: pack({**good, "qsteer": o}), own.filter(packable))
    told = st.builds(lambda o: pack({"qsteer": o}), own.filter(packable))
    bent = st.builds(
        lambda a, o: pack({STATE: a, **o}), array.filter(packable), st.just({}) | st.just({"prompt": 3})
    )
    whole = st.just(pack(good))
    cut = st.builds(lambda m, n: m[: n % (len(m) + 1)], requests, st.integers(0, 400))
    flipped = st.builds(flip, requests, st.integers(0), st.integers(1, 255))
    deep = st.builds(lambda n: b"\x91" * n + b"\xc0", st.integers(1, 3000))
    long = st.builds(lambda n: b"\xdc\xff\xff" + b"\xc0" * n, st.integers(0, 70_000))
    large = st.builds(lambda n: pack({**good, "image": bytes(n)}), st.integers(2**20 - 300, 3 * 2**20))
    noise = st.binary(max_size=300) | st.text(max_size=100)
    usual = st.one_of(requests, told, bent, cut, flipped, whole, noise, trees.filter(packable).map(pack))
    rare = st.integers(0, 19).flatmap(lambda n: st.one_of(deep, long, large) if n == 0 else usual)
    return st.lists(rare, min_size=1, max_size=5)


def packable(tree: Any) -> bool:
    """Return whether msgpack takes it."""
    try:
        pack(tree)
    except (ValueError, OverflowError, TypeError, RecursionError, UnicodeError):
        return False
    return True


def flip(message: bytes, place: int, bits: int) -> bytes:
    """Return a message with one byte changed."""
    place %= len(message)
    return message[:place] + bytes([message[place] ^ bits]) + message[place + 1 :]


def malformed(scale: float) -> dict[str, Any]:
    """Messages that hypothesis makes up, to a server that learns, while another robot goes on."""
    total, found = int(10_000 * scale), Counter[str]()

    async def send(body: Body, messages: Sequence[bytes | str]) -> None:
        async with robot(body) as one:
            for message in messages:
                found["sent"] += 1
                try:
                    await one.send(message)
                    reply = await asyncio.wait_for(one.recv(), 30)
                except ConnectionClosed as closed:
                    code = closed.rcvd.code if closed.rcvd else None
                    expect(code in (1009, 1011), f"1009 or 1011, got {closed!r} after {message!r}")
                    found["too large"] += 1
                    return
                if isinstance(reply, str):
                    expect(
                        "expected" in reply and "Traceback" not in reply, f"what was expected, got {reply!r}"
                    )
                    expect(
                        "fault of its own" not in reply, f"no fault of the server's, got {message!r}: {reply}"
                    )
                    found["refused"] += 1
                    return
                answer = unpack(reply)
                known = {"actions", "stored", "command"} & answer.keys() or not answer
                expect(bool(known), f"an answer to {message!r}, got {answer}")
                expect(bool(np.isfinite(answer.get("actions", 0.0)).all()), f"finite actions, got {answer}")
                found["answered"] += 1

    async def live(body: Body) -> dict[str, Any]:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        life = Life(iter(range(10**6)), "good")

        async def good() -> None:
            async with robot(body) as one:
                while not over.is_set():
                    await life.step(one)
                    await asyncio.sleep(0.05)

        async with robot(body) as one:
            before = await ask(one, {STATE: state(), "qsteer": {"seed": 7}})
            beside = asyncio.create_task(good())
            while found["sent"] < total:

                @settings(
                    max_examples=500, database=None, deadline=None, suppress_health_check=list(HealthCheck)
                )
                @given(nonsense())
                def fuzz(messages: list[bytes | str]) -> None:
                    if found["sent"] < total:
                        asyncio.run_coroutine_threadsafe(send(body, messages), loop).result(60)

                await asyncio.to_thread(fuzz)
                if "memory" not in told:
                    told["memory"], told["files"] = body.memory(), body.files()
            over.set()
            await beside
            after = await ask(one, {STATE: state(), "qsteer": {"seed": 7}})
        same = bool((before["actions"] == after["actions"]).all())
        expect(same, "the same reply before and after")
        faults = await body.count('qsteer_requests_total{outcome="fault"}')
        learnt = await body.learning()
        expect(faults == 0 and learnt["fault"] is None, f"no fault, got {faults}, {learnt['fault']}")
        expect(
            len(life.acknowledged) >= life.row - 1,
            f"{life.row} rows of the good robot, got {len(life.acknowledged)}",
        )
        return {"same_reply": same, "faults": int(faults), "good_robot_rows": len(life.acknowledged)}

    told: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as out,
        served("--robots", "4", "--warmup", "1000000", out=Path(out) / "run") as body,
    ):
        report = asyncio.run(live(body))
        grown, files = body.memory() - told["memory"], body.files() - told["files"]
    expect(
        grown < MEMORY and files <= 2, f"flat memory and no files left open, got {grown} MiB, {files} files"
    )
    return {**found, **report, "grown_mib": grown, "files_left": files}


def disconnects(scale: float) -> dict[str, Any]:
    """Robots that go at any moment of a conversation, while two others go on."""
    total, how = int(200 * scale), Counter[str]()

    async def go(body: Body, number: int, draw: random.Random) -> None:
        """Begin a conversation, and break it off."""
        way = ("handshake", "frame", "request", "episode", "close")[number % 5]
        how[way] += 1
        if way in ("handshake", "frame"):
            reader, writer = await asyncio.open_connection("127.0.0.1", body.port)
            head = (
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            writer.write(head[: draw.randrange(len(head))] if way == "handshake" else head)
            if way == "frame":
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"\x82\xfe\x10\x00abcd" + bytes(draw.randrange(4096)))  # of 4096 bytes
            await writer.drain()
            linger = socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, *linger)  # a reset, not an end
            writer.close()
            return
        async with robot(body) as one:
            life = Life(iter(range(number * 100, number * 100 + 100)), f"goes{number}")
            for _ in range(draw.randrange(3)):
                await life.step(one)
            if way != "close":
                await one.send(pack({STATE: state(), "qsteer": {"episode": life.episode, **life.told}}))
                await asyncio.sleep(draw.random() * 0.03 if way == "episode" else 0)
                one.transport.abort()

    async def live(body: Body) -> dict[str, Any]:
        over, lives = (
            asyncio.Event(),
            [Life(iter(range(10**5 * i, 10**5 * (i + 1))), f"stays{i}") for i in (1, 2)],
        )
        draw = random.Random(0)

        async def stay(life: Life) -> None:
            async with robot(body) as one:
                while not over.is_set():
                    reply = await life.step(one)
                    expect("note" not in reply, f"an episode that nobody cuts, got {reply}")

        staying = [asyncio.create_task(stay(life)) for life in lives]
        await asyncio.sleep(0.5)
        for number in range(total):
            await go(body, number, draw)
            if number == total // 10:
                told["memory"], told["files"] = body.memory(), body.files()
        await asyncio.sleep(1.0)
        left = await body.count("qsteer_connections")
        expect(left == 2, f"2 robots connected, got {left}")
        over.set()
        await asyncio.gather(*staying)
        lost = sum(life.row - len(life.acknowledged) - bool(life.told) for life in lives)
        expect(lost == 0, f"no row of those who stayed lost, got {lost}")
        async with robot(body) as one:  # all lanes but those of nobody are free
            await Life(iter(range(5)), "new").step(one)
        faults = await body.count('qsteer_requests_total{outcome="fault"}')
        expect(faults == 0, f"no fault, got {faults}")
        return {
            "rows_of_those_who_stayed": sum(life.row for life in lives),
            "their_rows_lost": lost,
            "faults": 0,
        }

    told: dict[str, float] = {}
    options = "--robots", "4", "--warmup", "1000000"
    with tempfile.TemporaryDirectory() as out, served(*options, out=Path(out) / "run") as body:
        report = asyncio.run(live(body))
        grown, files = body.memory() - told["memory"], body.files() - told["files"]
    expect(
        grown < MEMORY and files <= 2, f"flat memory and no files left open, got {grown} MiB, {files} files"
    )
    return {"disconnects": dict(how), **report, "grown_mib": grown, "files_left": files}


def kills(scale: float) -> dict[str, Any]:
    """Kill -9 under the load of four robots, also while starting; then all that was acknowledged is there."""
    total, draw = int(50 * scale), random.Random(0)
    numbers = iter(range(1, 2**22))
    acknowledged: list[float] = []
    starting, made = 0, [0]

    async def load(body: Body, life: int) -> None:
        lives = [Life(numbers, f"life{life}-{i}") for i in range(4)]

        async def one(mine: Life) -> None:
            with suppress(ConnectionClosed, OSError, InvalidHandshake):
                async with robot(body) as connection:
                    while True:
                        await mine.step(connection)

        robots = asyncio.gather(*map(one, lives))
        await asyncio.sleep(0.5 + 3 * draw.random())
        made.append((await body.learning())["updates"] - body.updates)
        body.process.send_signal(signal.SIGKILL)
        await robots
        for each in lives:
            expect(each.row > 0, "a restart that answers, got none")
            acknowledged.extend(each.acknowledged)

    options = "--robots", "4", "--warmup", "200", "--updates-per-step", "0.2"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        for life in range(total):
            body = Body(*options, out=out)
            if life % 5 == 4:  # not yet listening
                time.sleep(draw.uniform(0.5, 5.0))
                starting += 1
                body.process.kill()
            else:
                body.listen()
                expect(body.rows >= len(acknowledged), f"{len(acknowledged)} rows, got {body.rows}")
                expect(body.updates >= (last := saved(out)), f"{last} updates or more, got {body.updates}")
                asyncio.run(load(body, life))
            body.process.wait()
            expect("Traceback" not in body.said(), f"no traceback, got:\n{body.said()}")
        body = Body(*options, out=out).listen()
        rows, resumed = body.rows, body.updates
        learnt = asyncio.run(body.learning())
        expect(learnt["fault"] is None and learnt["healthy"], f"a learner that is well, got {learnt}")
        body.stop()
        kept = {float(reward) for reward in stored_rewards(out)}
    missing = [reward for reward in acknowledged if reward not in kept]
    expect(not missing, f"all {len(acknowledged)} acknowledged transitions, got {len(missing)} missing")
    expect(sum(made) > 0, "a learner that goes on, got no update")
    return {
        "kills": total,
        "while_starting": starting,
        "acknowledged": len(acknowledged),
        "missing": 0,
        "rows": rows,
        "updates_made": sum(made),
        "updates_resumed": resumed,
    }


def saved(out: Path) -> int:
    """Return the number of the gradient step whose checkpoint a run holds."""
    if not (path := out / "checkpoint.safetensors").exists():
        return 0
    with safe_open(path, "np") as file:
        return int(file.metadata()["step"])


def stored_rewards(out: Path) -> np.ndarray:
    """Return the rewards of all rows in a run."""
    from qsteer.data.layout import Layout
    from qsteer.data.replay import Replay

    replay = Replay(Layout(**read_json(out / "replay" / "layout.json")), directory=out / "replay")
    rewards = replay.rewards().numpy()
    replay.close()
    return rewards


def slow(scale: float) -> dict[str, Any]:
    """Clients that never read, that send a byte at a time, that never finish a handshake; others go on."""
    seconds = max(5.0, 40.0 * scale)

    async def mute(body: Body) -> float | None:
        """Ask without reading; return the seconds until the server has had enough."""
        since = time.monotonic()
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        own.connect(("127.0.0.1", body.port))
        own.setblocking(False)
        async with connect(
            f"ws://127.0.0.1:{body.port}",
            sock=own,
            compression=None,
            proxy=None,
            max_queue=1,
            ping_interval=None,
        ) as one:
            await one.recv()
            one.transport.pause_reading()
            message = pack({STATE: state(), "qsteer": {"unsteered_twin": True}})
            try:
                while time.monotonic() < since + 4 * seconds:
                    await asyncio.wait_for(one.send(message), 1)
            except (ConnectionClosed, TimeoutError):
                pass
            while (await body.count("qsteer_connections")) > 1 and time.monotonic() < since + 6 * seconds:
                await asyncio.sleep(0.5)
            gone = (await body.count("qsteer_connections")) <= 1
            one.transport.abort()
        return time.monotonic() - since if gone else None

    async def trickle(body: Body) -> float:
        """Send a request byte by byte; return the seconds until it is answered."""
        since = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", body.port)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        message = pack({STATE: state()})
        frame = b"\x82\xfe" + len(message).to_bytes(2, "big") + bytes(4) + message
        await asyncio.sleep(0.1)
        for byte in frame:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(seconds / 4 / len(frame))
        await asyncio.wait_for(reader.read(2**16), 30)
        writer.close()
        return time.monotonic() - since

    async def handshakes(body: Body, count: int) -> int:
        """Open connections that say nothing; return how many the server closes at its limit of 10 s."""
        streams = [await asyncio.open_connection("127.0.0.1", body.port) for _ in range(count)]
        closed = 0
        for reader, writer in streams:
            with suppress(TimeoutError):
                closed += await asyncio.wait_for(reader.read(), 15) == b"" or reader.at_eof()
            writer.close()
        return closed

    async def measure(body: Body, over: Callable[[], bool]) -> list[float]:
        found = []
        async with robot(body) as one:
            while not over():
                since = time.monotonic()
                await ask(one, {STATE: state()})
                found.append(time.monotonic() - since)
                await asyncio.sleep(0.02)
        return found

    async def live(body: Body) -> dict[str, Any]:
        end = time.monotonic() + seconds / 4
        alone = await measure(body, lambda: time.monotonic() > end)
        others = asyncio.gather(trickle(body), handshakes(body, 50))
        beside = await measure(body, others.done)
        trickled, closed = others.result()
        silent = asyncio.create_task(mute(body))
        beside_mute = await measure(body, silent.done)
        cut = silent.result()
        expect(closed == 50, f"50 silent connections closed, got {closed}")
        expect(cut is not None, "a client that does not read to be cut off, got one that stays")
        p95 = [float(np.percentile(each, 95)) * 1e3 for each in (alone, beside, beside_mute)]
        return {
            "trickled_request_answered_s": trickled,
            "silent_handshakes_closed": closed,
            "mute_client_cut_after_s": cut,
            "p95_ms_alone": p95[0],
            "p95_ms_beside_slow": p95[1],
            "p95_ms_beside_mute": p95[2],
        }

    with served() as body:
        return asyncio.run(live(body))


CLOCK = """
import random, time
real, draw = time.time, random.Random(0)
time.time = lambda: real() + draw.choice((-1, 1)) * draw.expovariate(1 / 86400)
"""
"""Puts before a server's start a wall clock that jumps by a day or so, back and forth, at each look."""


def clocks(scale: float) -> dict[str, Any]:
    """A wall clock that jumps at each look, and a process that is stopped for a while, as a laptop is."""
    total, pauses = int(2_000 * scale), (2.0, 35.0) if scale >= 1 else (1.0,)

    async def live(body: Body) -> dict[str, Any]:
        life, paused = Life(iter(range(10**6)), "r"), []
        async with robot(body, ping_interval=None) as one:
            for _ in range(total):
                expect("note" not in await life.step(one), "no note")
        for pause in pauses:
            async with robot(body, ping_interval=None) as one:
                await ask(one, {STATE: state()})
                await one.send(pack({STATE: state()}))
                body.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(pause)
                body.process.send_signal(signal.SIGCONT)
                since = time.monotonic()
                try:
                    reply = await asyncio.wait_for(one.recv(), 30)
                    paused.append("answered" if isinstance(reply, bytes) else reply)
                except ConnectionClosed as closed:
                    paused.append(f"closed, {closed.rcvd.code if closed.rcvd else None}")
            async with robot(body) as one:
                await ask(one, {STATE: state()})
            expect(time.monotonic() - since < 10, "an answer to the next robot at once")
        learnt = await body.learning()
        expect(learnt["fault"] is None, f"no fault, got {learnt['fault']}")
        return {
            "requests": life.row,
            "rows": len(life.acknowledged),
            "updates": learnt["updates"],
            "stopped_for_s": dict(zip(map(str, pauses), paused, strict=True)),
        }

    options = "--robots", "1", "--warmup", "100", "--updates-per-step", "0.05"
    with tempfile.TemporaryDirectory() as out, served(*options, code=CLOCK, out=Path(out) / "run") as body:
        return asyncio.run(live(body))


def disk(scale: float) -> dict[str, Any]:
    """A disk that is full while the server learns, and is freed again."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], stderr=-3).returncode:
            return {"skipped": "mounting a file system is for root"}
        try:
            return fill_up(Path(folder), int(10 * scale) or 1)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def fill_up(folder: Path, times: int) -> dict[str, Any]:
    """Fill a disk up and free it, a few times."""
    counts = Counter[str]()

    async def until(
        body: Body, life: Life, one: ClientConnection, holds: Callable[[dict[str, Any]], bool]
    ) -> None:
        for i in range(20_000):
            await life.step(one)
            counts["requests"] += 1
            if i % 20 == 0:
                learnt = await body.learning()
                expect(learnt["fault"] is None, f"a learner that goes on, got {learnt['fault']}")
                if holds(learnt):
                    return
                await asyncio.sleep(0.02)
        raise SystemExit(f"expected the disk to be noticed, got {learnt}")

    async def live(body: Body) -> None:
        life, ballast = Life(iter(range(1, 2**22)), "r"), folder / "ballast"
        async with robot(body) as one:
            await until(body, life, one, lambda learnt: learnt["updates"] > 50)
            for _ in range(times):
                with suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(2**16))
                full = len(life.acknowledged)
                await until(body, life, one, lambda learnt: learnt["unwritten"] is not None)
                counts["full"] += 1
                made = (await body.learning())["updates"]
                await until(body, life, one, lambda learnt: learnt["updates"] > made)  # noqa: B023
                counts["rows_while_full"] += len(life.acknowledged) - full
                ballast.unlink()
                await until(body, life, one, lambda learnt: learnt["unwritten"] is None)
        rewards.extend(life.acknowledged)

    rewards: list[float] = []
    options = "--robots", "1", "--warmup", "100", "--updates-per-step", "0.1", "--capacity", "60000"
    with served(*options, out=folder / "run") as body:
        asyncio.run(live(body))
    missing = {*rewards} - {float(reward) for reward in stored_rewards(folder / "run")}
    expect(not missing, f"all {len(rewards)} rows, got {len(missing)} missing")
    for line in (folder / "run" / "metrics.jsonl").open():
        json.loads(line)
    return {**counts, "acknowledged": len(rewards), "missing": 0}


DIVERGE = """
import torch
from qsteer.online.learner import OnlineLearner
step, made = OnlineLearner.step, []
def diverge(self):
    info = step(self)
    made.append(0)
    if len(made) % 200 == 0:
        with torch.no_grad():
            for p in self.learner.critic.parameters():
                p.mul_(float("nan") if len(made) % 400 else 1e6)
    return info
OnlineLearner.step = diverge
"""
"""Makes the critic diverge at every 200th gradient step: to NaN, and to a million times its weights."""


def divergence(scale: float) -> dict[str, Any]:
    """A critic that diverges, again and again, while it serves."""
    wanted = max(1, int(20 * scale))

    async def live(body: Body) -> dict[str, Any]:
        life, seen = Life(iter(range(1, 2**22)), "r"), Counter[str]()
        async with robot(body) as one:
            while True:
                reply = await life.step(one)
                if "actions" not in reply:
                    continue
                seen["requests"] += 1
                expect(bool(np.isfinite(reply["actions"]).all()), f"finite actions, got {reply}")
                seen["steered" if reply["strength"] else "unsteered"] += 1
                expect(
                    bool(reply["strength"]) or reply["displacement"] in (0, None),
                    f"the frozen policy's, got {reply}",
                )
                if seen["requests"] % 50 == 0:
                    learnt = await body.learning()
                    expect(learnt["fault"] is None, f"a learner that goes on, got {learnt['fault']}")
                    if learnt["trips"] >= wanted:
                        return {"divergences": learnt["trips"], **seen, "updates": learnt["updates"]}
                    expect(seen["requests"] < 10**6, f"{wanted} divergences, got {learnt}")

    options = "--robots", "1", "--warmup", "500", "--updates-per-step", "1"
    with tempfile.TemporaryDirectory() as out, served(*options, code=DIVERGE, out=Path(out) / "run") as body:
        return asyncio.run(live(body))


def two_servers(scale: float) -> dict[str, Any]:
    """A second server on a run directory that one has open."""
    times, refused = max(1, int(10 * scale)), 0
    with tempfile.TemporaryDirectory() as folder, served(out=Path(folder) / "run") as body:

        async def once() -> None:
            async with robot(body) as one:
                await Life(iter(range(100)), "r").step(one)

        for _ in range(times):
            second = Body(out=Path(folder) / "run")
            code = second.process.wait(60)
            said = second.said()
            expect(code != 0 and "nothing else has open" in said, f"a refusal, got {code}: {said}")
            refused += 1
            asyncio.run(once())
    return {"refused": refused, "last_line": said.strip().splitlines()[-1].replace(folder, "...")}


FAULTS: dict[str, Callable[[float], dict[str, Any]]] = {
    each.__name__: each
    for each in (endurance, malformed, disconnects, kills, slow, clocks, disk, divergence, two_servers)
}


def main() -> None:
    """Bring the faults about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts")
    args = parser.parse_args()
    found = read_json(args.out) if args.out.exists() else {}
    for name in args.only:
        since = time.monotonic()
        report = FAULTS[name](args.scale)
        found[name] = {"scale": args.scale, **report, "wall_s": round(time.monotonic() - since, 1)}
        print(json.dumps({name: found[name]}), flush=True)
        write_json(found, args.out)


if __name__ == "__main__":
    main()

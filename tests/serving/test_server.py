"""The protocol over real sockets: many robots, misuse, faults, and an event loop that never waits."""

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from robots import STATE, Arithmetic, ask, http, observation, robot
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus

from qsteer.cli.serve import read_tls
from qsteer.serving import BatchLimits, Server, ServerLimits
from qsteer.serving.codec import CodecLimits, pack, unpack


def run(
    test: Callable[[Server, Arithmetic], Coroutine[Any, Any, None]],
    served: Arithmetic | None = None,
    **options: Any,
) -> Arithmetic:
    """Run a test against a server at a free port."""
    served = served or Arithmetic()

    async def main() -> None:
        async with Server(served, port=0, **options) as server:
            try:
                await test(server, served)
            finally:
                served.go.set()

    asyncio.run(asyncio.wait_for(main(), 60))
    return served


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_requests_and_replies() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            first = await ask(one, observation(2.0, seed=5))
            assert first["actions"].dtype == np.float32 and first["actions"].tolist() == [[7, 5, 5]] * 2
            assert (first["value"], first["disagreement"], first["strength"]) == (1.0, 0.5, 0.1)
            assert "displacement" not in first and first["seed"] == 5
            assert first["policy_timing"]["infer_ms"] <= first["server_timing"]["infer_ms"]
            assert "prev_total_ms" not in first["server_timing"]
            again = await ask(one, observation(2.0, seed=5))
            assert again["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
            plain = await ask(one, {STATE: np.zeros(3, np.float32)})
            assert np.allclose(plain["actions"], np.float32(plain["seed"]))

    run(test)


def test_seeds_that_the_server_draws_are_its_own_generators() -> None:
    seeds = []

    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            reply = await ask(one, {STATE: np.zeros(3)})
            seeds.append(reply["seed"])

    run(test, seed=1)
    run(test, seed=1)
    run(test)
    assert seeds[0] == seeds[1] == random.Random(1).getrandbits(63) != seeds[2]


def test_robots_that_wait_share_a_call() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async def live(number: int) -> list[Any]:
            async with robot(server) as one:
                await until(lambda: len(server._robots) == 8)
                return [await ask(one, observation(number, seed=number * i)) for i in range(5)]

        replies = await asyncio.gather(*map(live, range(8)))
        for number, mine in enumerate(replies):
            for i, reply in enumerate(mine):
                assert np.array_equal(reply["actions"][0], np.array([number, 0, 0]) + number * i)

    served = run(test, Arithmetic(0.02), batching=BatchLimits(wait=0.5))
    assert sum(served.calls) == 40 and len(served.calls) < 25 and max(served.calls) > 4


def test_health_and_metrics_answer_during_a_call() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            served.go.clear()
            reply = asyncio.create_task(ask(one, observation()))
            await until(lambda: bool(served.calls))
            since = time.monotonic()
            assert await http(server.port, "/healthz") == (200, "OK\n")
            status, text = await http(server.port, "/metrics")
            async with robot(server):
                pass
            assert time.monotonic() - since < 5 and not reply.done()
            assert status == 200 and "qsteer_connections 1.0" in text
            served.go.set()
            await reply

    run(test)


def test_metrics_count() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            for _ in range(3):
                await ask(one, observation())
            assert isinstance(await ask(one, {}), str)
        _, text = await http(server.port, "/metrics")
        for line in (
            'qsteer_requests_total{outcome="answered"} 3.0',
            'qsteer_requests_total{outcome="refused"} 1.0',
            "qsteer_request_seconds_count 3.0",
            "qsteer_call_seconds_count 3.0",
            "qsteer_batch_rows_sum 3.0",
            "qsteer_queue 0.0",
            "qsteer_value 1.0",
            "qsteer_disagreement 0.5",
            "qsteer_strength 0.1",
            "qsteer_fallbacks_total 0.0",
            "qsteer_episodes_total 0.0",
            "qsteer_successes_total 0.0",
        ):
            assert f"{line}\n" in text

    run(test)


def test_a_page_of_a_browser_is_not_let_in() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        with pytest.raises(InvalidStatus) as caught:
            async with robot(server, origin="http://evil.example"):
                pass
        assert caught.value.response.status_code == 403

    run(test)


async def refused(server: Server, message: Any, match: str) -> None:
    """A message is answered by a text, after which the connection is closed with 1011."""
    async with robot(server) as one:
        text = await ask(one, message)
        assert isinstance(text, str) and match in text and len(text) < 400 and "Traceback" not in text
        with pytest.raises(ConnectionClosed) as closed:
            await one.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011


def test_misuse_is_a_text_that_says_what_was_expected() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        await refused(server, {}, "expected ['observation.state'], got no ['observation.state']")
        await refused(server, "text", "expected a binary frame")
        await refused(server, b"\xc1", "expected msgpack")
        await refused(server, observation(sed=3), "expected a map of seed")
        await refused(server, {STATE: np.zeros(2)}, "expected shape (3,), got (2,)")
        pickled = {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [0]}
        await refused(server, msgpack.packb({STATE: pickled}), "expected a dtype of")
        async with robot(server) as one:  # nobody else is disturbed
            assert (await ask(one, observation()))["seed"] == 0

    run(test)


def test_a_fault_of_the_servers_is_a_number_in_its_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            served.go.clear()
            other = asyncio.create_task(ask(one, observation(1.0)))
            await until(lambda: bool(served.calls))
            async with robot(server) as bad, robot(server) as good:
                tasks = [asyncio.create_task(ask(c, observation(v))) for c, v in ((bad, 13.0), (good, 2.0))]
                await until(lambda: server._batcher.waiting == 2)
                served.go.set()
                text, reply = await asyncio.gather(*tasks)
            assert "fault of its own" in text and "secret" not in text
            assert text.rpartition(" ")[2] in caplog.text and "a secret of the server's" in caplog.text
            assert reply["actions"][0, 0] == 2 and (await other)["actions"][0, 0] == 1

    run(test)


def test_a_key_is_asked_for_by_all_but_health() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Bearer s3cret"}):
            with pytest.raises(InvalidStatus) as caught:
                async with robot(server, additional_headers=headers):
                    pass
            assert caught.value.response.status_code == 401
        async with robot(server, additional_headers={"Authorization": "Api-Key s3cret"}) as one:
            assert (await ask(one, observation()))["seed"] == 0
        assert (await http(server.port, "/healthz"))[0] == 200
        assert (await http(server.port, "/metrics"))[0] == 401
        assert (await http(server.port, "/metrics", "s3cret"))[0] == 200

    run(test, key="s3cret")


def test_tls_from_the_files_of_the_command(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    known, unknown = ssl.create_default_context(), ssl.create_default_context()
    authority.configure_trust(known)

    async def test(server: Server, served: Arithmetic) -> None:
        address, key = f"wss://127.0.0.1:{server.port}", {"Authorization": "Api-Key s3cret"}
        async with connect(address, ssl=known, additional_headers=key, proxy=None) as one:
            assert unpack(await one.recv())["server"] == "qsteer"
            assert (await ask(one, observation(2.0)))["actions"][0, 0] == 2
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(address, ssl=unknown, additional_headers=key, proxy=None)
        with pytest.raises(InvalidMessage):  # in clear
            await connect(address.replace("wss", "ws"), additional_headers=key, proxy=None)
        with pytest.raises(InvalidStatus, match="401"):
            await connect(address, ssl=known, proxy=None)

    run(test, key="s3cret", tls=read_tls(tmp_path / "chain.pem", tmp_path / "key.pem"))


def test_a_message_that_is_too_large() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            await one.send(bytes(5000))
            with pytest.raises(ConnectionClosed) as closed:
                await one.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        async with robot(server) as one:
            assert (await ask(one, observation()))["seed"] == 0

    run(test, limits=ServerLimits(message=CodecLimits(bytes=4096)))


def test_a_large_message_is_read_in_another_thread() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            film = np.zeros(2**20, np.uint8)
            assert (await ask(one, observation() | {"film": film}))["seed"] == 0
            assert "got no" in await ask(one, {"film": film})

    run(test)


def test_too_many_requests_a_second() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            replies = [await ask(one, observation()) for _ in range(3)]
            assert all(isinstance(reply, dict) for reply in replies)
            assert "at most 3 requests a second" in await ask(one, observation())

    run(test, limits=ServerLimits(rate=3.0))


def test_too_many_robots() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server), robot(server):
            with pytest.raises(InvalidStatus) as caught:
                async with robot(server):
                    pass
            assert caught.value.response.status_code == 503
        await until(lambda: not server._robots)
        async with robot(server) as one:
            assert (await ask(one, observation()))["seed"] == 0

    run(test, limits=ServerLimits(connections=2))


def test_a_robot_that_says_nothing() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            assert "within 0.2 s" in str(await one.recv())

    run(test, limits=ServerLimits(idle=0.2))


def test_a_robot_that_goes_costs_no_call() -> None:
    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as stays:
            served.go.clear()
            reply = asyncio.create_task(ask(stays, observation()))
            await until(lambda: bool(served.calls))
            async with robot(server) as goes:
                await goes.send(pack(observation()))
                await until(lambda: server._batcher.waiting == 1)
                goes.transport.abort()
            await until(lambda: server._batcher.waiting == 0 and len(server._robots) == 1)
            served.go.set()
            assert (await reply)["seed"] == 0

    assert run(test).calls == [1]


def test_a_robot_that_does_not_read_is_cut_off() -> None:
    large = 2**20

    async def test(server: Server, served: Arithmetic) -> None:
        served.decide = lambda request: Arithmetic.decide(served, request)._replace(  # type: ignore[method-assign]
            actions=np.zeros((large, 3), np.float32)
        )
        async with robot(server, max_queue=1) as one:
            await one.send(pack(observation()))
            one.transport.pause_reading()
            await until(lambda: not server._robots)
            one.transport.abort()
        async with robot(server):
            pass

    run(test, limits=ServerLimits(send=0.5))


def test_what_watches_sees_requests_and_decisions(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def watch(request: Any, decision: Any) -> None:
        seen.append((request.observation[STATE][0], decision.seed))
        raise ValueError("of what watches")

    async def test(server: Server, served: Arithmetic) -> None:
        async with robot(server) as one:
            await ask(one, observation(1.0, seed=4))
            await ask(one, observation(2.0, seed=5))

    run(test, on_decision=watch)
    assert seen == [(1.0, 4), (2.0, 5)] and "of what watches" in caplog.text


def test_stopping_answers_what_was_taken_and_closes_with_1001() -> None:
    codes = []

    async def main() -> None:
        served = Arithmetic()
        server = await Server(served, port=0).__aenter__()
        async with robot(server) as idle, robot(server) as asks:
            served.go.clear()
            reply = asyncio.create_task(ask(asks, observation(3.0)))
            await until(lambda: bool(served.calls))
            port = server.port
            stopping = asyncio.create_task(server.__aexit__())
            with pytest.raises(ConnectionClosed) as closed:
                await idle.recv()
            codes.append(closed.value.rcvd.code)
            with pytest.raises(OSError):
                await http(port, "/healthz")
            assert not stopping.done()
            served.go.set()
            assert (await reply)["actions"][0, 0] == 3
            with pytest.raises(ConnectionClosed) as closed:
                await asks.recv()
            codes.append(closed.value.rcvd.code)
            await stopping

    asyncio.run(asyncio.wait_for(main(), 60))
    assert codes == [1001, 1001]


def test_addresses_beyond_this_machine_need_a_key(caplog: pytest.LogCaptureFixture) -> None:
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(ValueError, match="expected a loopback address without a key"):
            Server(Arithmetic(), host=host)
    for host in ("127.0.0.1", "localhost", "::1"):
        Server(Arithmetic(), host=host)
    assert not caplog.text
    Server(Arithmetic(), host="0.0.0.0", insecure=True)
    assert "without a key" in caplog.text
    Server(Arithmetic(), host="0.0.0.0", key="k")
    assert "the key travels in clear" in caplog.text
    with pytest.raises(ValueError, match="expected an address"):
        Server(Arithmetic(), host="no such host.")
    for key in ("", " k", "k\n", "é"):
        with pytest.raises(ValueError, match="key: expected printable ASCII"):
            Server(Arithmetic(), key=key)


def test_no_bytes_bring_the_server_down() -> None:
    frames = (
        st.binary(max_size=200) | st.text(max_size=50) | st.dictionaries(st.text(), st.binary()).map(pack)
    )

    async def test(server: Server, served: Arithmetic) -> None:
        loop = asyncio.get_running_loop()

        async def send(frame: bytes | str) -> None:
            async with robot(server) as one:
                assert isinstance(await ask(one, frame), str)

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(frames)
        def fuzz(frame: bytes | str) -> None:
            asyncio.run_coroutine_threadsafe(send(frame), loop).result(30)

        await asyncio.to_thread(fuzz)
        async with robot(server) as one:
            assert (await ask(one, observation()))["seed"] == 0

    run(test)

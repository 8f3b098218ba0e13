"""openpi's own client, unmodified, in an environment of its own, on numpy 1.26 and 2."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from robots import STATE, Arithmetic

from qsteer.serving import Server

pytestmark = pytest.mark.slow

PINNED = ("openpi-client==0.1.2", "typing-extensions", "numpy==1.26.4")  # which it does not declare
NUMPY_2 = ("numpy>=2", "msgpack", "websockets", "typing-extensions")
"""openpi-client says numpy<2, and runs on 2."""
CLIENT = """
import sys, numpy, urllib.request
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port, major = int(sys.argv[1]), sys.argv[2]
assert numpy.__version__.startswith(major), numpy.__version__
policy = WebsocketClientPolicy("127.0.0.1", port, api_key="s3cret")
assert policy.get_server_metadata()["observations"] == {"STATE": {"kind": "numbers", "shape": [3]}}
state = numpy.array([1.0, 2.0, 3.0])
for i in range(3):
    reply = policy.infer({"STATE": state, "prompt": "push", "qsteer": {"seed": i}})
    assert reply["actions"].dtype == numpy.float32 and (reply["actions"] == state + i).all()
    assert reply["actions"].shape == (2, 3) and type(reply["value"]) is float
    assert set(reply["server_timing"]) == {"infer_ms"} | ({"prev_total_ms"} if i else set())
    assert reply["policy_timing"]["infer_ms"] > 0
assert policy.infer({"STATE": state})["actions"].shape == (2, 3)
try:
    policy.infer({"state": state})
except RuntimeError as error:
    assert "expected ['STATE'], got no ['STATE']" in str(error), error
else:
    raise AssertionError("no error")
try:
    WebsocketClientPolicy("127.0.0.1", port, api_key="wrong")
except Exception as error:
    assert "401" in str(error), error
else:
    raise AssertionError("no error")
assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").read() == b"OK\\n"
print("spoken")
""".replace("STATE", STATE)
BROKER = """
import sys, numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("ws://127.0.0.1", int(sys.argv[1]), api_key="s3cret")
broker = ActionChunkBroker(policy, action_horizon=2)
steps = [broker.infer({"STATE": numpy.zeros(3), "qsteer": {"seed": 1}}) for _ in range(3)]
assert all(step["actions"].shape == (3,) and step["value"] == 1.0 for step in steps)
print("spoken")
""".replace("STATE", STATE)


def make_environment(folder: Path, *groups: tuple[str, ...]) -> Path:
    """A virtual environment with packages; its interpreter."""
    python = folder / "bin/python"
    uv = Path(__file__).parents[2] / ".ci/uv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    for group in groups:
        done = subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", python, *group], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"openpi-client cannot be installed here: {done.stderr.strip()[-200:]}")
    return python


@pytest.fixture(scope="module", params=["1.26", "2"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("client") / "venv"
    if request.param == "1.26":
        return make_environment(folder, PINNED), "1.26."
    return make_environment(folder, ("--no-deps", "openpi-client==0.1.2"), NUMPY_2, ("dm-tree",)), "2."


@pytest.fixture
def port() -> Iterator[int]:
    """Where a server listens, which runs in a thread of its own."""
    import asyncio

    told, ready = [], threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        async with Server(Arithmetic(), port=0, key="s3cret") as server:
            told.append(server.port)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(60)
    yield told[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.mark.parametrize("program", [CLIENT, BROKER], ids=["client", "broker"])
def test_an_unmodified_client_speaks_with_the_server(client: Any, port: int, program: str) -> None:
    python, version = client
    done = subprocess.run(
        [python, "-I", "-c", program, str(port), version], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and done.stdout == "spoken\n", done.stderr

"""``qsteer serve``: it says what it expects and where it listens, answers, and stops when it is told to."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from qsteer.cli import main
from qsteer.critics import Critic, CriticConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.serving.codec import pack, unpack

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    shape = {"obs_dim": 3, "action_dim": 2, "horizon": 4, "hidden": (8,)}
    FlowPolicy(FlowPolicyConfig(**shape)).save_pretrained(folder / "policy")
    Critic(CriticConfig(**shape)).save_pretrained(folder / "critic")
    return folder


def options(folder: Path) -> list[str]:
    parts = ["--policy", str(folder / "policy"), "--critic", str(folder / "critic"), "--rule", "tweedie=0.2"]
    return ["serve", *parts, "--port", "0"]


@pytest.fixture
def server(networks: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server of its own process, and its address."""
    command = [sys.executable, "-m", "qsteer.cli", *options(networks), "--rename", "state=observation.state"]
    environment = os.environ | {"QSTEER_API_KEY": "s3cret", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    said = ""
    while "listening" not in said and process.poll() is None:
        said += process.stdout.readline()
    assert "observation: state: numbers (3,)" in said and "actions: (4, 2)" in said
    yield process, said.split("listening: ")[1].strip()
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_from_the_command_to_a_reply_and_to_the_end(server, number: signal.Signals) -> None:
    process, address = server

    async def live() -> None:
        header = {"Authorization": "Api-Key s3cret"}
        async with connect(address, compression=None, additional_headers=header, proxy=None) as one:
            assert unpack(await one.recv())["observations"]["state"] == {"kind": "numbers", "shape": [3]}
            await one.send(pack({"state": np.zeros(3, np.float32), "qsteer": {"seed": 1}}))
            assert unpack(await one.recv())["actions"].shape == (4, 2)
            process.send_signal(number)
            with pytest.raises(ConnectionClosed) as closed:
                await one.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001

    asyncio.run(asyncio.wait_for(live(), 60))
    assert process.wait(30) == 0


def misuse(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_misuse(networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = options(networks)
    assert "--critic: expected one, got none" in misuse(capsys, *whole[:3])
    assert "--policy: expected none beside --steering" in misuse(capsys, *whole, "--steering", "x")
    assert "expected YOURS=POLICY'S, got 'x'" in misuse(capsys, *whole, "--rename", "x")
    assert "expected names of ['observation.state']" in misuse(capsys, *whole, "--rename", "a=b")
    assert "expected a loopback address without a key" in misuse(capsys, *whole, "--host", "0.0.0.0")
    (tmp_path / "empty").touch()
    empty = str(tmp_path / "empty")
    assert "expected a key, got an empty file" in misuse(capsys, *whole, "--api-key-file", empty)
    assert "expected both or none, got one" in misuse(capsys, *whole, "--tls-cert", empty)
    tls = "--tls-cert", empty, "--tls-key", empty
    assert "expected a certificate and its key in PEM" in misuse(capsys, *whole, *tls)
    assert "none" in misuse(capsys, *whole, "--tls-cert", str(tmp_path / "none"), "--tls-key", empty)
    assert "--robots: expected none without --learn" in misuse(capsys, *whole, "--robots", "2")
    learn = "--learn", str(tmp_path / "run")
    steering = "serve", "--steering", "x", *learn
    assert "--learn: expected none beside --steering" in misuse(capsys, *steering)
    assert "expected a number in [0, 1], got 2" in misuse(capsys, *whole, *learn, "--learn-share", "2")

"""A server that learns: steering begins when the critic may, and can be stopped, taken back, and killed."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_robots import TRAINING, Robot, learning, served
from robots import ask, http, robot

from qsteer.auditing.page import Check
from qsteer.critics import Critic, LiveCritic
from qsteer.data.layout import Rows
from qsteer.serving import BatchLimits, RobotLearning, Server
from qsteer.serving.options import OWN, RequestError
from qsteer.serving.share import Share
from qsteer.training.checkpoints import CHECKPOINT

PASS = Check("stored", "", "pass", "fine", "")
FAIL = Check("stored", "", "fail", "noise is preferred", "")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy critics are not asked whether they agree with their few rows."""
    monkeypatch.setattr("qsteer.serving.learning.check_stored", lambda *args, **options: PASS)


def fill(learns: RobotLearning, decisions: int, name: str = "r") -> Robot:
    """Let a robot live, in the worker's place, without learning."""
    server, body = Server(learns.served, learning=learns), Robot(name)
    for i in range(decisions):
        read = server.served.interface.read(body.ask(seed=i), lambda: 0)
        (answer,) = server._act([replace(read, robot=1)])
        if (end := body.execute(answer.decision.actions)) is not None:
            server._teller(1, server.served.interface.read(end, lambda: 0))()
    return body


def stock(learns: RobotLearning, rounds: int) -> None:
    """Store rows as if two robots had lived: 2 steps each, an end every third row."""
    generator = torch.Generator().manual_seed(rounds)
    for i in range(rounds):
        actions = torch.rand(2, 2, 1, generator=generator) - 0.5
        over = torch.tensor([i % 3 == 2] * 2)
        rewards = -(actions - 0.3).square().sum((1, 2))
        observations = torch.randn(2, 2, generator=generator)
        rows = Rows(observations, actions, rewards, over, torch.zeros(2, dtype=torch.bool))
        learns.learner.store(rows)


def work(learns: RobotLearning, waiting: bool = False) -> int:
    """Do all that is due; return the number of slices."""
    count = 0
    while learns.slice(waiting):
        count += 1
    return count


def weights(critic: Critic | LiveCritic) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in critic.parameters()]).clone()


def test_steering_begins_after_the_warm_up_once_the_audit_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [FAIL, FAIL, PASS]
    monkeypatch.setattr("qsteer.serving.learning.check_stored", lambda *args, **options: verdicts.pop(0))
    learns = learning(tmp_path, audit_every=20)
    learns.begin()
    stock(learns, 25)
    assert work(learns) == 0 or learns.learner.update == 0  # the warm-up
    assert not learns.steering and learns.served.rule is None
    stock(learns, 20)
    learns.slice(False)
    while len(verdicts) == 3:
        learns.slice(False)
    assert not learns.steering and learns.served.rule is None
    assert learns.state()["audit"] == "fail: noise is preferred"
    work(learns)
    assert verdicts == [] and learns.steering and learns.served.rule is not None
    assert learns.learner.update == learns.learner.due > 120
    assert learns.served.live.version == 0  # nothing has acted since
    fill(learns, 1)
    assert learns.served.live.version > 0
    assert np.isclose(learns.served.act([learns.served.interface.example()])[0].strength, 0.3, atol=0.05)
    learns.close()


def test_learning_makes_the_same_critic_as_the_online_loop_would(tmp_path: Path, passing: None) -> None:
    one, other = learning(tmp_path / "a"), learning(tmp_path / "b")
    for learns in (one, other):
        stock(learns, 45)
    work(one)
    other.learner.learn(other._window)
    assert torch.equal(weights(one.learner.learner.target), weights(other.learner.learner.target))
    for learns in (one, other):
        learns.close()


def test_while_requests_wait_the_share_is_kept(tmp_path: Path, passing: None) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.01  # from before a step to after it
        return now

    learns = learning(tmp_path, share=0.25, clock=clock)
    stock(learns, 45)
    while learns.learner.update < 1:
        learns.slice(False)
    learns.share = Share(0.25, clock)
    learns.share.learn(0.01, waiting=False)
    assert not learns.slice(True)  # nothing was acted
    before = learns.learner.update
    learns.share.act(0.1)
    assert work(learns, waiting=True) == 3 == learns.learner.update - before
    learns.close()


def test_a_critic_that_is_ill_stops_steering_and_is_audited_again(tmp_path: Path, passing: None) -> None:
    learns = learning(tmp_path)
    stock(learns, 45)
    work(learns)
    assert learns.steering
    with torch.no_grad():
        learns.learner.learner.critic.net.first.weight.fill_(float("nan"))
    stock(learns, 10)
    while learns.learner.health.steers:
        learns.slice(False)
    assert not learns.steering and learns.audited is None and learns.served.rule is None
    assert learns.state()["trips"] == 1 and not learns.state()["healthy"]
    learns.close()


def test_freeze_learn_export_and_roll_back(tmp_path: Path, passing: None) -> None:
    learns = learning(tmp_path, keep=2, keep_every=50)
    with pytest.raises(RequestError, match="kept or exported before the one that acts, got none"):
        learns.command("rollback")
    stock(learns, 45)
    work(learns)
    exported = learns.command("export")["critic"]
    first = weights(learns.learner.learner.target)
    assert torch.equal(weights(Critic.from_pretrained(tmp_path / exported)), first)
    assert learns.command("freeze")["frozen"]
    stock(learns, 25)
    assert work(learns) <= 3 and torch.equal(weights(learns.learner.learner.target), first)
    assert not learns.command("learn")["frozen"]
    work(learns)
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert len(kept) == 2 and not torch.equal(weights(learns.learner.learner.target), first)

    told = learns.command("rollback")
    assert told["frozen"] and told["critic"] == kept[-1] and told["position"] == int(kept[-1])
    back = weights(Critic.from_pretrained(tmp_path / "kept" / kept[-1]))
    for critic in (learns.learner.learner.critic, learns.learner.learner.target):
        assert torch.equal(weights(critic), back)
    with learns.served.live.acting():
        assert torch.equal(weights(learns.served.live.critic), back)
    assert learns.command("rollback")["position"] < told["position"]
    learns.close()

    again = learning(tmp_path)  # a restart does not undo it
    assert again.frozen and again.position < told["position"]
    assert not torch.equal(weights(again.learner.learner.target), first)
    again.close()


def test_a_fault_stops_learning_and_not_the_robots(
    tmp_path: Path, passing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    learns = learning(tmp_path)
    stock(learns, 45)
    monkeypatch.setattr(learns.learner, "step", lambda: 1 / 0)
    work(learns)
    assert learns.state()["fault"] == "ZeroDivisionError: division by zero"
    fill(learns, 2)
    learns.close()


def test_a_full_disk_stops_neither_learning_nor_robots(
    tmp_path: Path, passing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    learns = learning(tmp_path, keep_every=20)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for writes in (
            "online.learner.append_json_line", "online.rewards.append_json_line", "online.learner.save",
            "files.Path.mkdir", "serving.learning.write_json",
        ):  # fmt: skip
            patch.setattr(f"qsteer.{writes}", full)
        stock(learns, 45)
        work(learns)
        assert learns.steering and learns.learner.update == learns.learner.due and learns.fault is None
        assert learns.state()["unwritten"].startswith("OSError: [Errno 28]")
        body = fill(learns, 2)
        learns.learner.health.observe_rewards(torch.full((200,), -0.5))
        body.told["rewards"] = [-1e9] * 2  # a sensor's mistake, which cannot be listed
        read = learns.served.interface.read(body.ask(seed=3), lambda: 0)
        assert learns.lanes.hear(1, read.feedback) is None and learns.state()["refused"] == 1
        for name in ("export", "freeze"):
            with pytest.raises(RequestError, match=f"{name}: expected to write to .* free the disk"):
                learns.command(name)
    assert not (tmp_path / CHECKPOINT).exists() and not list((tmp_path / "kept").glob("*"))
    learns.command("learn")
    stock(learns, 45)
    work(learns)
    assert learns.unwritten is None
    assert (tmp_path / CHECKPOINT).exists() and list((tmp_path / "kept").glob("*"))
    learns.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == learns.learner.update


def test_a_directory_serves_one(tmp_path: Path) -> None:
    first = learning(tmp_path)
    with pytest.raises(RuntimeError, match="expected a run that nothing else has open"):
        learning(tmp_path)
    first.close()
    learning(tmp_path).close()


def test_what_cannot_learn_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of the 2 steps of a reply"):
        learning(tmp_path, replace(TRAINING, row=1))
    with pytest.raises(ValueError, match="expected one that learns from stored actions, got 'td'"):
        learning(tmp_path, replace(TRAINING, critic=replace(TRAINING.critic, target="td")))
    with pytest.raises(ValueError, match="expected a LiveCritic"):
        RobotLearning(served(learns=False), tmp_path, TRAINING)


async def live(server: Server, body: Robot, decisions: int) -> list[Any]:
    """A robot over a socket."""
    replies = []
    async with robot(server) as one:
        for _ in range(decisions):
            reply = await ask(one, body.ask())
            assert not isinstance(reply, str), reply
            replies.append(reply)
            if (end := body.execute(reply["actions"])) is not None:
                replies.append(await ask(one, end))
    return replies


def test_robots_over_sockets_are_learnt_from(tmp_path: Path, passing: None) -> None:
    learns = learning(tmp_path, replace(TRAINING, warmup=20))

    async def main() -> None:
        async with Server(learns.served, port=0, batching=BatchLimits(wait=0.0), learning=learns) as server:
            assert server.metadata["learns"]
            replies, _ = await asyncio.gather(*(live(server, Robot(name), 40) for name in "ab"))
            assert replies[-1]["stored"] >= 39
            while not learns.steering or learns.learner.update < learns.learner.due:
                await asyncio.sleep(0.01)
            replies = await live(server, Robot("c"), 1)
            assert replies[0]["strength"] > 0 and replies[0]["stored"] == 0
            async with robot(server) as one:
                assert (await ask(one, {OWN: {"command": "freeze"}}))["frozen"]
                assert "expected one of" in await ask(one, {OWN: {"command": "stop"}})
            status, text = await http(server.port, "/metrics")
            assert status == 200 and "qsteer_learning_frozen 1.0" in text and "qsteer_episodes_total" in text
            status, text = await http(server.port, "/state")
            state = json.loads(text)
            assert state["learning"]["frozen"] and state["episodes"] == len(state["ended"]) >= 26
            assert state["films"][-1]["values"] and len(state["points"]) > 0

    asyncio.run(asyncio.wait_for(main(), 200))
    assert (tmp_path / "last" / "config.json").exists() and (tmp_path / "metrics.jsonl").exists()


def test_commands_need_a_server_that_learns() -> None:
    async def main() -> None:
        async with Server(served(learns=False), port=0) as server, robot(server) as one:
            assert "expected a server that learns" in await ask(one, {OWN: {"command": "freeze"}})

    asyncio.run(main())


def test_commands_without_a_key_are_this_machines_own(tmp_path: Path) -> None:
    learns = learning(tmp_path)
    server = Server(learns.served, learning=learns)
    told = server.served.interface.read({OWN: {"command": "freeze"}}, lambda: 0)
    with pytest.raises(RequestError, match="expected a key, or a client on the server's machine"):
        server._check_command("192.0.2.7", told)
    Server(learns.served, learning=learns, key="secret")._check_command("192.0.2.7", told)
    learns.close()


SERVE = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
import torch
from learning_robots import TRAINING, learning
from qsteer.serving import Server

async def main():
    torch.set_num_threads(1)
    learns = learning(Path(sys.argv[1]), replace(TRAINING, warmup=40, checkpoint_every=20))
    async with Server(learns.served, port=0, learning=learns) as server:
        print(server.port, len(learns.learner.replay), learns.learner.update, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_kill_at_any_time_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Also: the learner goes on from its checkpoint."""
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    acknowledged = 0
    for life in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        port, rows, updates = map(int, process.stdout.readline().split())
        assert rows >= acknowledged and (life == 0) == (updates == 0)

        class Address:
            pass

        Address.port = port
        before = rows

        async def robots(before: int = before) -> int:
            stored = before
            async with robot(Address()) as one:
                body = Robot(f"life{life}")  # noqa: B023
                while stored < before + 30 or not (tmp_path / CHECKPOINT).exists():
                    reply = await ask(one, body.ask())
                    if (end := body.execute(reply["actions"])) is not None:
                        reply = await ask(one, end)
                    stored = before + reply["stored"]
            return stored

        acknowledged = asyncio.run(robots())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    learns = learning(tmp_path, replace(TRAINING, warmup=40, checkpoint_every=20))
    assert len(learns.learner.replay) >= acknowledged >= 90 and learns.learner.update > 0
    learns.close()

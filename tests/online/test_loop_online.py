"""The online loop on a toy task: it learns, it keeps seeds apart, and nothing that was acted is ever lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import online_runs
import pytest
import torch
from bandit import ThreeSteps
from online_runs import CRITIC, RULE, TRAINING, metrics, offline, parts, policy, run
from torch import Tensor

import qsteer
from qsteer.critics import Critic, LiveCritic
from qsteer.data import Chunks
from qsteer.data.replay import Replay
from qsteer.online.actors import StateActor
from qsteer.online.collect import Collector
from qsteer.online.loop import OnlineLoop
from qsteer.online.run import train_online
from qsteer.training.critic import LEARNERS, Sarsa, fresh_critic


def test_steering_gets_better_while_it_acts(tmp_path: Path) -> None:
    run(tmp_path)
    lines = metrics(tmp_path)
    assert [line["env_steps"] for line in lines] == list(range(52, 401, 48)) or lines[-1]["env_steps"] == 400
    assert all("strength" not in line and line["step"] == 0 for line in lines if line["env_steps"] <= 100)
    assert lines[-1]["strength"] == pytest.approx(0.3, abs=1e-3)
    assert lines[-1]["step"] == 400  # one update per step, those of the warm-up included
    evaluated = [line for line in lines if "evaluation/success" in line]
    assert [line["env_steps"] for line in evaluated] == [200, 400]
    run(tmp_path / "base", replace(TRAINING, env_steps=200), rule=None)
    base = metrics(tmp_path / "base")[-1]["evaluation/return"]  # of the same episodes
    assert evaluated[-1]["evaluation/return"] > base + 0.15
    best = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert best["evaluation/success"] == max(line["evaluation/success"] for line in evaluated)
    for name in ("best", "last"):
        assert Critic.from_pretrained(tmp_path / name).config.horizon == 1
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").open()]
    shares = [sum(v for k, v in line.items() if k.startswith("time/")) for line in speed]
    assert all(0.5 < share <= 1.0 for share in shares)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    training = replace(TRAINING, env_steps=48, warmup=20, evaluate_every=0)
    first = run(tmp_path, training)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = run(tmp_path, training)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_last_critic_that_a_kill_has_torn_is_mended_by_a_rerun(tmp_path: Path) -> None:
    """Between the two renames of the final save there is nothing at its place, but both beside it."""
    training = replace(TRAINING, env_steps=48, warmup=20, evaluate_every=0)
    critic = run(tmp_path, training)
    last, new, former = (tmp_path / name for name in ("last", ".last.new", ".last.former"))
    for new_is_whole in (True, False):
        if new_is_whole:
            shutil.copytree(last, new)
        last.rename(former)
        again = run(tmp_path, training)
        assert not new.exists() and not former.exists()
        for found in (again, Critic.from_pretrained(last)):
            for p, q in zip(critic.parameters(), found.parameters(), strict=True):
                assert torch.equal(p, q)


@pytest.mark.parametrize("target", LEARNERS)
def test_every_target_learns_online(target: str, tmp_path: Path) -> None:
    training = replace(
        TRAINING, critic=replace(CRITIC, target=target), env_steps=80, warmup=40, evaluate_every=0
    )
    actor, live = parts(settings=training.critic)
    act = actor.sample_under(RULE, qsteer.Euler(clip=(-1.0, 1.0))) if target in ("td", "fql") else None
    train_online(ThreeSteps, actor, live, tmp_path, training, rule=RULE, act=act, progress=False)
    assert metrics(tmp_path)[-1]["step"] == 80
    assert live.version > 0


def test_seeds_at_once_learn_from_their_own_environments_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    batch_loss = Sarsa.batch_loss
    monkeypatch.setattr(
        Sarsa, "batch_loss", lambda self, batch, g: (seen.append(batch.rows), batch_loss(self, batch, g))[1]
    )
    training = replace(TRAINING, env_steps=120, num_envs=2, warmup=40, evaluate_every=80)
    run(tmp_path, training, seeds=3)
    slots = next(replay.shape[1] for replay in [np.load(tmp_path / "replay" / "rewards.npy", mmap_mode="r")])
    assert seen
    for rows in seen:
        lanes = rows.reshape(3, -1) // slots
        assert all(set(lanes[s].tolist()) <= {2 * s, 2 * s + 1} for s in range(3))
    critics = [Critic.from_pretrained(tmp_path / f"seed{s}" / "last") for s in range(3)]
    assert all(critic.config.stack == 1 for critic in critics)
    assert not torch.equal(critics[0].net.first.weight, critics[1].net.first.weight)
    for s in range(3):
        lines = metrics(tmp_path / f"seed{s}")
        assert lines[-1]["env_steps"] == 120 and "evaluation/success" in lines[-1]


def test_a_critic_that_diverges_does_not_steer_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Sarsa.loss, 0
    steered: list[bool] = []

    def poisoned(self: Sarsa, generator: torch.Generator) -> Any:
        nonlocal calls
        calls += 1
        value, info = loss(self, generator)
        return (value * float("nan"), info) if calls == 160 else (value, info)

    class Actor(StateActor):
        def steer(self, rule: Any, sampler: Any) -> None:
            steered.append(rule is not None)
            super().steer(rule, sampler)

    monkeypatch.setattr(Sarsa, "loss", poisoned)
    live = LiveCritic(fresh_critic(CRITIC.critic_config(2, 1), [0]))
    training = replace(TRAINING, evaluate_every=0, log_every=4)
    critic = train_online(
        ThreeSteps, Actor([policy()], live), live, tmp_path, training, rule=RULE, progress=False
    )
    lines = metrics(tmp_path)
    assert lines[-1]["trips"] == 1
    ill = [line["env_steps"] for line in lines if line["steered"] == 0]
    assert ill and ill == list(range(ill[0], ill[-1] + 1, 4))
    rounds = steered[1:]  # the first is the constructor's
    assert not any(rounds[ill[0] // 4 : ill[-1] // 4]) and rounds[-1]
    assert all(torch.isfinite(p).all() for p in critic.parameters())
    assert all(np.isfinite(line["q"]) for line in lines if "q" in line)


def test_a_critic_that_has_not_learnt_steers_nothing_not_even_evaluations(tmp_path: Path) -> None:
    steered: list[bool] = []

    class Actor(StateActor):
        def steer(self, rule: Any, sampler: Any) -> None:
            steered.append(rule is not None)
            super().steer(rule, sampler)

    live = LiveCritic(fresh_critic(CRITIC.critic_config(2, 1), [0]))
    training = replace(TRAINING, env_steps=40, warmup=20, evaluate_every=12, episodes=2)
    train_online(ThreeSteps, Actor([policy()], live), live, tmp_path, training, rule=RULE, progress=False)
    first = steered.index(True)
    assert all(steered[first:])
    # the constructor's, seven rounds of four steps (the critic learns in the last) and two evaluations
    assert first == 1 + 7 + 2


def test_the_learner_works_while_the_simulators_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(kind: type, name: str) -> None:
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args: (order.append(name), method(*args))[1])

    for kind, name in ((Collector, "send"), (Collector, "receive"), (Sarsa, "loss"), (Replay, "add")):
        noted(kind, name)
    run(tmp_path, replace(TRAINING, env_steps=28, warmup=8, evaluate_every=0))
    rounds = " ".join(order).replace("loss " * 4, "learn ").split("add")[:-1]
    backlog = [["send", "learn", "learn", "learn", "receive"]]  # of the warm-up
    assert [r.split() for r in rounds] == (
        [["send", "receive"]] * 3 + backlog + [["send", "learn", "receive"]] * 3
    )


def test_offline_data_is_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    batch_loss = Sarsa.batch_loss
    monkeypatch.setattr(
        Sarsa,
        "batch_loss",
        lambda self, batch, g: (
            shares.append(float((batch.rows < 30).float().mean())),
            batch_loss(self, batch, g),
        )[1],
    )
    chunks = Chunks(offline(), 1, 0.9, "next_actions")
    training = replace(TRAINING, env_steps=80, warmup=20, evaluate_every=0, offline_share=0.25)
    run(tmp_path, training, offline=chunks)
    assert shares and all(share == 0.25 for share in shares)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected act="):
        run(tmp_path, act=lambda critic, obs, noise: noise)
    short = replace(TRAINING, env_steps=8, warmup=4, evaluate_every=0)
    run(tmp_path, short)
    with pytest.raises(ValueError, match="weight"):
        run(tmp_path, short, rule=qsteer.QGF(weight=0.5))
    with pytest.raises(ValueError, match="nonsense"):
        run(tmp_path / "other", short, tracker="nonsense")


KILLED = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import online_runs
from qsteer.data.replay import Replay

add = Replay.add
def acknowledged(self, *given):
    add(self, *given)
    print(self.added, flush=True)
Replay.add = acknowledged
if __name__ == "__main__":
    online_runs.run(Path({out!r}), online_runs.KILL)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """kill -9 ten times; what was printed before each is there after it, and the metrics go on."""
    script = tmp_path / "killed.py"
    out = tmp_path / "run"
    script.write_text(KILLED.format(folder=str(Path(online_runs.__file__).parent), out=str(out)))
    generator = np.random.default_rng(0)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    acknowledged = 0
    for kill in range(11):
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        # The loop itself says when the critic is ill; a last line may be cut in the middle.
        numbers = (int(line) for line in process.stdout if line[:-1].isdigit() and line[-1] == "\n")
        first = next(numbers, None)
        if first is None:  # the last kill came when all rows had been acted
            process.wait()
            break
        assert first >= acknowledged  # the first row after the restart comes on top of all others
        acknowledged = first
        if kill < 10:
            time.sleep(generator.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
        for number in numbers:
            acknowledged = number
        process.wait()
    assert acknowledged == 600 and kill > 2
    lines = metrics(out)
    steps, updates = ([line[key] for line in lines] for key in ("env_steps", "step"))
    assert steps == sorted(set(steps)) and steps[-1] == 600
    assert updates == sorted(updates) and updates[-1] == 600


def test_health_knows_the_rewards_of_offline_data_and_of_the_stored_replay(tmp_path: Path) -> None:
    actor, live = parts()
    new = OnlineLoop(
        actor, live, tmp_path / "a", TRAINING, None, None, Chunks(offline(), 1, 0.9, "next_actions"), None
    )
    low, high = offline().rewards.aminmax()
    assert new.health._returns() == pytest.approx((float(low) / (1 - 0.9), float(high)))
    run(tmp_path / "b", replace(TRAINING, env_steps=24, warmup=20, evaluate_every=0))
    actor, live = parts()
    settings = replace(TRAINING, env_steps=24, warmup=20, evaluate_every=0)
    again = OnlineLoop(actor, live, tmp_path / "b", settings, RULE, None, None, None)
    assert again.health._returns()[0] == pytest.approx(float(again.replay.rewards().min()) / (1 - 0.9))

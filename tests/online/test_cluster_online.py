"""An online run whose simulators are on a Ray cluster outlives one of its nodes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bandit import Bandit
from online_runs import RULE, TRAINING, metrics, parts

from qsteer.data.replay import Replay
from qsteer.envs.cluster import Cluster
from qsteer.online.run import train_online
from qsteer.online.sources import make_layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # an actor takes seconds to start
SHORT = replace(TRAINING, env_steps=240, warmup=40, evaluate_every=120, episodes=6)


class EightSteps(Bandit):
    steps = 8


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    pytest.importorskip("ray")
    from ray_nodes import Nodes

    with Nodes() as started:
        yield started


def learn(out: Path, cluster: Cluster | None, kill: Any = None, at: int = 0) -> Replay:
    actor, live = parts()
    act, asked = actor.act, 0

    def act_and_kill(*given: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == at:
            kill()
        return act(*given)

    actor.act = act_and_kill  # type: ignore[method-assign]
    train_online(EightSteps, actor, live, out, SHORT, rule=RULE, cluster=cluster, progress=False)
    return Replay(make_layout(live.config, SHORT), directory=out / "replay")


@pytest.mark.filterwarnings("ignore:environment")
def test_a_node_that_dies_costs_its_running_episodes_only(nodes: Any, tmp_path: Path) -> None:
    replay = learn(tmp_path, Cluster(), nodes.kill_second, 21)  # in the middle of the third episodes
    nodes.add_second()
    last = metrics(tmp_path)[-1]
    assert last["env_steps"] == 240 and last["step"] == 240
    assert last["refused"] == 2
    assert 2 <= last["failed"] <= 4  # a new actor may be sent to the node before Ray knows that it is dead
    assert replay.added == 240 and len(replay) == 240 - 2
    drawn = replay.sample(4096, torch.Generator().manual_seed(0))
    assert drawn.rows.unique().numel() == replay.size() > 200
    goes_on = drawn.masks > 0  # place and clock: what follows is of the same episode
    before, after = drawn.observations[goes_on], drawn.next_observations[goes_on]
    assert torch.equal(before[:, 0], after[:, 0]) and torch.equal(before[:, 1] + 1, after[:, 1])
    assert (drawn.observations[~goes_on, 1] == 7).all()


def test_rows_are_those_of_processes(nodes: Any, tmp_path: Path) -> None:
    for name, cluster in (("here", None), ("there", Cluster(envs_per_actor=2))):
        learn(tmp_path / name, cluster)
    for column in ("observations", "actions", "rewards"):
        here, there = (np.load(tmp_path / name / "replay" / f"{column}.npy") for name in ("here", "there"))
        assert np.array_equal(here, there)
    lines = [
        [line.get("evaluation/return") for line in metrics(tmp_path / name)] for name in ("here", "there")
    ]
    assert lines[0] == lines[1]

"""Simulators on a Ray cluster do what those in processes do, to the bit; what dies there is begun again."""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breaking import SAYS, Breaking
from torch import Tensor

from qsteer.envs.chunked import make_chunked
from qsteer.envs.cluster import Cluster, Group
from qsteer.envs.limits import Limits
from qsteer.envs.rollouts import Rollouts, Simulators

EPISODES, SEED = 12, 100
PAIRS = Cluster(envs_per_actor=2)


def slow(test: Any) -> Any:
    """Mark a test whose actors take seconds to start, on a busy machine many."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    pytest.importorskip("ray")
    from ray_nodes import Nodes

    with Nodes() as started:
        yield started


def follow(obs: dict[str, Tensor], noise: Tensor) -> Tensor:
    assert obs["state"].isfinite().all()
    return torch.tanh(noise + 0.3 * obs["state"][:, None, :1])


def evaluate(
    make_env: Callable[[], Breaking],
    cluster: Cluster | None,
    act: Callable[[dict[str, Tensor], Tensor], Tensor] = follow,
    **limits: Any,
) -> Rollouts:
    with Simulators(
        make_env, horizon=2, num_envs=4, limits=Limits(**{"step_s": 3.0} | limits), cluster=cluster
    ) as simulators:
        return simulators.rollout(act, episodes=EPISODES, seed=SEED, record=True, progress=False)


@pytest.fixture(scope="module")
def healthy() -> Rollouts:
    return evaluate(Breaking, None)


def same(a: Rollouts, b: Rollouts) -> bool:
    columns = ("success", "sum_reward", "max_reward", "length", "seed")
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in columns) and all(
        map(np.array_equal, a.actions or (), b.actions or ())
    )


@slow
@pytest.mark.parametrize("size", [1, 3])
def test_episodes_are_those_of_processes(size: int, nodes: Any, healthy: Rollouts) -> None:
    run = evaluate(Breaking, Cluster(address=nodes.address, envs_per_actor=size))
    assert run.failed == 0 and same(run, healthy)


@slow
@pytest.mark.parametrize(
    ("way", "says", "failed"),
    [
        ("raise", SAYS["raise"], 1),
        ("nan", SAYS["nan"], 1),
        ("exit", "its actor, of environments 0 to 1, ended: .*died", 2),
        ("hang", "expected an answer within 12 s, got none", 2),
    ],
)
def test_an_episode_whose_simulator_fails_is_begun_again(
    way: str, says: str, failed: int, nodes: Any, healthy: Rollouts, tmp_path: Path
) -> None:
    """And so is the other one of its actor, if that dies or hangs."""
    with pytest.warns(RuntimeWarning, match="environment 1: .*" + says):
        run = evaluate(partial(Breaking, way, (SEED + 1,), 2, tmp_path / "failed"), PAIRS)
    assert run.failed == failed and same(run, healthy)


@slow
@pytest.mark.filterwarnings("ignore:environment")
@pytest.mark.parametrize("way", ["raise", "exit"])
def test_an_episode_that_always_fails_ends_the_run(way: str, nodes: Any) -> None:
    says = f"failed 2 times in a row, the last time in the episode of seed {SEED + 1}: "
    with pytest.raises(RuntimeError, match=says) as caught:
        evaluate(partial(Breaking, way, (SEED + 1,)), Cluster(), failures=2)
    if way == "raise":
        assert "breaking.py" in "".join(caught.value.__notes__)


@slow
def test_too_few_cores_are_said(nodes: Any) -> None:
    says = "expected 5 free cores for 5 environments, 1 to an actor, got 4 free of 4; .* put 2 into an actor"
    with pytest.raises(ValueError, match=says):
        Simulators(Breaking, horizon=2, num_envs=5, cluster=Cluster())
    with Simulators(Breaking, horizon=2, num_envs=1, cluster=Cluster()) as simulators:
        simulators.rollout(follow, episodes=1, progress=False)  # Ray counts a core once its actor is there
        says = "expected 4 free cores for 7 environments, 2 to an actor, got 3 free of 4; .* put 3 into"
        with pytest.raises(ValueError, match=says):
            Simulators(Breaking, horizon=2, num_envs=7, cluster=PAIRS)


@slow
@pytest.mark.filterwarnings("ignore:environment")
def test_a_node_that_dies_costs_its_running_episodes_only(nodes: Any, healthy: Rollouts) -> None:
    asked = 0

    def act(obs: dict[str, Tensor], noise: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        if asked == 4:  # in the middle of the second episodes
            nodes.kill_second()
        return follow(obs, noise)

    run = evaluate(Breaking, Cluster(), act, step_s=60.0)
    nodes.add_second()
    assert same(run, healthy)
    assert 2 <= run.failed <= 4  # a new actor may be sent to the node that Ray does not know to be dead yet


@slow
def test_another_cluster_than_the_connected_one_is_refused(nodes: Any) -> None:
    with pytest.raises(ValueError, match=r"to which this process is connected, got 10\.0\.0\.1:6379"):
        Simulators(Breaking, horizon=2, num_envs=1, cluster=Cluster(address="10.0.0.1:6379"))


@slow
def test_nothing_is_left_of_simulators(nodes: Any, tmp_path: Path) -> None:
    """Neither of those that hung, nor of those that were closed, nor of what they had started."""
    pids = tmp_path / "pids"
    make_env = partial(Breaking, "hang", (SEED + 1,), 2, tmp_path / "failed", pids)
    with pytest.warns(RuntimeWarning, match="environment 1"):
        evaluate(make_env, PAIRS, step_s=1.5)
    lines = pids.read_text().splitlines()[1:]  # the first is of this process
    found = [Path("/proc", pid) for line in lines for pid in line.split()]
    assert len(lines) == 4 + 2
    until = time.monotonic() + 30
    while any(path.exists() for path in found) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [path for path in found if path.exists()]


def test_an_environment_of_a_group_that_raises_is_built_anew(tmp_path: Path) -> None:
    make_env = partial(make_chunked, partial(Breaking, "raise", (7,), 2, tmp_path / "failed"), 2, 1.0)
    group = Group((make_env, make_env().observation_space))
    columns, said = group.ask("reset", {4: 7, 5: 8})
    assert columns["state"].shape == (2, 2) and said == {4: (True, None), 5: (True, None)}
    columns, said = group.ask("step", {4: np.zeros((2, 1)), 5: np.zeros((2, 1))})
    assert columns["state"].shape == (1, 2) and said[5][0]
    assert said[4][0] is False and said[4][1][0] == SAYS["raise"] and "breaking.py" in said[4][1][1]
    columns, said = group.ask("step", {4: np.zeros((2, 1))})  # as if the actor was another
    assert not columns and "its episode was lost with its actor" in said[4][1][0]
    _, said = group.ask("reset", {4: 7})
    columns, said = group.ask("step", {4: np.zeros((2, 1))})
    assert said[4][0] and columns["state"][0, 1] == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"envs_per_actor": 0}, "Cluster.envs_per_actor: expected"),
        ({"address": "here"}, "Cluster.address: expected auto, local or HOST:PORT, got 'here'"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Cluster(**given)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "qsteer\[ray\]"'):
        Simulators(Breaking, horizon=2, num_envs=1, cluster=Cluster())

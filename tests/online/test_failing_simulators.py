"""A simulator that fails costs its own episode: the rows of the others are the same, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from breaking import SAYS, WAYS, Breaking, Fails, Lost, Once
from online_runs import TRAINING, metrics, run
from torch import Tensor

from qsteer.data.layout import Rows
from qsteer.envs.limits import Limits
from qsteer.online.actors import Decision
from qsteer.online.collect import Collector

LANES, ROUNDS, AT = 3, 12, 2
QUICK = Limits(step_s=3.0, reset_s=60.0)
SHORT = replace(TRAINING, env_steps=240, warmup=40, evaluate_every=0)


def episode_seed(lane: int, n: int, generator: int = 0) -> int:
    """The seed of the n-th episode of an environment, whatever has befallen it and the others."""
    first = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(generator)))
    return int(np.random.SeedSequence((first, lane, n)).generate_state(1)[0] >> 1)


def act(obs: dict[str, Tensor], lanes: np.ndarray) -> Decision:
    chunk = torch.stack([obs["state"][:, :1] / 3, obs["state"][:, 1:] / 5], 1)
    return Decision(chunk, chunk, obs)


def collect(make_env: Callable[[], Breaking], limits: Limits = QUICK) -> tuple[Collector, list[Rows]]:
    generator = torch.Generator().manual_seed(0)
    with Collector(make_env, horizon=2, num_envs=LANES, limits=limits) as collector:
        return collector, [collector.step(act, generator) for _ in range(ROUNDS)]


@pytest.fixture(scope="module")
def healthy() -> tuple[Collector, list[Rows]]:
    return collect(Breaking)


def states(rows: list[Rows], lane: int) -> list[list[float]]:
    """Place and clock before each row; the place is drawn from the episode's seed."""
    return [row.observations["state"][lane].tolist() for row in rows]


def equal(a: list[Rows], b: list[Rows], lane: int) -> bool:
    def columns(row: Rows) -> list[Tensor]:
        flat = row._replace(observations=None, next_observations=None)
        seen = [part for given in (row.observations, row.next_observations) for part in given.values()]
        return [column[lane] for column in (*flat, *seen) if column is not None]

    return all(all(map(torch.equal, columns(x), columns(y))) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_one_environment_that_fails_costs_its_own_episode(
    way: str, healthy: tuple[Collector, list[Rows]]
) -> None:
    make_env = partial(Breaking, way, (episode_seed(1, 2),), AT)  # the second episode of four steps
    with pytest.warns(RuntimeWarning, match=f"environment 1: .*{SAYS[way]}.*: it is replaced"):
        collector, rows = collect(make_env)
    well, before = healthy
    assert all(equal(rows, before, lane) for lane in (0, 2))
    assert [other for other in collector.finished if other[0] != 1] == [
        other for other in well.finished if other[0] != 1
    ]
    failed = 4 + AT - 1  # its row
    assert [bool(row.kept[1]) for row in rows] == [r != failed for r in range(ROUNDS)]
    assert not (rows[failed].terminals[1] or rows[failed].truncations[1])
    assert equal(rows[:failed], before[:failed], 1)
    assert [clock for _, clock in states(rows, 1)] == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 1]
    assert states(rows, 1)[failed + 1 : failed + 5] == states(before, 1)[8:12]  # its third episode
    assert collector.failed.tolist() == collector.refused.tolist() == [0, 1, 0]
    assert well.failed.tolist() == well.refused.tolist() == [0, 0, 0]


@pytest.mark.parametrize("way", ["raise", "exit"])
def test_one_reset_that_fails_is_followed_by_the_next_episode(
    way: str, healthy: tuple[Collector, list[Rows]]
) -> None:
    with pytest.warns(RuntimeWarning, match=f"environment 1: {SAYS[way]}"):
        collector, rows = collect(partial(Breaking, way, (episode_seed(1, 2),), 0))
    _, before = healthy
    assert all(equal(rows, before, lane) for lane in (0, 2)) and equal(rows[:4], before[:4], 1)
    assert states(rows, 1)[4:8] == states(before, 1)[8:12]
    assert collector.failed.tolist() == [0, 1, 0] and not collector.refused.any()
    assert all(row.kept.all() for row in rows)


@pytest.mark.filterwarnings("ignore:environment")
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("way", ["raise", "exit"])
def test_several_failures_in_a_row_stop_it(way: str, at: int) -> None:
    seeds = [episode_seed(2, n) for n in (2, 3, 4)]
    says = f"environment 2: failed 3 times in a row, the last time in the episode of seed {seeds[-1]}: "
    with pytest.raises(RuntimeError, match=says + SAYS[way]):
        collect(partial(Breaking, way, seeds, at))


@pytest.mark.filterwarnings("ignore:environment")
def test_good_steps_between_failures_let_it_go_on() -> None:
    collector, rows = collect(partial(Breaking, "raise", None, 2))
    assert collector.failed.tolist() == collector.refused.tolist() == [6, 6, 6]
    assert [row.kept.tolist() for row in rows] == [[True] * 3, [False] * 3] * 6
    assert not collector.finished


@pytest.mark.filterwarnings("ignore:environment")
def test_an_online_run_goes_on_and_counts(tmp_path: Path) -> None:
    run(tmp_path, SHORT, make_env=Fails)
    lines = metrics(tmp_path)
    assert lines[-1]["env_steps"] == 240 and lines[-1]["step"] == 240
    failed = [line["failed"] for line in lines]
    assert failed == sorted(failed) and failed[-1] > 4
    assert lines[-1]["refused"] == failed[-1]
    assert lines[-1]["steered"] == 1 and lines[-1]["trips"] == 0
    stored = np.load(tmp_path / "replay" / "rewards.npy")
    assert np.count_nonzero(stored) == 240 - failed[-1]  # every reward is below zero


def test_stored_rows_of_the_others_are_the_same(tmp_path: Path) -> None:
    """In the warm-up: later all environments act by what was learnt from all."""
    training = replace(TRAINING, env_steps=48, warmup=48, evaluate_every=0)
    seed = episode_seed(2, 2, TRAINING.critic.seed)
    for name, make_env in (("well", partial(Once, -1)), ("ill", partial(Once, seed))):
        run(tmp_path / name, training, make_env=make_env)
    for column in ("observations", "actions", "rewards"):
        well, ill = (np.load(tmp_path / name / "replay" / f"{column}.npy") for name in ("well", "ill"))
        assert np.array_equal(well[[0, 1, 3]], ill[[0, 1, 3]]), column
        assert not np.array_equal(well[2], ill[2])
    assert metrics(tmp_path / "ill")[-1]["failed"] == 1


@pytest.mark.filterwarnings("ignore:environment")
def test_an_evaluation_is_not_fed_what_is_not_finite(tmp_path: Path) -> None:
    """Training goes on over it; an evaluation cannot do without one of its episodes."""
    training = replace(SHORT, env_steps=48, warmup=48, evaluate_every=24, episodes=4)
    says = "environment 1: failed 3 times in a row, the last time in the episode of seed 30001: "
    with pytest.raises(RuntimeError, match=says + "expected a finite observation, got NaN"):
        run(tmp_path, training, make_env=partial(Lost, 30_001))

"""The collector: rows are what the environments did, and chunks are asked for when they are used up."""

from typing import Any

import numpy as np
import pytest
import torch
from bandit import Bandit, ThreeSteps
from torch import Tensor

from qsteer.online.actors import Decision
from qsteer.online.collect import Collector


def test_an_environments_chunk_is_asked_for_when_it_is_used_up() -> None:
    """With chunks of two actions and episodes of three steps, environments ask at steps 0, 2, 3, 5, ..."""
    asked: list[list[int]] = []

    def act(obs: Tensor, lanes: np.ndarray) -> Any:
        asked.append(lanes.tolist())
        zero = torch.zeros(len(obs), 2, 1)
        return Decision(zero, zero, obs)

    with Collector(ThreeSteps, horizon=2, num_envs=2) as collector:
        rows = [collector.step(act, torch.Generator().manual_seed(0)) for _ in range(6)]
        collector.abandon()
        last = collector.step(act, torch.Generator().manual_seed(1))
    assert asked == [[0, 1]] * 5
    assert [row.observations[0, 1].item() for row in (*rows, last)] == [0, 1, 2, 0, 1, 2, 0]
    assert len(collector.finished) == 4


def test_what_the_collector_says_happened_happened() -> None:
    generator = torch.Generator().manual_seed(0)
    asked: list[tuple[Tensor, np.ndarray]] = []

    def act(obs: Tensor, lanes: np.ndarray) -> Decision:
        asked.append((obs, lanes))
        ramp = torch.linspace(-0.4, 2.0, 3)[:, None].expand(len(obs), 3, 1) + obs[:, :1, None] / 100
        return Decision(ramp, -ramp, obs)

    with Collector(Bandit, horizon=3, num_envs=2) as collector:
        rows = [collector.step(act, generator) for _ in range(5)]
    place, clock = (torch.stack([r.observations[:, i] for r in rows]) for i in (0, 1))
    assert clock.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]]
    assert [r.terminals.tolist() for r in rows] == [[c == 1] * 2 for c in (0, 1, 0, 1, 0)]
    assert place.unique().numel() == 6 and torch.equal(place[0], place[1])
    assert [lanes.tolist() for _, lanes in asked] == [[0, 1]] * 3  # chunks of three, cut after two
    for r, t in zip(rows, (0, 1, 0, 1, 0), strict=True):
        planned = -0.4 + 1.2 * t + r.observations[:, 0] / 100
        torch.testing.assert_close(r.actions[:, 0, 0], -planned)
        torch.testing.assert_close(r.rewards, -(planned.clamp(-1, 1) - 0.6).square())
        torch.testing.assert_close(r.next_observations[:, 1], r.observations[:, 1] + 1)
        assert r.executed.tolist() == [1, 1] and not r.truncations.any()
    assert [outcome[0] for outcome in collector.finished] == [0, 1, 0, 1]
    assert collector.finished[0][2] == pytest.approx(float(rows[0].rewards[0] + rows[1].rewards[0]))
    assert all(length == 2 for *_, length in collector.finished)


def test_rows_of_a_whole_chunk_are_decisions() -> None:
    """The reward is discounted within the row, the rest of the chunk is not executed."""

    def act(obs: Tensor, lanes: np.ndarray) -> Decision:
        zero = obs.new_zeros(len(obs), 3, 1)
        return Decision(zero, zero + 0.5, obs + 10)

    with Collector(Bandit, horizon=3, num_envs=2, row=3, gamma=0.5) as collector:
        rows = collector.step(act, torch.Generator().manual_seed(0))
    assert rows.actions.shape == (2, 3, 1) and bool((rows.actions == 0.5).all())
    torch.testing.assert_close(rows.rewards, torch.full((2,), -1.5 * 0.36))
    assert rows.executed.tolist() == [2, 2] and rows.terminals.all()
    assert rows.observations[:, 1].tolist() == [10, 10]
    assert rows.next_observations[:, 1].tolist() == [12, 12]
    assert collector.finished[0][1:] == (True, pytest.approx(-0.72), 2)

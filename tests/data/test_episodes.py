"""Chunk transitions: every row says where it comes from, so that crossing a trajectory's end cannot hide."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qsteer.critics import monte_carlo_target, sarsa_target
from qsteer.data import Chunks, Episodes

GAMMA = 0.9
NEEDS = ("actions", "next_state", "next_actions")


def identifiable(seed: int, *, episodes: int = 12, longest: int = 12) -> Episodes:
    """Rows that hold (episode, step): the state before a step, the one after it, and the action."""
    rng = np.random.default_rng(seed)
    rows, terminals, ends = [], [], []
    for e, length in enumerate(rng.integers(1, longest + 1, episodes)):
        rows += [(e, k) for k in range(length)]
        ends += [k == length - 1 for k in range(length)]
        terminals += list(rng.random(length) < 0.08)
        terminals[-1] |= bool(
            rng.random() < 0.5
        )  # half of the trajectories end in success, half at a time limit
    at = torch.tensor(rows, dtype=torch.float32)
    return Episodes(
        observations=at,
        next_observations=at + torch.tensor([0.0, 1.0]),
        actions=at + 100,
        rewards=torch.tensor(rng.normal(size=len(rows)), dtype=torch.float32),
        terminals=torch.tensor(terminals),
        ends=torch.tensor(ends),
    )


def lengths(data: Episodes) -> dict[int, int]:
    return {int(e): int((data.observations[:, 0] == e).sum()) for e in data.observations[:, 0].unique()}


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_transitions_are_those_of_a_walk_along_each_trajectory(seed: int, horizon: int, need: str) -> None:
    data = identifiable(seed)
    chunks = Chunks(data, horizon, GAMMA, need)
    length, expected = lengths(data), []
    for row, (e, k) in enumerate(data.observations.int().tolist()):
        left = length[e] - k

        def over(start: int, stop: int, row: int = row, left: int = left) -> bool:
            return bool(data.terminals[row + start : row + min(stop, left)].any())

        whole = left >= horizon
        if need == "actions":
            usable = whole
        elif need == "next_state" or over(0, horizon):
            usable = whole or over(0, horizon)
        else:
            usable = left >= 2 * horizon or (left > horizon and over(horizon, 2 * horizon))
        if usable:
            expected.append(row)
    assert chunks.starts.tolist() == expected
    assert len(chunks) == len(expected)

    batch = chunks.gather(chunks.starts)
    for i, row in enumerate(expected):
        e, k = data.observations[row].tolist()
        steps = [min(k + j, length[int(e)] - 1) for j in range(2 * horizon)]
        assert batch.actions[i].tolist() == [[e + 100, s + 100] for s in steps[:horizon]]
        assert batch.valid[i].tolist() == [k + j < length[int(e)] for j in range(horizon)]
        total, alive = 0.0, True
        for j in range(horizon):
            if alive and batch.valid[i, j]:
                total += GAMMA**j * data.rewards[row + j].item()
                alive = not data.terminals[row + j]
        assert batch.rewards[i].item() == pytest.approx(total, abs=1e-5)
        assert batch.masks[i].item() == float(alive)
        if alive:
            assert batch.next_observations[i].tolist() == [e, k + horizon]
        if need == "next_actions" and alive:
            assert batch.next_actions[i].tolist() == [[e + 100, s + 100] for s in steps[horizon:]]
    assert torch.equal(batch.observations, data.observations[batch.rows])
    assert batch.discount == pytest.approx(GAMMA**horizon)
    assert (batch.next_actions is None) == (need != "next_actions")


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_ever_paired_across_an_end(seed: int) -> None:
    data = identifiable(seed, episodes=30, longest=15)
    chunks = Chunks(data, 3, GAMMA, "next_actions")
    batch = chunks.sample(2000, torch.Generator().manual_seed(seed))
    episode = batch.observations[:, :1]
    assert bool((batch.actions[..., 0] == episode + 100).all())
    assert bool((batch.next_actions[..., 0] == episode + 100).all())
    assert bool((batch.next_observations[:, :1] == episode).all())


def test_a_time_limit_bootstraps_from_its_own_next_state() -> None:
    data = identifiable(0, episodes=1, longest=12)
    n = len(data)
    data = replace(data, terminals=torch.zeros(n, dtype=torch.bool))
    last = Chunks(data, n, GAMMA, "next_state").gather(torch.tensor([0]))
    assert last.masks.item() == 1
    assert last.next_observations.tolist() == [[0.0, float(n)]]  # stored nowhere as an observation
    with pytest.raises(ValueError, match=rf"at least {2 * n} steps.*at most {n}"):
        Chunks(data, n, GAMMA, "next_actions")


def test_a_success_shorter_than_the_chunk_is_kept_for_critics_only() -> None:
    data = identifiable(0, episodes=1, longest=12)
    data = Episodes(**{name: column[-2:] for name, column in vars(data).items()})
    data = replace(data, terminals=torch.tensor([False, True]))
    batch = (chunks := Chunks(data, 5, GAMMA, "next_actions")).gather(chunks.starts)
    assert batch.masks.tolist() == [0, 0]
    assert batch.valid.sum(1).tolist() == [2, 1]
    torch.testing.assert_close(batch.rewards[0], data.rewards[0] + GAMMA * data.rewards[1])
    with pytest.raises(ValueError, match="lower the horizon"):
        Chunks(data, 5, GAMMA, "actions")


def test_sarsa_on_true_returns_reproduces_them() -> None:
    """``R + gamma^H mask G(s', a'_stored) = G(s, a)``: pairing, masks and returns agree with each other."""
    data = identifiable(3, episodes=40)
    returns = monte_carlo_target(data.rewards, data.terminals, data.ends, GAMMA)
    batch = (chunks := Chunks(data, 3, GAMMA, "next_actions")).gather(chunks.starts)
    following = returns[(batch.rows + 3).clamp(max=len(data) - 1)]
    y = sarsa_target(batch.rewards, batch.discount, batch.masks, following)
    torch.testing.assert_close(y, returns[batch.rows], atol=1e-5, rtol=1e-5)


def test_sampling_reaches_every_start_and_depends_on_the_seed_alone() -> None:
    chunks = Chunks(identifiable(0), 2, GAMMA, "next_state")
    draws = [chunks.sample(1000, torch.Generator().manual_seed(s)).rows for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0].unique(), chunks.starts)


def ogbench_columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(4, 3)),
        "next_observations": rng.normal(size=(4, 3)),
        "actions": rng.normal(size=(4, 2)),
        "rewards": np.array([-1.0, 0.0, -1.0, -1.0]),
        "masks": np.array([1.0, 0.0, 1.0, 1.0]),
        "terminals": np.array([0.0, 0.0, 0.0, 1.0]),
    }


def test_ogbench_masks_are_terminals_and_its_terminals_are_ends() -> None:
    columns = ogbench_columns()
    data = Episodes.from_ogbench(columns)
    assert data.terminals.tolist() == [False, True, False, False]
    assert data.ends.tolist() == [False, False, False, True]
    for name in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_allclose(getattr(data, name), columns[name], rtol=1e-6)
    del columns["masks"]
    with pytest.raises(KeyError, match=r"no \['masks'\]"):
        Episodes.from_ogbench(columns)


def test_inconsistent_columns_are_refused() -> None:
    columns = ogbench_columns()
    with pytest.raises(ValueError, match="one row per step"):
        Episodes.from_ogbench(columns | {"actions": columns["actions"][:3]})
    with pytest.raises(ValueError, match="True on the last row"):
        Episodes.from_ogbench(columns | {"terminals": np.zeros(4)})


def test_the_fingerprint_is_of_the_content() -> None:
    data = identifiable(0)
    assert data.fingerprint() == identifiable(0).fingerprint()
    assert data.fingerprint() == data.to("cpu").fingerprint()
    for name in ("rewards", "actions", "next_observations"):
        assert replace(data, **{name: getattr(data, name) + 1}).fingerprint() != data.fingerprint()
    assert replace(data, terminals=~data.terminals).fingerprint() != data.fingerprint()

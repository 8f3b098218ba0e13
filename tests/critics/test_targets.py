"""Regression targets: identities that each formula must satisfy."""

import pytest
import torch

from qsteer.critics import (
    chunk_return,
    expectile_loss,
    iql_target,
    monte_carlo_target,
    pessimistic,
    sarsa_target,
    td_target,
)

GAMMA = 0.9


def test_a_chunk_return_stops_at_its_first_terminal_and_at_missing_steps() -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(200, 6, generator=g, dtype=torch.float64)
    terminals = torch.rand(200, 6, generator=g) < 0.2
    valid = torch.arange(6) < torch.randint(1, 7, (200, 1), generator=g)
    returns, masks = chunk_return(rewards, terminals, valid, GAMMA)
    for i in range(200):
        expected, over = 0.0, False
        for k in range(6):
            if valid[i, k] and not over:
                expected += GAMMA**k * rewards[i, k].item()
                over = bool(terminals[i, k])
        assert returns[i].item() == pytest.approx(expected, abs=1e-12)
        assert masks[i].item() == (0.0 if over else 1.0)


def test_monte_carlo_returns_tell_a_terminal_from_a_time_limit() -> None:
    rewards = torch.full((5,), -1.0, dtype=torch.float64)
    ends = torch.tensor([False, True, False, False, True])
    terminals = torch.tensor([False, True, False, False, False])
    solved = [-1 - GAMMA, -1.0]
    endless = -1 / (1 - GAMMA)
    returns = monte_carlo_target(rewards, terminals, ends, GAMMA)
    torch.testing.assert_close(returns, torch.tensor([*solved, *[endless] * 3], dtype=torch.float64))
    after = torch.tensor([9.0, 9.0, 9.0, 9.0, 5.0], dtype=torch.float64)  # read at the truncated end only
    bootstrapped = monte_carlo_target(rewards, terminals, ends, GAMMA, bootstrap=after)
    cut = [-1 + GAMMA * (-1 + GAMMA * (-1 + GAMMA * 5)), -1 + GAMMA * (-1 + GAMMA * 5), -1 + GAMMA * 5]
    torch.testing.assert_close(bootstrapped, torch.tensor([*solved, *cut], dtype=torch.float64))


def test_monte_carlo_returns_stop_at_a_success_within_a_trajectory() -> None:
    rewards = torch.tensor([-1.0, 0.0, -1.0, 0.0])
    terminals = torch.tensor([False, True, False, True])
    ends = torch.tensor([False, False, False, True])
    assert monte_carlo_target(rewards, terminals, ends, GAMMA).tolist() == [-1.0, 0.0, -1.0, 0.0]


def test_undiscounted_returns_of_truncated_data_need_a_bootstrap() -> None:
    one = torch.ones(1)
    truncated, ends = torch.tensor([False]), torch.tensor([True])
    with pytest.raises(ValueError, match="gamma < 1"):
        monte_carlo_target(one, truncated, ends, 1.0)
    assert monte_carlo_target(one, truncated, ends, 1.0, bootstrap=one).item() == 2.0
    assert monte_carlo_target(one, ends, ends, 1.0).item() == 1.0


@pytest.mark.parametrize("target", [sarsa_target, td_target, iql_target])
def test_a_bootstrapped_target_closes_the_recursion_of_returns(target: object) -> None:
    """``R + gamma^H G_{t+H} = G_t``: the targets' fixed point is the return."""
    g = torch.Generator().manual_seed(0)
    rewards, ends = torch.randn(30, generator=g, dtype=torch.float64), torch.arange(30) == 29
    returns = monte_carlo_target(rewards, ends, ends, GAMMA)
    chunks, over = rewards.unfold(0, 3, 1), ends.unfold(0, 3, 1)
    reward, mask = chunk_return(chunks, over, torch.ones_like(over), GAMMA)
    following = torch.cat([returns[3:], torch.tensor([torch.inf], dtype=torch.float64)])
    following = torch.where(mask == 0, 123.0, following)  # what lies behind a terminal does not matter
    torch.testing.assert_close(target(reward, GAMMA**3, mask, following), returns[:28])


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
def test_the_expectile_loss_is_minimal_at_the_expectile(expectile: float) -> None:
    q = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = q.min(), q.max()
    for _ in range(
        60
    ):  # the expectile balances its weighted distances: tau E[(q - v)+] = (1 - tau) E[(v - q)+]
        v = (low + high) / 2
        above = expectile * (q - v).clamp(min=0).mean() > (1 - expectile) * (v - q).clamp(min=0).mean()
        low, high = (v, high) if above else (low, v)
    v = v.requires_grad_()
    (slope,) = torch.autograd.grad(expectile_loss(q - v, expectile).mean(), v)
    assert abs(slope.item()) < 1e-9
    if expectile == 0.5:
        assert v.item() == pytest.approx(q.mean().item())


def test_pessimism_of_two_with_rho_one_is_the_minimum() -> None:
    q = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pessimistic(q, 1.0), q.min(0).values)
    torch.testing.assert_close(pessimistic(q, -1.0), q.max(0).values)
    assert torch.equal(pessimistic(q[:1], 3.0), q[0])


def test_pessimism_of_an_agreeing_ensemble_has_a_finite_gradient() -> None:
    q = torch.ones(3, 2, requires_grad=True)
    (g,) = torch.autograd.grad(pessimistic(q, 0.5).sum(), q)
    torch.testing.assert_close(g, torch.full((3, 2), 1 / 3))

"""Regression targets and losses of critics, as pure functions of tensors.

A chunk transition is ``(s_t, a_t .. a_{t+H-1}, R, gamma^H, mask, s_{t+H})`` with ``R = sum_{k<H} gamma^k
r_{t+k}`` and mask 0 when the chunk contains a terminal (nothing follows) and 1 otherwise. A time limit is not
a terminal: the world goes on after it, so it bootstraps.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def pessimistic(members: Float[Tensor, "J *B"], rho: float) -> Float[Tensor, "*B"]:
    """Return ``mean_j Q_j - rho std_j Q_j`` (population std; rho = 1 is the minimum when J = 2)."""
    mean = members.mean(0)
    return mean if rho == 0 or len(members) == 1 else mean - rho * members.std(0, correction=0)


def chunk_return(
    rewards: Float[Tensor, "*B H"],
    terminals: Bool[Tensor, "*B H"],
    valid: Bool[Tensor, "*B H"],
    gamma: float,
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Sum a chunk's rewards up to and including its first terminal.

    Args:
        rewards: reward of each step.
        terminals: true on steps after which the task is over.
        valid: false on steps which the trajectory does not have.
        gamma: discount per step.

    Returns:
        ``R = sum_k gamma^k r_k``, and the bootstrap mask: 0 when a valid step is terminal, else 1.
    """
    over = (terminals & valid).long().cumsum(-1)
    alive = valid & ((over == 0) | ((over == 1) & terminals))
    discounts = gamma ** torch.arange(rewards.shape[-1], device=rewards.device, dtype=rewards.dtype)
    return (rewards * discounts * alive).sum(-1), (over[..., -1] == 0).to(rewards.dtype)


def sarsa_target(
    reward: Float[Tensor, "B"],
    discount: float | Float[Tensor, "B"],
    mask: Float[Tensor, "B"],
    next_q: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """Return ``R + gamma^H mask Qbar'(s', a'_stored)``: the value of the policy that collected the data.

    Args:
        reward: chunk return R.
        discount: gamma^H.
        mask: 0 past a terminal, else 1.
        next_q: pessimistic target value of the stored next chunk.
    """
    return _bootstrap(reward, discount, mask, next_q)


def td_target(
    reward: Float[Tensor, "B"],
    discount: float | Float[Tensor, "B"],
    mask: Float[Tensor, "B"],
    next_q: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """Return ``R + gamma^H mask Qbar'(s', a')`` with a' sampled now, usually from the steered policy.

    Arguments as for :func:`sarsa_target`, but for ``next_q``: the pessimistic target value of a'.
    """
    return _bootstrap(reward, discount, mask, next_q)


def iql_target(
    reward: Float[Tensor, "B"],
    discount: float | Float[Tensor, "B"],
    mask: Float[Tensor, "B"],
    next_v: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """Return ``R + gamma^H mask V(s')`` (IQL); V is fitted with :func:`expectile_loss`, without a policy.

    Arguments as for :func:`sarsa_target`, but for ``next_v``: the state value after the chunk.
    """
    return _bootstrap(reward, discount, mask, next_v)


def expectile_loss(difference: Float[Tensor, "*B"], expectile: float) -> Float[Tensor, "*B"]:
    """Return ``|expectile - 1(u < 0)| u^2`` for ``u = Qbar'(s, a) - V(s)`` (IQL eq. 5)."""
    return (expectile - (difference < 0).to(difference.dtype)).abs() * difference.square()


def monte_carlo_target(
    rewards: Float[Tensor, "N"],
    terminals: Bool[Tensor, "N"],
    ends: Bool[Tensor, "N"],
    gamma: float,
    *,
    bootstrap: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "N"]:
    """Return ``G_t = r_t + gamma G_{t+1}`` for each row of trajectories that are stored one after another.

    ``G_{t+1}`` is 0 after a terminal; after an end that is not a terminal (a time limit) it is
    ``bootstrap``.

    Cost: one pass over the rows, in Python.

    Args:
        rewards: reward of each row.
        terminals: true where the task is over: nothing follows.
        ends: true on the last stored row of each trajectory.
        gamma: discount per step.
        bootstrap: value of what follows each row, read at truncated ends only. ``None``: the last reward
            repeats for ever, ``r / (1 - gamma)``, which for a cost per step until success means that success
            never comes.

    Raises:
        ValueError: ``bootstrap`` is ``None`` and gamma is 1, for which a return without end has no value.
    """
    if bootstrap is None:
        if gamma >= 1 and bool((ends & ~terminals).any()):
            raise ValueError(
                f"monte_carlo_target: expected gamma < 1 to bootstrap truncated trajectories, got {gamma}; "
                "lower gamma or pass bootstrap="
            )
        bootstrap = rewards / (1 - gamma) if gamma < 1 else rewards
    following = torch.where(terminals, 0.0, bootstrap).tolist()
    stop = (terminals | ends).tolist()
    returns = rewards.tolist()
    for i in range(len(returns) - 1, -1, -1):
        returns[i] += gamma * (following[i] if stop[i] else returns[i + 1])
    return torch.tensor(returns, dtype=rewards.dtype, device=rewards.device)


def _bootstrap(
    reward: Float[Tensor, "B"],
    discount: float | Float[Tensor, "B"],
    mask: Float[Tensor, "B"],
    following: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """Return what the chunk brought and, unless the task ended, the discounted value of what follows."""
    return reward + discount * mask * following

"""A velocity function as a policy, steered by the same mechanism as any other."""

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qsteer.checks import check_bounds
from qsteer.clock import PAPER, Clock
from qsteer.contract import Contract
from qsteer.flow import expand_time
from qsteer.hosts import Host, HostField
from qsteer.types import Bounds


def prepare_plain(policy: Any) -> Callable[[HostField], HostField]:
    """Return what prepares the policy's fields for the fast path."""
    return as_it_is


def as_it_is(field: HostField) -> HostField:
    """Return the field: a plain velocity has nothing to prepare."""
    return field


class PlainPolicy(nn.Module):
    """A policy made of a velocity: draws noise, integrates with Euler's method, and knows where its loop is.

    Args:
        velocity: ``(x: (B, H, A), t: (B,), obs) -> (B, H, A)`` in the clock's time and sign; a module
            becomes a part of the policy.
        horizon: steps H of a chunk.
        action_dim: dimensions A of an action.
        steps: number of Euler steps.
        executed: how many steps of a chunk are executed; None: all.
        clock: the velocity's convention, :data:`qsteer.clock.PAPER` (t = 0 noise, pointing to the action) or
            :data:`qsteer.clock.MIRRORED` (u = 1 noise, velocity = noise - action); its ``steps`` is not read.
        bounds: lowest and highest entry of a clean action; None: there are none, as for actions normalised
            by mean and standard deviation.
        contract: what its observations and actions are, which a critic's must fit; None: not known.

    Raises:
        ValueError: a size is out of its range, or ``bounds`` are not ``(low, high)``.

    Example:
        >>> policy = PlainPolicy(lambda x, t, obs: obs[:, None, None] - x, horizon=5, action_dim=2)
        >>> policy.predict_action_chunk(torch.zeros(3)).shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        velocity: Callable[..., Tensor],
        horizon: int,
        action_dim: int,
        *,
        steps: int = 10,
        executed: int | None = None,
        clock: Clock = PAPER,
        bounds: Bounds = (-1.0, 1.0),
        contract: Contract | None = None,
    ) -> None:
        super().__init__()
        executed = horizon if executed is None else executed
        if min(action_dim, steps, executed) < 1 or executed > horizon:
            raise ValueError(
                "PlainPolicy: expected action_dim and steps of at least 1 and 1 <= executed <= horizon, got "
                f"action_dim={action_dim}, steps={steps}, executed={executed}, horizon={horizon}"
            )
        check_bounds(bounds)
        self.bounds = bounds
        self.velocity, self.horizon, self.action_shape = velocity, horizon, (horizon, action_dim)
        self.steps, self.executed, self.clock = steps, executed, clock
        self.contract = contract or Contract()

    @property
    def __qsteer_host__(self) -> Host:
        """Where the loop is."""
        return Host(
            serves="PlainPolicy",
            entry="sample_actions",
            step="denoise_step",
            batch="predict_action_chunk",
            clock=self.clock,
            steps="steps",
            executed="executed",
            action_shape="action_shape",
            chunk="horizon",
            features=itemgetter("obs"),
            prepare=prepare_plain,
            whole=attrgetter("velocity", "action_shape", "steps", "executed", "clock", "bounds"),
            bounds=self.bounds,
            contract=attrgetter("contract"),
        )

    @torch.no_grad()
    def predict_action_chunk(
        self, obs: Any, noise: Float[Tensor, "B H A"] | None = None, num_steps: int | None = None
    ) -> Float[Tensor, "B H A"]:
        """Return one chunk per observation.

        Args:
            obs: a tensor, or nested dicts, lists and tuples of tensors, one leading row per observation.
            noise: standard normal; None: drawn from torch's global generator.
            num_steps: Euler steps of this call; None: the policy's.
        """
        return self.sample_actions(obs, noise=noise, num_steps=num_steps)

    def sample_actions(
        self, obs: Any, noise: Float[Tensor, "B H A"] | None = None, num_steps: int | None = None
    ) -> Float[Tensor, "B H A"]:
        """Integrate the velocity from ``noise``; arguments as for :meth:`predict_action_chunk`."""
        if noise is None:
            first = next(leaf for leaf in pytree.tree_leaves(obs) if isinstance(leaf, Tensor))
            noise = torch.randn(len(first), *self.action_shape, device=first.device)
        x = noise
        for t, dt in self.clock.grid(self.steps if num_steps is None else num_steps):
            time = expand_time(self.clock.to_host(t), x, torch.float32)
            x = x + dt * self.clock.velocity(self.denoise_step(x_t=x, timestep=time, obs=obs))
        return x

    def denoise_step(self, x_t: Float[Tensor, "B H A"], timestep: Float[Tensor, "B"], obs: Any) -> Tensor:
        """Return the velocity in the clock's convention."""
        return self.velocity(x_t, timestep, obs)

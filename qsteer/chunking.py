"""Real-time chunking: a new chunk that continues the one which is being executed, steered where it is free.

While an action is computed, the robot goes on with what is left of the former chunk, Y. Real-time chunking
(Black et al., arXiv 2506.07339) pulls the denoised action D(x, t) towards Y, by weights W in [0, 1] for each
step: 1 on the steps that will have been executed by then, falling to 0 where the new chunk is free,

    ``v_held = v + w(t) W (Y - D(x, t))``,  ``w(t) = min((t^2 + (1 - t)^2) / (t (1 - t)), most)``,

with the identity in place of D's Jacobian, as lerobot has it. Steering leaves that as it is. The critic
judges the chunk that will be executed, ``W Y + (1 - W) D``, and its push acts where the chunk is free:

    ``v <- v_held + (1 - W) push``.

Both start from the same v(x, t), which is evaluated once. The pull is taken from the policy's own D, not from
the steered one: early in a chain w(t) overshoots, and would turn a push into its opposite where W is between.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import Clock, Time
from qsteer.flow import denoise, factor
from qsteer.types import Bounds, Field, Value

type Schedule = Literal["zeros", "ones", "linear", "exp"]
"""How the weights fall between the delay and the horizon: at once, not at all, linearly, exponentially."""


@dataclass(frozen=True)
class Held(Field):
    """A policy's velocity, held to what is left of its former chunk.

    Attributes:
        field: the policy's own velocity.
        previous: (B, H, A) what is left of the former chunk, padded with zeros.
        weights: (H, 1) how firmly each step is held to it, from 0 (free) to 1.
        most: largest weight of the pull.
    """

    field: Field
    previous: Float[Tensor, "B H A"]
    weights: Float[Tensor, "H 1"]
    most: float = 10.0

    def __call__(self, x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Return the held velocity."""
        return self.hold(self.field(x, t), x, t)

    def hold(self, v: Float[Tensor, "B H A"], x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Return the held velocity, given the policy's own at (x, t)."""
        rows = torch.as_tensor(t, dtype=torch.float64)
        pull = ((rows**2 + (1 - rows) ** 2) / (rows * (1 - rows))).clamp(max=self.most)
        pull = factor(pull if isinstance(t, Tensor) else float(pull), x) * self.weights
        return v + pull * (self.previous - denoise(x, v, t))

    @property
    def held(self) -> bool:  # type: ignore[override]
        """It is."""
        return True

    @property
    def free(self) -> Field:
        """The policy's own velocity."""
        return self.field

    def judged(self, value: Value) -> "HeldValue":
        """Return the value of the chunk that will be executed."""
        return HeldValue(value, self.previous, self.weights)

    def repeat(self, k: int) -> "Held":
        """Return the field for ``k`` rows per observation, which share what is left of the chunk."""
        return replace(self, field=self.field.repeat(k), previous=self.previous.repeat_interleave(k, 0))

    @property
    def clock(self) -> Clock:  # type: ignore[override]
        """The policy's clock."""
        return self.field.clock

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]
        """The policy's bounds."""
        return self.field.bounds

    @property
    def features(self) -> Any:
        """The policy's features."""
        return self.field.features

    @property
    def dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """What the policy computes in."""
        return self.field.dtype


@dataclass(frozen=True)
class HeldValue(Value):
    """A critic's value of ``W Y + (1 - W) a``: of a chunk whose first steps are not for it to choose."""

    value: Value
    previous: Float[Tensor, "B H A"]
    weights: Float[Tensor, "H 1"]

    @cached_property
    def mask(self) -> Float[Tensor, "H A"]:  # type: ignore[override]
        """What the critic sees, times how free it is."""
        free = (1 - self.weights).expand(self.previous.shape[1:])
        return free if self.value.mask is None else free * self.value.mask

    def executed(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Return the chunk that will be executed."""
        return torch.lerp(a, self.previous.to(a.dtype), self.weights.to(a.dtype))

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the value of each chunk."""
        return self.value(self.executed(a))

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return what each ensemble member says."""
        return self.value.members(self.executed(a))

    def repeat(self, k: int) -> "HeldValue":
        """Return the value for ``k`` rows per observation."""
        return replace(self, value=self.value.repeat(k), previous=self.previous.repeat_interleave(k, 0))


def continued(
    field: Field,
    previous: Float[Tensor, "B P A"],
    horizon: int,
    *,
    delay: int,
    until: int | None = None,
    schedule: str = "linear",
    most: float = 10.0,
) -> Held:
    """Hold a velocity of your own to the former chunk; lerobot's policies do it themselves.

    Steer it as any other: ``qsteer.sample(continued(...), value, noise, rule=...)``.

    Cost per Euler step: no velocity.

    Args:
        field: the policy's velocity.
        previous: what is left of the former chunk when the observation is made: P steps in model space.
        horizon: steps H of a chunk.
        delay: steps that will have been executed when the new chunk is there: these are held firmly.
        until: steps from which the chunk is free; None: P.
        schedule: how the weights fall in between, a :data:`Schedule`.
        most: largest weight of the pull.

    Raises:
        ValueError: a number or a shape is out of its range, or the schedule is unknown.

    Example:
        >>> import torch, qsteer
        >>> former, field = torch.zeros(1, 5, 2), qsteer.field(lambda x, t: 1 - x)
        >>> held = continued(field, former[:, 2:], 5, delay=1)
        >>> qsteer.sample(held, None, torch.zeros(1, 5, 2))[0, :, 0].abs().round(decimals=1)
        tensor([0.0000, 0.0000, 0.2000, 0.7000, 0.7000])
    """
    if previous.ndim != 3 or not 1 <= previous.shape[1] <= horizon:
        raise ValueError(
            f"previous: expected (B, P, A) with 1 to {horizon} steps P, got {tuple(previous.shape)}; give "
            "what is left of the former chunk, or the field itself if nothing is"
        )
    steps = previous.shape[1]
    until = steps if until is None else until
    if not (0 <= delay <= until <= steps):
        raise ValueError(
            f"delay, until: expected 0 <= delay <= until <= {steps}, the steps that are left, got {delay} "
            f"and {until}; ask for the next chunk earlier"
        )
    if not 0 < most < float("inf"):
        raise ValueError(f"most: expected a finite number above 0, got {most}")
    padded = torch.nn.functional.pad(previous, (0, 0, 0, horizon - steps))
    weights = prefix_weights(schedule, delay, until, horizon).to(previous)[:, None]
    return Held(field, padded.detach(), weights, most)


def prefix_weights(schedule: str, delay: int, until: int, horizon: int) -> Float[Tensor, "H"]:
    """Return how firmly each step of a chunk is held to the former one (arXiv 2506.07339, eq. 5).

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule not in (known := get_args(Schedule.__value__)):
        raise ValueError(f"schedule: expected one of {', '.join(known)}, got {schedule!r}")
    step = torch.arange(horizon)
    fall = ((until - step) / (until - delay + 1)).clamp(0, 1)
    if schedule == "exp":
        fall = fall * torch.expm1(fall) / (torch.e - 1)
    between = {"zeros": torch.zeros(horizon), "ones": torch.ones(horizon)}.get(schedule, fall)
    return torch.where(step < delay, 1.0, torch.where(step < until, between, 0.0))

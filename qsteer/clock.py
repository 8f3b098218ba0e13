"""Time and sign conventions of hosts. The only file that knows which end is noise."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

type Time = float | Float[Tensor, "B"]
"""One time for all rows, a float, or one per row. A float never travels to the device and back."""


@dataclass(frozen=True)
class Clock:
    """How a host counts time, and which way its velocity points.

    Paper time runs from 0 (noise) to 1 (action) and the paper's velocity points to the action. Hosts evaluate
    their network at float32 host times; :meth:`grid` gives those very numbers back, so that an unguided chain
    is bit for bit the host's own.

    Args:
        noise: host time of pure noise.
        action: host time of the clean action.
        sign: +1 when the host's velocity points to the action, -1 when it points to the noise.
        steps: number of Euler steps when the sampler names none.
        count: how the host comes to the time of step i: ``index``, ``noise + i * step``; ``sum``, adding its
            float32 step up, as openpi does; ``linspace``, by ``torch.linspace``, whose differences are steps.

    Raises:
        ValueError: noise and action at the same time, a sign that is not one, or fewer than one step.
    """

    noise: float = 0.0
    action: float = 1.0
    sign: int = 1
    steps: int = 10
    count: Literal["index", "sum", "linspace"] = "index"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.noise == self.action or self.sign not in (-1, 1) or self.steps < 1:
            raise ValueError(
                "Clock: expected noise and action at different host times, sign -1 or 1 and at least one "
                f"step, got {self}; "
                "openpi and lerobot's pi0 are Clock(noise=1.0, action=0.0, sign=-1)"
            )

    def grid(self, steps: int | None = None) -> Iterator[tuple[float, float]]:
        """Yield ``(t, dt)`` of each Euler step; ``t`` is exact for the host's float32 time."""
        steps = self.steps if steps is None else steps
        span, summed = self.action - self.noise, np.float32(self.noise)
        spaced = (
            torch.linspace(self.noise, self.action, steps + 1, dtype=torch.float32, device="cpu").numpy()
            if self.count == "linspace"
            else None
        )
        for i in range(steps):
            host, dt = float(np.float32(self.noise + i * (span / steps))), 1.0 / steps
            if self.count == "sum":
                host, summed = float(summed), summed + np.float32(span / steps)
            if spaced is not None:
                host, dt = float(spaced[i]), abs(float(spaced[i + 1] - spaced[i])) / abs(span)
            yield abs(host - self.noise) / abs(span), dt  # abs: never -0.0, whose 1/t is -inf

    def snap(self, t: Time) -> Time:
        """Return the nearest times that are exact for the host's float32 time, as :meth:`grid`'s are.

        Times per row are to be float64, for float32 cannot hold ``1 - u`` for every float32 ``u``.
        """
        host = self.to_host(t)
        if isinstance(host, Tensor) and isinstance(t, Tensor):
            host = host.to(t.dtype)
        return (host - self.noise) / (self.action - self.noise) + 0.0  # never -0.0

    def to_host(self, t: Time) -> Time:
        """Return the host time of paper time ``t``, rounded to float32 as hosts want it."""
        host = self.noise + t * (self.action - self.noise)
        return host.to(torch.float32) if isinstance(host, Tensor) else float(np.float32(host))

    def exact(self, t: float, steps: int | None = None) -> float:
        """Return the host time of which :meth:`grid` rounded to give ``t``; off the grid, that of ``t``."""
        steps = self.steps if steps is None else steps
        host = self.noise + round(t * steps) * ((self.action - self.noise) / steps)
        return host if float(np.float32(host)) == self.to_host(t) else float(self.to_host(t))

    def velocity(self, host_velocity: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Return the paper's velocity for a host's."""
        return self.sign * host_velocity


def whole_steps(t: Float[Tensor, "B"], count: int) -> Tensor:
    """Return ``int(t * count)`` of host times i / n, as hosts compute it from times in double precision."""
    return (t.double() * count + 1e-4).long()  # float32 may lie under the host's own


PAPER = Clock()
"""t = 0 noise, t = 1 action, ten steps: GR00T, evo1, wall_x, and every field made by :func:`qsteer.field`."""

MIRRORED = Clock(noise=1.0, action=0.0, sign=-1)
"""u = 1 noise, u = 0 action, velocity = noise - action: openpi and lerobot's pi0, pi05, smolvla, eo1."""


@dataclass(frozen=True)
class Chain:
    """Equal Euler steps from a time to the action. They are counted from noise, as if they began there.

    Attributes:
        start: time of the first step.
        stride: time between two steps.
    """

    start: Time = 0.0
    stride: Time = 0.1

    def index(self, t: Time) -> int | Tensor:
        """Return the number of the step at time ``t``; of each row, if times are per row."""
        before, index = self.start / self.stride, (t - self.start) / self.stride
        if isinstance(before, Tensor) or isinstance(index, Tensor):
            return torch.as_tensor(before).round() + torch.as_tensor(index).round()
        return round(before) + round(index)

    def first(self, t: float) -> int | Tensor:
        """Return the number of the first step at or after time ``t``."""
        before, first = self.start / self.stride, (t - self.start) / self.stride
        if isinstance(before, Tensor) or isinstance(first, Tensor):
            return torch.as_tensor(before).round() + torch.as_tensor(first).ceil()
        return round(before) + math.ceil(first)

    def rest(self, now: float, clock: Clock) -> list[tuple[float, float]]:
        """Return ``(t, dt)`` of the steps from the time ``now`` on; all rows share them."""
        both = self.start, self.stride
        start, stride = (float(s.flatten()[0]) if isinstance(s, Tensor) else s for s in both)
        n, done = round((1 - start) / stride), round((now - start) / stride)
        if start == 0:
            return list(clock.grid(n))[done:]
        return [(float(clock.snap(start + i * stride)), stride) for i in range(done, n)]

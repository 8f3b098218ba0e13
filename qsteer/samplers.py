"""Samplers: how a field, steered or not, becomes an action.

The caller's noise is candidate 0 of every sampler, further candidates come from torch's global generator:
with one candidate a selecting sampler is its inner sampler, bit for bit.
"""

from dataclasses import dataclass
from dataclasses import field as attribute

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import clock_of
from qsteer.flow import finite_rows
from qsteer.rules import check_bounds, gradient
from qsteer.trace import report_fallbacks
from qsteer.types import Bounds, Field, Sampler, Value


@dataclass(frozen=True)
class Euler(Sampler):
    """Forward Euler from noise to action, on the host's own step grid.

    Cost: ``steps`` velocity forwards.

    Args:
        steps: number of steps; None: the field's own number (a host's configuration, 10 on a bare field).
        clip: bounds of the finished action; None: no clipping, which suits hosts whose model space is
            unbounded.

    Raises:
        ValueError: fewer than one step, or bounds out of order.
    """

    steps: int | None = None
    clip: Bounds = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}; pi0 uses 10, GR00T 4")
        check_bounds(self.clip)

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Integrate the field from ``noise``."""
        x, clock = noise, clock_of(field)
        for t, dt in clock.grid(self.steps):
            x = x + dt * field(x, clock.times(t, x))
        return x if self.clip is None else x.clamp(*self.clip)


@dataclass(frozen=True)
class _OfN(Sampler):
    """What best-of-n and random-of-n share."""

    n: int
    inner: Sampler = attribute(default_factory=Euler)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.n < 1:
            raise ValueError(f"{type(self).__name__}: expected n of at least 1 candidate, got {self.n}")


@dataclass(frozen=True)
class BestOfN(_OfN):
    """The best of n candidates by value. All run as one batch on one prefix.

    Non-finite values never win; a row without any finite value keeps candidate 0 and counts as a fallback.

    Cost: that of ``inner`` on n rows per observation, and 1 critic forward on n rows.

    Args:
        n: candidates per observation.
        inner: makes each candidate.

    Raises:
        ValueError: fewer than one candidate.
    """

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the candidate with the highest value."""
        if self.n == 1:
            return self.inner(field, value, noise)
        field, value = field.repeat(self.n), needed(value, self).repeat(self.n)
        a = self.inner(field, value, rearrange(candidates(noise, self.n), "b n h a -> (b n) h a"))
        a, q = rearrange(a, "(b n) h a -> b n h a", n=self.n), rearrange(value(a), "(b n) -> b n", n=self.n)
        q = torch.where(torch.isfinite(q), q, -torch.inf)
        report_fallbacks(q.amax(1) == -torch.inf)
        return take(a, torch.where(q.amax(1) == -torch.inf, 0, q.argmax(1)))


@dataclass(frozen=True)
class RandomOfN(_OfN):
    """Control arm of best-of-n: one of the same n candidates, at random.

    A gain it shares is no gain of the critic's. Only the drawn candidate is integrated.

    Cost: that of ``inner``.

    Args:
        n: candidates per observation.
        inner: makes the candidate.

    Raises:
        ValueError: fewer than one candidate.
    """

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return a random candidate."""
        if self.n == 1:
            return self.inner(field, value, noise)
        pool = candidates(noise, self.n)
        pick = torch.randint(self.n, noise.shape[:1], device=noise.device)
        return self.inner(field, value, take(pool, pick))


@dataclass(frozen=True)
class TrustRegion(Sampler):
    """FMQ's closed-form projection on a finished action: ``a + eta_eff * g / ||g||`` (FMQ eq. 11 to 13).

    ``a + eta g / ||g||`` maximises the linearised value in a ball of radius eta around the policy's action;
    beta > 0 shrinks the ball where the ensemble disagrees. The moved action is not clipped again.

    Cost: that of ``inner``, and 1 critic forward and backward (one more forward when beta > 0).

    Args:
        eta: radius, in the norm of the whole chunk (over the entries which the critic sees).
        beta: shrinkage by disagreement, see :func:`trust_radius`.
        inner: makes the action.

    Raises:
        ValueError: a negative radius or shrinkage.
    """

    eta: float = 0.3
    beta: float = 0.0
    inner: Sampler = attribute(default_factory=Euler)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not (0 <= self.eta < float("inf") and 0 <= self.beta < float("inf")):
            raise ValueError(f"eta, beta: expected finite numbers of at least 0, got {self.eta}, {self.beta}")

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the projected action; rows without a finite gradient keep the action."""
        value = needed(value, self)
        a = self.inner(field, value, noise)
        if self.eta == 0:
            return a
        with torch.enable_grad():
            x = a.detach().requires_grad_()
            q = value(x)
            g = gradient(q, x)
        if (mask := getattr(value, "mask", None)) is not None:
            g = torch.where(mask.bool(), g, 0.0)
        members = value.members(a) if self.beta else torch.zeros_like(a[None, :, 0, 0])
        radius = trust_radius(self.eta, members, self.beta)
        moved = a + (radius / (g.flatten(1).norm(dim=1) + 1e-8))[:, None, None] * g
        finite = finite_rows(moved) & torch.isfinite(q)
        report_fallbacks(~finite)
        return torch.where(finite[:, None, None], moved, a)


@dataclass(frozen=True)
class KeepBest(Sampler):
    """Guard: the steered action, unless the same sampler on the unsteered field finds one of higher value.

    Both start from the caller's noise. It catches pushes that fail by the critic's own measure, which are
    rare; it cannot catch exploitation of the critic, whose mark is a higher value.

    Cost: that of ``inner`` twice, steered and not, and 2 critic forwards.

    Args:
        inner: makes both actions.
    """

    inner: Sampler = attribute(default_factory=Euler)

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the better of the two actions."""
        value = needed(value, self)
        steered = self.inner(field, value, noise)
        base = self.inner(getattr(field, "base", field), value, noise)
        q, q_base = value(steered), value(base)
        better = torch.isfinite(q) & ~(torch.isfinite(q_base) & (q_base > q))
        report_fallbacks(~torch.isfinite(q))
        return torch.where(better[:, None, None], steered, base)


def trust_radius(eta: float, q_members: Float[Tensor, "J B"], beta: float) -> Float[Tensor, "B"]:
    """Return the trust region's radius ``eta / (1 + beta * delta)`` (FMQ, Algorithm 1).

    delta is the ensemble's disagreement over its mean in the batch; the disagreement is ``sqrt(2)`` times the
    population std, which is FMQ's ``|Q1 - Q2| / sqrt(2)`` for two members.
    """
    delta = 2**0.5 * q_members.std(0, unbiased=False)
    return eta / (1 + beta * delta / (delta.nanmean() + 1e-8))


def candidates(noise: Float[Tensor, "B H A"], n: int) -> Float[Tensor, "B n H A"]:
    """Return the caller's noise and n - 1 fresh draws per observation."""
    fresh = torch.randn(len(noise), n - 1, *noise.shape[1:], device=noise.device, dtype=noise.dtype)
    return torch.cat([noise[:, None], fresh], dim=1)


def take(a: Float[Tensor, "B n H A"], pick: Tensor) -> Float[Tensor, "B H A"]:
    """Return candidate ``pick[b]`` of each observation b."""
    return a[torch.arange(len(a), device=a.device), pick]


def needed(value: Value | None, sampler: Sampler) -> Value:
    """Return the value, or say that the sampler cannot do without."""
    if value is None:
        raise ValueError(
            f"{type(sampler).__name__}: expected a value to select by, got None; pass critic.bind(obs) or "
            "qsteer.value(fn)"
        )
    return value

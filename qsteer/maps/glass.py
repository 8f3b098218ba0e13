"""GLASS: the exact posterior flow of a frozen policy, from nothing but its velocity.

For an outer state (x, t) there is an *inner* flow that carries noise at u = 0 to a sample of the endpoint
posterior p(x1 | x_t = x) at u = 1. Its state ``xbar = (1 - u) x0' + u x1`` and ``x`` are two noisy looks at
the same x1; together they are one look ``x*`` of the better time ``t*``, where the policy can be asked.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from qsteer.checks import check_at_least, check_positive
from qsteer.clock import Time
from qsteer.flow import clamp_time, denoise, factor, hypot, repeat_time
from qsteer.types import Field, PosteriorSampler


class Glass(NamedTuple):
    """The posterior flow at one point: the policy's answer v at (x*, t*), and what makes a velocity of it."""

    offset: Float[Tensor, "B H A"]
    gain: float | Float[Tensor, "B 1 1"]
    v: Float[Tensor, "B H A"]

    @property
    def velocity(self) -> Float[Tensor, "B H A"]:
        """The velocity of the posterior flow."""
        return self.offset + self.gain * self.v


def glass(field: Field, x: Float[Tensor, "B H A"], t: Time, xbar: Float[Tensor, "B H A"], u: Time) -> Glass:
    """Ask the policy where outer and inner state are one look, see :func:`glass_velocity`.

    Written with ``p / r`` and ``s / r``, so that nothing is divided by the r that vanishes at t = u = 0.
    """
    p, s, q = t * (1 - u), (1 - t) * u, (1 - t) * (1 - u)
    r, outer, inner = to_polar(p, s)
    total = clamp_time(r + q, low=1e-12)
    best = factor((1 - u) * outer / total, x) * x + factor((1 - t) * inner / total, x) * xbar
    offset = factor(outer / total, x) * x + factor(((1 - t) * (inner - 1) - t * outer) / total, x) * xbar
    return Glass(offset, factor((1 - t) / total, x), field(best, r / total))


def to_polar(p: Time, s: Time) -> tuple[Time, Time, Time]:
    """Return ``r = hypot(p, s)``, ``p / r`` and ``s / r``; 0 and 1 where r vanishes."""
    r = hypot(p, s)
    if isinstance(r, Tensor):
        return r, torch.where(r > 0, p / r, 0.0), torch.where(r > 0, s / r, 1.0)
    return (r, p / r, s / r) if r > 0 else (0.0, 0.0, 1.0)


def glass_velocity(
    field: Field,
    x: Float[Tensor, "B H A"],
    t: Time,
    xbar: Float[Tensor, "B H A"],
    u: Time,
) -> Float[Tensor, "B H A"]:
    """Return the velocity of the posterior flow at inner time u and state ``xbar``, given (x, t).

    ``A x + B xbar + C v(x*, t*)`` (Meta Flow Maps, GLASS; QPILOTS appendix B). At t = 0 it is the policy's
    own velocity at (xbar, u); at u = 0 it is ``D(x, t) - xbar``.

    Cost: 1 velocity forward.

    Args:
        field: the policy's velocity.
        x: outer state.
        t: outer time, in [0, 1).
        xbar: inner state.
        u: inner time, in [0, 1].
    """
    return glass(field, x, t, xbar, u).velocity


@dataclass(frozen=True)
class GlassPosterior(PosteriorSampler):
    """Samples of the endpoint posterior from the frozen policy alone: no training, exact as steps grow.

    ``(eps: (N, B, H, A), x, t) -> x1: (N, B, H, A)``,
    differentiable in x. All N samples run as one batch on one prefix.

    The flow to a Gaussian as wide in all directions is exact from the second step on, for how far the
    policy's answers follow its questions says how wide it is. Inner times are denser where the answers begin
    to: late, if t is late. (Euler's steps at even times keep 60 % of the standard deviation early in the
    chain, and 30 % at t = 0.9.)

    Cost: ``steps`` velocity forwards on N rows; one less inside a rule, which knows v(x, t). With one step
    every sample is the denoised action itself.

    Args:
        field: the policy's velocity; a rule puts that of the policy which it steers.
        steps: of the inner flow.
        spread: standard deviation of an action's entries, given the observation, roughly: it places the
            inner times.

    Raises:
        ValueError: fewer than one step, or no spread.
    """

    field: Field | None = None
    steps: int = 4
    spread: float = 0.3

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_at_least(self, 1, "steps")
        check_positive(self, "spread")

    def on(self, field: Field) -> "GlassPosterior":
        """Return the same posterior of another policy: inside a rule, of the policy which is steered."""
        return replace(self, field=field)

    def repeat(self, k: int) -> "GlassPosterior":
        """Return the posterior for ``k`` rows per observation."""
        return self if self.field is None else replace(self, field=self.field.repeat(k))

    def __call__(
        self, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "N B H A"]:
        """Return one posterior sample per noise."""
        return self._flow(None, eps, x, t)

    def draw(
        self, field: Field, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> tuple[Float[Tensor, "B H A"], Float[Tensor, "N B H A"]]:
        """Return v(x, t) and the samples; the first inner step asks for nothing else."""
        v = field(x, t)
        return v, self.given(v, eps, x, t)

    def given(
        self, v: Float[Tensor, "B H A"], eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "N B H A"]:
        """Return the same samples for t > 0, where the first inner step asks only for ``v = v(x, t)``."""
        return self._flow(v, eps, x, t)

    def _flow(self, v: Tensor | None, eps: Tensor, x: Tensor, t: Time) -> Tensor:
        if self.field is None:
            raise ValueError(
                "GlassPosterior: expected a policy to sample from, got none; give it the field, "
                "GlassPosterior(field, steps=4), or use it inside a rule: Posterior(GlassPosterior())"
            )
        n = len(eps)
        field = self.field.repeat(n)
        x_n, t_n = x.repeat_interleave(n, 0), repeat_time(t, n)
        noise = rearrange(eps, "n b h a -> (b n) h a")
        if v is None:
            first = noise + glass_velocity(field, x_n, t_n, noise, t_n * 0)
        else:
            first = denoise(x, v, t).repeat_interleave(n, 0)
        scale = hypot(1.0 + 0 * t_n, self.spread * t_n / clamp_time(1 - t_n, low=1e-12))
        ratios = [i / (self.steps - i) for i in range(1, self.steps)]
        look = first + noise / factor(scale * ratios[0], noise) if ratios else first
        for ratio, following in pairwise([*ratios, math.inf]):
            odds = scale * ratio  # u / (1 - u)
            u, xbar = odds / (1 + odds), factor(odds / (1 + odds), look) * look
            answer = xbar + factor(1 / (1 + odds), look) * glass_velocity(field, x_n, t_n, xbar, u)
            look = sharpen(look, answer, slope(answer - first, look - first), ratio / following)
        return rearrange(look, "(b n) h a -> n b h a", n=n)


def slope(answers: Float[Tensor, "R H A"], looks: Float[Tensor, "R H A"]) -> Float[Tensor, "R 1 1"]:
    """Return how far the policy's answer follows a look, row by row; 0 where it goes beyond it, or back.

    Of a Gaussian posterior of variance s it is ``s / (s + 1 / odds^2)``; beyond 1 it tells two modes apart.
    """
    size = looks.square().sum((1, 2), keepdim=True)
    k = (answers * looks).sum((1, 2), keepdim=True) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return torch.where((k > 0) & (k < 1), k, torch.zeros_like(k))


def sharpen(
    look: Float[Tensor, "R H A"], answer: Float[Tensor, "R H A"], k: Float[Tensor, "R 1 1"], q: float
) -> Float[Tensor, "R H A"]:
    """Return the look whose noise is q times as large, on the flow to a Gaussian posterior.

    A look ``xbar / u = x1 + noise / odds`` is N(m, s + 1 / odds^2), and the policy answers it by
    ``(1 - k) m + k look``, so that m need not be known. With k = 0 it is a step of Euler's.
    """
    return look + (1 - q * q) / (1 + (k + (1 - k) * q * q).sqrt()) * (answer - look)

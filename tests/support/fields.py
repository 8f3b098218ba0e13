"""Velocity fields and values with known answers, and ones that count. Nothing here is computed by qsteer.

Closed forms. With noise x0 ~ N(0, 1), a clean action x1 ~ N(m, s²) and x_t = (1 - t) x0 + t x1:
    var x_t = c² = (1 - t)² + t² s²,   var[x1 | x_t] = s² (1 - t)² / c²,
    E[x1 | x_t = x] = m + (t s² / c²) (x - t m),
    v(x, t) = E[x1 - x0 | x_t = x] = m + ((t s² - (1 - t)) / c²) (x - t m).
A mixture's answers are its components', weighted with the posterior probability of each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jaxtyping
import torch
from torch import Tensor

import qsteer
from qsteer.clock import MIRRORED, PAPER, Clock, Time
from qsteer.flow import expand_time
from qsteer.types import Field, Value

DOUBLE = torch.float64


def column(t: Time, x: Tensor) -> Tensor:
    return expand_time(t, x).to(x.dtype)[:, None, None]


@dataclass(frozen=True)
class Gaussian:
    """Clean actions N(mean, std²), independent entries; mean and std of shape (H, A)."""

    mean: Tensor
    std: Tensor

    def _deviation(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = column(t, x)
        return t, (1 - t) ** 2 + t**2 * self.std**2, x - t * self.mean

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        t, c2, dx = self._deviation(x, t)
        return self.mean + t * self.std**2 / c2 * dx

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        t, c2, dx = self._deviation(x, t)
        return self.mean + (t * self.std**2 - (1 - t)) / c2 * dx

    def variance(self, x: Tensor, t: Tensor) -> Tensor:
        """Of the clean action given x_t = x."""
        t, c2, _ = self._deviation(x, t)
        return self.std**2 * (1 - t) ** 2 / c2

    def average_velocity(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """(X_{r,t}(x) - x) / (t - r) of X_{r,t}(x) = t m + c_t/c_r (x - r m), divided out: fine at t = r."""
        (r, cr2, dx), (t, ct2, _) = self._deviation(x, r), self._deviation(x, t)
        stretch = ((t + r) * (1 + self.std**2) - 2) / (cr2 + (cr2 * ct2).sqrt())
        return self.mean + stretch * dx

    def jump(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """The flow map itself, as it is written above."""
        (r, cr2, dx), (t, ct2, _) = self._deviation(x, r), self._deviation(x, t)
        return t * self.mean + (ct2 / cr2).sqrt() * dx

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """Of x_t; shape (B,)."""
        _, c2, dx = self._deviation(x, t)
        return (-0.5 * (dx**2 / c2 + torch.log(2 * torch.pi * c2))).flatten(1).sum(1)


@dataclass(frozen=True)
class Mixture:
    """Clean actions from sum_k weight_k N(mean_k, std_k² I): weights (K,), means (K, H, A), stds (K,)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def parts(self) -> list[Gaussian]:
        return [Gaussian(m, s.expand_as(m)) for m, s in zip(self.means, self.stds, strict=True)]

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        logs = [w.log() + g.log_density(x, t) for w, g in zip(self.weights, self.parts(), strict=True)]
        return torch.stack(logs).logsumexp(0)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """Probability of each component given x_t = x; shape (K, B, 1, 1)."""
        logs = [w.log() + g.log_density(x, t) for w, g in zip(self.weights, self.parts(), strict=True)]
        return torch.stack(logs).softmax(0)[..., None, None]

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.posterior(x, t) * torch.stack([g.denoised(x, t) for g in self.parts()])).sum(0)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.posterior(x, t) * torch.stack([g.velocity(x, t) for g in self.parts()])).sum(0)

    def covariance(self, x: Tensor, t: Tensor) -> Tensor:
        """Of the flattened clean action given x_t = x; shape (B, HA, HA)."""
        r = self.posterior(x, t)[..., 0]
        d = torch.stack([g.denoised(x, t).flatten(1) for g in self.parts()])
        inner = torch.stack(
            [torch.diag_embed(g.variance(x, t).expand_as(x).flatten(1)) for g in self.parts()]
        )
        total = (r[..., None] * (inner + d[..., :, None] * d[..., None, :])).sum(0)
        mean = (r * d).sum(0)
        return total - mean[:, :, None] * mean[:, None, :]

    def log_tilt(self, x: Tensor, t: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
        """V_t(x) = log E[exp(slope x1 - curvature x1² / 2) | x_t = x], t < 1; shape (B,).

        For x1 ~ N(d, p): ((d + p b)² / (1 + lam p) - d²) / 2p - log(1 + lam p) / 2, entry by entry.
        """
        logs = []
        for gaussian in self.parts():
            d, p = gaussian.denoised(x, t), gaussian.variance(x, t)
            shrunk = 1 + curvature * p
            logs.append(
                (((d + p * slope) ** 2 / shrunk - d**2) / (2 * p) - shrunk.log() / 2).flatten(1).sum(1)
            )
        return (self.posterior(x, t)[..., 0, 0].log() + torch.stack(logs)).logsumexp(0)

    def draw(self, n: int, seed: int = 0) -> Tensor:
        """n clean actions."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None, None] * z


def spread(t: float, s: Tensor) -> Tensor:
    """The standard deviation c of x_t, see above."""
    return ((1 - t) ** 2 + t**2 * s**2).sqrt()


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that mixes all entries, depends on time, and has a Jacobian far from the identity."""
    n = x[0].numel()
    w = torch.sin(torch.arange(1.0, n * n + 1, dtype=x.dtype)).reshape(n, n)
    flat = x.flatten(1)
    return (torch.tanh(flat @ w + column(t, x)[..., 0]) - 0.5 * flat.roll(1, dims=1)).reshape(x.shape)


def constant(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that does not depend on x (written so that autograd can say so)."""
    return 0.0 * x + torch.linspace(-1.0, 1.0, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])


def bumpy(a: Tensor) -> Tensor:
    """A value without symmetry: no entry's derivative vanishes or equals another's."""
    flat = a.flatten(1)
    k = torch.arange(1.0, flat.shape[1] + 1, dtype=a.dtype)
    return (torch.sin(k * flat) + 0.3 * k * flat).sum(1) + 0.2 * flat.prod(1)


def total(a: Tensor) -> Tensor:
    return a.flatten(1).sum(1)


def quadratic(a: Tensor) -> Tensor:
    """-lam/2 (a - y)², lam and y those of the constants below, for chunks of (1, 3)."""
    return -0.5 * (CURVATURE * (a - TARGET) ** 2).flatten(1).sum(1)


class Host(Field):
    """A field that serves a mirrored host: time u = 1 - t in float32, velocity w = noise - action."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], clock: Clock = MIRRORED) -> None:
        self.network, self.clock, self.times = network, clock, []

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        time = expand_time(self.clock.to_host(t), x, torch.float32)
        self.times.append(time)
        return self.clock.velocity(self.network(x, time))

    def repeat(self, k: int) -> "Host":
        return self


@dataclass
class Tally:
    rows: list[int] = field(default_factory=list)
    backwards: int = 0
    members: int = 0

    def backward(self, _: Tensor) -> None:
        self.backwards += 1

    @property
    def calls(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class CountingField(Field):
    """Counts forwards, rows of each and backwards, repeated copies included."""

    fn: Callable[[Tensor, Tensor], Tensor]
    tally: Tally = field(default_factory=Tally)
    clock: Clock = PAPER

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.tally.rows.append(len(x))
        v = self.fn(x, expand_time(t, x))
        if v.requires_grad:
            v.register_hook(self.tally.backward)
        return v

    def repeat(self, k: int) -> "CountingField":
        return self


@dataclass(frozen=True)
class CountingValue(Value):
    """Counts forwards, rows of each, backwards and calls of members, repeated copies included."""

    fn: Callable[[Tensor], Tensor]
    tally: Tally = field(default_factory=Tally)

    def __call__(self, a: Tensor) -> Tensor:
        self.tally.rows.append(len(a))
        q = self.fn(a)
        if q.requires_grad:
            q.register_hook(self.tally.backward)
        return q

    def repeat(self, k: int) -> "CountingValue":
        return self

    def members(self, a: Tensor) -> Tensor:
        self.tally.members += 1
        return self.fn(a)[None]


@dataclass(frozen=True)
class Ensemble(Value):
    """The mean of several values; ``context`` has one row per observation and is handed to each."""

    fns: tuple[Callable[..., Tensor], ...]
    context: Tensor | None = None
    mask: Tensor | None = None

    def members(self, a: Tensor) -> Tensor:
        return torch.stack([fn(a) if self.context is None else fn(a, self.context) for fn in self.fns])

    def __call__(self, a: Tensor) -> Tensor:
        return self.members(a).mean(0)

    def repeat(self, k: int) -> "Ensemble":
        return self if self.context is None else replace(self, context=self.context.repeat_interleave(k, 0))


def spoiled(fn: Callable[[Tensor], Tensor], kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``fn`` with a bad value or gradient on the rows which the context flags."""

    def value(a: Tensor, bad: Tensor) -> Tensor:
        if kind == "gradient" and a.requires_grad:
            a.register_hook(lambda g: torch.where(bad[:, None, None], torch.inf, g))
        q = fn(a)
        return q if kind == "gradient" else torch.where(bad, float(kind), q)

    return value


def differences(fn: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    """Return the gradient of ``fn: (B, H, A) -> (B,)``, row by row, by central differences."""
    g = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            dx = torch.zeros_like(x)
            dx[:, i, j] = h
            g[:, i, j] = (fn(x + dx) - fn(x - dx)) / (2 * h)
    return g


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def euler(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int = 10) -> Tensor:
    """The reference loop: times i / steps in float32, as :class:`qsteer.Euler` has them."""
    for i in range(steps):
        t = torch.full((len(x),), i / steps, dtype=torch.float32).to(x.dtype)
        x = x + (1.0 / steps) * v(x, t)
    return x


def affine_law(steer: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and std (H, A) of ``steer(noise)``, affine entry by entry: no sampling error."""
    points = torch.tensor([0.0, 1.0, -2.0], dtype=DOUBLE)[:, None, None]
    zero, one, minus_two = steer(points.expand(-1, *shape).contiguous())
    torch.testing.assert_close(minus_two - zero, -2 * (one - zero), rtol=1e-9, atol=1e-9)
    return zero, one - zero


@contextmanager
def as_installed() -> Iterator[None]:
    """Switch off the shape checks that only pytest has: what a user's process says to wrong arguments."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", was)


def fixed_times(t: float, rows: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.full((rows,), t, dtype=dtype)


def jacobian(velocity: Any, x: Tensor, t: float) -> Tensor:
    """Return dD/dx of each row of (2, 2), of shape (B, 4, 4), by autograd."""

    def denoised(z: Tensor) -> Tensor:
        return z + (1 - t) * velocity(z[None].view(1, 2, 2), fixed_times(t, 1)).view(-1)

    return torch.stack([torch.autograd.functional.jacobian(denoised, row.flatten()) for row in x])


def slope_at_denoised(velocity: Any, x: Tensor, t: float) -> Tensor:
    """Return the gradient of ``bumpy`` at the denoised action, (B, HA)."""
    d = (x + (1 - t) * velocity(x, fixed_times(t, len(x)))).requires_grad_()
    return torch.autograd.grad(bumpy(d).sum(), d)[0].flatten(1)


def guidance(rule: Any, field: Any, value: Any, x: Tensor, t: float) -> Tensor:
    """Return what the rule adds to the velocity at (x, t)."""
    with torch.no_grad():
        return rule(field, value)(x, t) - field(x, t)


BASE = qsteer.field(nonlinear)
VALUE = qsteer.value(bumpy)
CONSTANT = qsteer.field(constant)
GAUSSIAN = Gaussian(
    torch.tensor([[0.5, -1.0, 0.2]], dtype=DOUBLE), torch.tensor([[0.3, 0.7, 1.5]], dtype=DOUBLE)
)
MIXTURE = Mixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=DOUBLE),
    noise(3, 2, 2, seed=7),
    torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE),
)
PLANE = Mixture(
    torch.tensor([0.3, 0.4, 0.3]),
    torch.tensor([[[-1.0, 0.5]], [[1.0, 0.5]], [[0.0, -1.0]]]),
    torch.tensor([0.2, 0.2, 0.2]),
)
"""In float32: maps that learn are trained on it."""
TARGET = torch.tensor([[0.9, 0.1, -0.6]], dtype=DOUBLE)
CURVATURE = torch.tensor([[4.0, 1.0, 0.3]], dtype=DOUBLE)

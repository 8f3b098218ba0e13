"""The law that Tweedie samples, in closed form, and the exact tilt.

The laws below hold entry by entry for a Gaussian base (`fields.Gaussian`), whose guided ODE is linear, so
that chains from two points give mean and std of the sampled law without sampling error. J = dD/dx = t s²/c²,
sigma = clamp(1/t - 1, 0, 25), tau = 1/26 is where the clamp ends.

linear Q = b a: grad V = J b is Tweedie's gradient exactly, so that the exact tilt N(m + s² b, s²) is reached
    but for the clamp. (x - t m)/c has derivative sigma J b / c; with d/dt (t/c) = (1-t)/c³ and
    d/dt ((1-t)/c) = -t s²/c³ the mean is m + s² b [1 - s tau/c_tau + 25 (1 - (1-tau)/c_tau)/s], short of the
    exact shift by about s/50.
quadratic Q = -lam/2 (a - y)²: with z = (x - t m)/c, w = t/c, dw = (1-t)/c³ dt, Tweedie's ODE without the
    clamp is dz/dw = -lam s⁴ w z - lam (m - y) s², hence with beta = lam s²
        std = s exp(-beta/2),   mean = m + (y - m) beta exp(-beta/2) ∫_0^1 exp(beta q²/2) dq,
    where the exact tilt has std = s / sqrt(1 + beta), mean = m + (y - m) beta/(1 + beta). They agree to first
    order in beta; beyond, Tweedie (which takes the posterior for a point) moves too far and is too narrow.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fields import CURVATURE, DOUBLE, GAUSSIAN, TARGET, Mixture, affine_law, quadratic, spread, total

import qsteer
from qsteer.rules import Ascent, Guidance

SLOPE = torch.tensor([[1.5, -0.8, 0.4]], dtype=DOUBLE)
EXACT = {"scaling": "sigma", "clip": None}
TAU = 1 / 26


def linear(a: torch.Tensor) -> torch.Tensor:
    return (SLOPE * a).flatten(1).sum(1)


def steered_law(rule, value, steps, base=GAUSSIAN):
    field, value = qsteer.field(base.velocity), qsteer.value(value)
    return affine_law(
        lambda x: qsteer.sample(field, value, x, rule=rule, sampler=qsteer.Euler(steps)),
        tuple(base.mean.shape),
    )


def linear_limit() -> torch.Tensor:
    """The mean of the Tweedie-guided law as steps grow."""
    m, s, c = GAUSSIAN.mean, GAUSSIAN.std, spread(TAU, GAUSSIAN.std)
    return m + s**2 * SLOPE * (1 - s * TAU / c + 25 * (1 - (1 - TAU) / c) / s)


def quadratic_limit(clamped: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of the Tweedie-guided law as steps grow."""
    m, s, lam, y = GAUSSIAN.mean, GAUSSIAN.std, CURVATURE, TARGET
    gain, shift, w0 = torch.ones_like(s), torch.zeros_like(s), torch.zeros_like(s)
    if clamped:  # up to tau, z' = -25 lam (J² z + J (m - y)/c), by the midpoint rule
        n = 4000
        for t in (torch.arange(n, dtype=DOUBLE) + 0.5) * TAU / n:
            c = spread(float(t), s)
            jacobian = t * s**2 / c**2
            decay = torch.exp(-25 * lam * jacobian**2 * TAU / n)
            gain, shift = gain * decay, shift * decay - 25 * lam * jacobian * (m - y) / c * TAU / n
        w0 = TAU / spread(TAU, s)
    q, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(40))
    w = w0[..., None] + (1 / s - w0)[..., None] * (q + 1) / 2
    rest = torch.exp(-0.5 * lam * s**4 * (1 / s**2 - w0**2))
    pull = (
        torch.exp(-0.5 * (lam * s**4)[..., None] * (1 / s[..., None] ** 2 - w**2))
        @ weights
        * (1 / s - w0)
        / 2
    )
    return m + s * (rest * shift - lam * (m - y) * s**2 * pull), s * rest * gain


@pytest.mark.parametrize("steps", [1, 2, 10, 26, 60])
def test_linear_value_gives_the_euler_recursion_of_the_linear_ode(steps):
    """At any number of steps, t = 0 left alone and sigma clamped."""
    m, s = GAUSSIAN.mean, GAUSSIAN.std
    mean, std = torch.zeros_like(m), torch.ones_like(s)
    for i in range(steps):
        t = float(np.float32(i / steps))
        c2 = spread(t, s) ** 2
        slope = (t * s**2 - (1 - t)) / c2
        push = 0.0 if i == 0 else min(1 / t - 1, 25.0) * t * s**2 / c2 * SLOPE
        mean, std = mean + (m + slope * (mean - t * m) + push) / steps, std * (1 + slope / steps)
    for got, expected in zip(
        steered_law(qsteer.Tweedie(1.0, **EXACT), linear, steps), (mean, std), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_linear_value_converges_to_the_exact_tilt_up_to_the_clamp():
    mean, std = GAUSSIAN.mean + GAUSSIAN.std**2 * SLOPE, GAUSSIAN.std
    laws = [steered_law(qsteer.Tweedie(1.0, **EXACT), linear, steps) for steps in (100, 200, 400)]
    errors = torch.stack([torch.stack([(a - linear_limit()).abs(), (b - std).abs()]) for a, b in laws])
    ratios = errors[:-1] / errors[1:]
    assert ((1.8 < ratios) & (ratios < 2.2)).all()
    assert (errors[-1] < 0.02).all()
    bias = (linear_limit() - mean) / (GAUSSIAN.std**2 * SLOPE)
    torch.testing.assert_close(bias, -GAUSSIAN.std / 50, rtol=0.05, atol=0)  # all that the clamp costs
    extrapolated = 2 * laws[2][0] - laws[1][0]  # Richardson: the first-order error cancels
    torch.testing.assert_close(extrapolated, mean, rtol=0, atol=0.05)


def test_linear_value_with_weight_alpha_is_the_tilt_by_alpha_q():
    base = steered_law(None, linear, 20)[0]
    one, half = (steered_law(qsteer.Tweedie(alpha, **EXACT), linear, 20)[0] - base for alpha in (1.0, 0.5))
    torch.testing.assert_close(half, one / 2)
    torch.testing.assert_close(
        steered_law(qsteer.Negated(qsteer.Tweedie(1.0, **EXACT)), linear, 20)[0] - base, -one
    )


def test_quadratic_value_converges_to_the_law_of_the_linear_ode_up_to_the_clamp():
    beta = CURVATURE * GAUSSIAN.std**2
    q = torch.linspace(0, 1, 20001, dtype=DOUBLE)
    integral = torch.trapezoid(torch.exp(0.5 * beta[..., None] * q**2), q)
    mean = GAUSSIAN.mean + (TARGET - GAUSSIAN.mean) * beta * torch.exp(-beta / 2) * integral
    for part, expected in zip(
        quadratic_limit(clamped=False), (mean, GAUSSIAN.std * torch.exp(-beta / 2)), strict=True
    ):
        torch.testing.assert_close(part, expected, rtol=1e-7, atol=0)
    limit = torch.stack(quadratic_limit())
    torch.testing.assert_close(limit, torch.stack(quadratic_limit(clamped=False)), rtol=0, atol=0.03)
    laws = [torch.stack(steered_law(qsteer.Tweedie(1.0, **EXACT), quadratic, k)) for k in (100, 200, 400)]
    torch.testing.assert_close(2 * laws[2] - laws[1], limit, rtol=0, atol=1e-3)
    errors = torch.stack([(law - limit).abs() for law in laws])
    assert (errors[-1] < 0.01).all()
    ratios = (errors[:-1] / errors[1:])[errors[1:] > 1e-4]
    assert len(ratios) > 6 and ((1.8 < ratios) & (ratios < 2.2)).all()


def test_quadratic_value_overshoots_the_exact_tilt_by_a_known_amount():
    """At beta = 0.36, 0.49, 0.675 the shift is 1.21, 1.27, 1.34 of the tilt's, the std 0.97, 0.96, 0.92."""
    beta = CURVATURE * GAUSSIAN.std**2
    mean, std = quadratic_limit(clamped=False)
    shift = (mean - GAUSSIAN.mean) / ((TARGET - GAUSSIAN.mean) * beta / (1 + beta))
    narrow = std / (GAUSSIAN.std / (1 + beta).sqrt())
    torch.testing.assert_close(shift, torch.tensor([[1.208, 1.269, 1.344]], dtype=DOUBLE), rtol=0, atol=1e-3)
    torch.testing.assert_close(narrow, torch.tensor([[0.974, 0.955, 0.924]], dtype=DOUBLE), rtol=0, atol=1e-3)
    sampled = torch.stack(steered_law(qsteer.Tweedie(1.0, **EXACT), quadratic, 200))
    tilt = torch.stack([(GAUSSIAN.mean + beta * TARGET) / (1 + beta), GAUSSIAN.std / (1 + beta).sqrt()])
    error = (sampled - torch.stack([mean, std])).abs()
    assert (
        error[:, 0, 1:] < 0.3 * (sampled - tilt).abs()[:, 0, 1:]
    ).all()  # the sampler's law is Tweedie's own


# ----------------------------------------------------------------------------------------- the exact gradient


@dataclass(frozen=True)
class ExactTilt(Guidance):
    """grad V_t of a base whose posterior is known: what every estimator estimates."""

    alpha: float = 1.0
    potential: object = None  # V(x, t), differentiable
    velocity: object = None

    @property
    def strength(self):
        return self.alpha

    def ascent(self, field, value, x, t):
        x = x.requires_grad_()
        v = self.potential(x, t)
        zeros = torch.zeros(len(x), dtype=x.dtype)
        return Ascent(field(x, t).detach(), torch.autograd.grad(v.sum(), x)[0], zeros, x.detach())


def test_sigma_scaling_of_the_exact_gradient_samples_the_exact_tilt_of_a_gaussian():
    """The scaling without the estimator: a quadratic's exact gradient is -lam (D - y) J / (1 + lam P)."""

    def potential(x, t):
        d, p = GAUSSIAN.denoised(x, t), GAUSSIAN.variance(x, t)
        return (-0.5 * CURVATURE * (d - TARGET) ** 2 / (1 + CURVATURE * p)).flatten(1).sum(1)

    beta = CURVATURE * GAUSSIAN.std**2
    tilt = torch.stack([(GAUSSIAN.mean + beta * TARGET) / (1 + beta), GAUSSIAN.std / (1 + beta).sqrt()])
    rule = ExactTilt(1.0, potential, **EXACT)
    coarse, fine = (torch.stack(steered_law(rule, quadratic, k)) for k in (100, 200))
    torch.testing.assert_close(2 * fine - coarse, tilt, rtol=0, atol=0.02)  # the clamp: 0.014 at std 1.5
    assert ((torch.stack(quadratic_limit()) - tilt).abs() > 0.02).any(0).all()  # Tweedie's law is another


@pytest.mark.parametrize("slope", [-1.0, 2.0])
def test_sigma_scaling_of_the_exact_gradient_samples_the_exact_tilt_of_a_mixture(slope):
    """pi exp(b a) has means m + s² b, weights times exp(b m + b² s²/2). Quantiles must map to quantiles."""
    base = Mixture(
        torch.tensor([0.6, 0.4], dtype=DOUBLE),
        torch.tensor([-1.0, 1.0], dtype=DOUBLE)[:, None, None],
        torch.tensor([0.3, 0.5], dtype=DOUBLE),
    )

    def potential(x, t):
        d = torch.stack([g.denoised(x, t) for g in base.parts()])
        p = torch.stack([g.variance(x, t).expand_as(x) for g in base.parts()])
        return (base.posterior(x, t).log() + slope * d + 0.5 * slope**2 * p).logsumexp(0)[:, 0, 0]

    u = torch.linspace(0.01, 0.99, 99, dtype=DOUBLE)
    x = torch.distributions.Normal(0.0, 1.0).icdf(u)[:, None, None]
    a = qsteer.sample(
        qsteer.field(base.velocity),
        qsteer.value(lambda a: slope * total(a)),
        x,
        rule=ExactTilt(1.0, potential, **EXACT),
        sampler=qsteer.Euler(200),
    )[:, 0, 0]
    means, stds = base.means[:, :, 0] + slope * base.stds[:, None] ** 2, base.stds[:, None]
    weights = (base.weights[:, None].log() + slope * base.means[:, :, 0] + 0.5 * slope**2 * stds**2).softmax(
        0
    )
    cdf = (weights * torch.special.ndtr((a - means) / stds)).sum(0)
    assert (cdf - u).abs().max() < 0.02
    untilted = (base.weights[:, None] * torch.special.ndtr((a - base.means[:, :, 0]) / stds)).sum(0)
    assert (untilted - u).abs().max() > 0.2

"""Rules against closed forms, finite differences, counts, and laws of scaling, windows, masks and fallbacks.

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

import math
import warnings
from dataclasses import KW_ONLY, dataclass

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
    CountingField,
    CountingValue,
    Ensemble,
    Gaussian,
    Mixture,
    affine_law,
    as_installed,
    bumpy,
    constant,
    differences,
    euler,
    fixed_times,
    guidance,
    noise,
    nonlinear,
    norms,
    spoiled,
    total,
)

import qsteer
from qsteer.rules import Ascent, Guidance

GAUSSIAN = Gaussian(
    torch.tensor([[0.5, -1.0, 0.2]], dtype=DOUBLE), torch.tensor([[0.3, 0.7, 1.5]], dtype=DOUBLE)
)
MIXTURE = Mixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=DOUBLE),
    noise(3, 2, 2, seed=7),
    torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE),
)
SLOPE = torch.tensor([[1.5, -0.8, 0.4]], dtype=DOUBLE)
TARGET = torch.tensor([[0.9, 0.1, -0.6]], dtype=DOUBLE)
CURVATURE = torch.tensor([[4.0, 1.0, 0.3]], dtype=DOUBLE)
EXACT = {"scaling": "sigma", "clip": None}
TAU = 1 / 26


@dataclass(frozen=True)
class ForwardTweedie(qsteer.ForwardTweedie):
    """With a perturbation that does not depend on the dtype, and amplifies rounding by no more than 1000."""

    _: KW_ONLY
    eps: float | None = 1e-3


ALL = [
    qsteer.Tweedie,
    ForwardTweedie,
    qsteer.QGF,
    qsteer.NoisyGradient,
    qsteer.ThroughTime,
    qsteer.RandomDirection,
]
BY_VALUE = ALL[:-1]
by_name = {"ids": lambda rule: rule.__name__}


def linear(a: torch.Tensor) -> torch.Tensor:
    return (SLOPE * a).flatten(1).sum(1)


def quadratic(a: torch.Tensor) -> torch.Tensor:
    return -0.5 * (CURVATURE * (a - TARGET) ** 2).flatten(1).sum(1)


def spread(t: float, s: torch.Tensor) -> torch.Tensor:
    return ((1 - t) ** 2 + t**2 * s**2).sqrt()


def steered_law(rule, value, steps, base=GAUSSIAN):
    field, value = qsteer.field(base.velocity), qsteer.value(value)
    return affine_law(
        lambda x: qsteer.sample(field, value, x, rule=rule, sampler=qsteer.Euler(steps)),
        tuple(base.mean.shape),
    )


# ---------------------------------------------------------------------------------------------- sampled laws


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


# ------------------------------------------------------------------------------------------------- estimators

RAW = {"scaling": "raw", "clip": None}


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_tweedies_gradient_on_a_mixture_is_the_posterior_covariance_times_the_values_gradient(t):
    """d E[x1 | x_t] / dx = t/(1-t)² Cov[x1 | x_t], symmetric: a second derivation of the Jacobian."""
    x, times = noise(10, 2, 2), fixed_times(t, 10)
    slope = differences(bumpy, MIXTURE.denoised(x, times)).flatten(1)
    expected = t / (1 - t) ** 2 * torch.einsum("bij,bj->bi", MIXTURE.covariance(x, times), slope)
    got = guidance(qsteer.Tweedie(1.0, **RAW), qsteer.field(MIXTURE.velocity), VALUE, x, t)
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_clip_moves_where_the_value_is_asked_and_lets_the_gradient_through(t):
    base, x = Gaussian(2 * GAUSSIAN.mean, GAUSSIAN.std), 2 * noise(20, 1, 3)
    times = fixed_times(t, 20)
    d = base.denoised(x, times)
    assert (d.abs() > 1).any(1).any() and (d.abs() < 1).any(1).any()
    jacobian = t * base.std**2 / spread(t, base.std) ** 2
    slope = lambda a: -CURVATURE * (a - TARGET)  # noqa: E731
    field, value = qsteer.field(base.velocity), qsteer.value(quadratic)
    for clip in (None, (-1.0, 1.0), (-0.2, 0.5)):
        a, noisy = (d, x) if clip is None else (d.clamp(*clip), x.clamp(*clip))
        for rule, expected in (
            (qsteer.Tweedie, jacobian * slope(a)),
            (qsteer.QGF, slope(a)),
            (qsteer.NoisyGradient, slope(noisy)),
        ):
            got = guidance(rule(1.0, scaling="raw", clip=clip), field, value, x, t)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_tweedies_gradient_is_the_finite_difference_through_the_policy_and_qgfs_is_not(t):
    x, times = noise(6, 3, 2), fixed_times(t, 6)
    expected = differences(lambda z: bumpy(z + (1 - t) * nonlinear(z, times)), x)
    torch.testing.assert_close(
        guidance(qsteer.Tweedie(1.0, **RAW), BASE, VALUE, x, t), expected, rtol=1e-6, atol=1e-6
    )
    identity = guidance(qsteer.QGF(1.0, **RAW), BASE, VALUE, x, t)
    assert (norms(identity - expected) > 0.3 * (1 - t) * norms(expected)).all()  # J = I + (1 - t) dv/dx


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9])
def test_qgfs_gradient_is_the_finite_difference_of_the_value_at_the_denoised_action(t):
    x, times = noise(6, 3, 2), fixed_times(t, 6)
    expected = differences(bumpy, x + (1 - t) * nonlinear(x, times))
    torch.testing.assert_close(
        guidance(qsteer.QGF(1.0, **RAW), BASE, VALUE, x, t), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_a_constant_field_cannot_tell_tweedie_from_qgf(t):
    x, field = noise(6, 3, 2), qsteer.field(constant)
    tweedie, qgf = (guidance(rule(1.0, **RAW), field, VALUE, x, t) for rule in (qsteer.Tweedie, qsteer.QGF))
    torch.testing.assert_close(tweedie, qgf)
    torch.testing.assert_close(qgf, differences(bumpy, x + (1 - t) * constant(x, None)), rtol=1e-6, atol=1e-6)


def test_noisy_gradient_is_the_finite_difference_at_the_noisy_action():
    x = noise(6, 3, 2)
    got = guidance(qsteer.NoisyGradient(1.0, **RAW), BASE, VALUE, x, 0.5)
    torch.testing.assert_close(got, differences(bumpy, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("i", [1, 3, 4])
def test_through_times_gradient_is_the_finite_difference_of_the_rest_of_the_chain(i):
    x, steps = noise(4, 2, 2), 5

    def finish(z):
        for k in range(i, steps):
            z = z + nonlinear(z, fixed_times(float(np.float32(k / steps)), 4)) / steps
        return bumpy(z)

    got = guidance(qsteer.ThroughTime(1.0, steps=steps, **RAW), BASE, VALUE, x, float(np.float32(i / steps)))
    torch.testing.assert_close(got, differences(finish, x), rtol=1e-6, atol=1e-6)


def test_through_time_is_tweedie_at_the_last_step():
    x, t = noise(4, 2, 2), 0.9
    through = guidance(qsteer.ThroughTime(1.0, **RAW), BASE, VALUE, x, t)
    torch.testing.assert_close(
        through, guidance(qsteer.Tweedie(1.0, **RAW), BASE, VALUE, x, t), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("steps", [4, 8, 15, 20])
def test_through_time_refuses_a_chain_of_another_number_of_steps(steps):
    with pytest.raises(
        ValueError, match=r"chain's own number of steps.*give ThroughTime\(steps=...\) the sampler's"
    ):
        qsteer.sample(
            BASE, VALUE, noise(1, 2, 2), rule=qsteer.ThroughTime(stop=0.8), sampler=qsteer.Euler(steps)
        )


def test_random_directions_have_no_direction_and_follow_their_seed_alone():
    x, field, value = noise(500, 2, 2), qsteer.field(constant), qsteer.value(total)
    state = torch.get_rng_state()
    first, second, again = (
        guidance(rule, field, value, x, 0.5)
        for rule in [*[qsteer.RandomDirection(1.0, seed=3)] * 2, qsteer.RandomDirection(1.0, seed=3)]
    )
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())  # the other arms' noise is not disturbed
    unit = torch.cat([first, second]) / norms(constant(x, None))[0]
    torch.testing.assert_close(norms(unit), torch.ones(1000, dtype=DOUBLE))
    assert unit.mean(0).abs().max() < 5 * math.sqrt(
        1 / 4 / 1000
    )  # unit vectors in 4 dimensions: variance 1/4
    correlation = (first * second).flatten(1).sum(1) / norms(first) / norms(second)
    assert correlation.mean().abs() < 5 * math.sqrt(1 / 4 / 500)
    other = guidance(qsteer.RandomDirection(1.0, seed=4), field, value, x, 0.5)
    assert not torch.allclose(other, first)


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_negated_is_the_same_guidance_downhill(rule):
    x = noise(4, 2, 2)
    up, down = (guidance(r, BASE, VALUE, x, 0.5) for r in (rule(0.3), qsteer.Negated(rule(0.3))))
    torch.testing.assert_close(down, -up)
    assert (norms(up) > 0.01).all()


# --------------------------------------------------------------------------------------- strength and scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ALL, **by_name)
def test_match_norm_adds_exactly_alpha_times_the_velocitys_norm(rule, dtype):
    x, t = noise(8, 3, 2, dtype=dtype), 0.5
    v = norms(nonlinear(x, fixed_times(t, 8, dtype)))
    for alpha in (0.1, 0.2, 2.0):
        ratio = norms(guidance(rule(alpha, scaling="match_norm"), BASE, VALUE, x, t)) / v
        torch.testing.assert_close(ratio, torch.full_like(ratio, alpha), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_match_norm_ignores_the_scale_of_the_value_and_keeps_the_gradients_direction(rule):
    x = noise(8, 3, 2)
    pushes = [
        guidance(rule(0.3, scaling="match_norm"), BASE, qsteer.value(lambda a, k=k: k * bumpy(a)), x, 0.5)
        for k in (1e-3, 1.0, 1e3)
    ]
    for push in pushes:
        torch.testing.assert_close(push, pushes[0], rtol=1e-4, atol=1e-6)
    raw = guidance(rule(1.0, scaling="raw"), BASE, VALUE, x, 0.5)
    torch.testing.assert_close(pushes[1] / norms(pushes[1])[:, None, None], raw / norms(raw)[:, None, None])


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_raw_adds_the_weight_times_the_gradient(rule):
    x = noise(8, 3, 2)
    one = guidance(rule(1.0, scaling="raw"), BASE, VALUE, x, 0.5)
    for weight in (0.02, 3.0):
        torch.testing.assert_close(guidance(rule(weight, scaling="raw"), BASE, VALUE, x, 0.5), weight * one)


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_clip_norm_never_exceeds_alpha_times_the_velocity_and_never_scales_up(rule, scale):
    x, value = noise(8, 3, 2), qsteer.value(lambda a: scale * bumpy(a))
    push = guidance(rule(0.3, scaling="clip_norm"), BASE, value, x, 0.5)
    raw = guidance(rule(1.0, scaling="raw"), BASE, value, x, 0.5)
    v = norms(nonlinear(x, fixed_times(0.5, 8)))
    torch.testing.assert_close(norms(push), 0.3 * torch.minimum(v, norms(raw)), rtol=1e-6, atol=0)
    assert (norms(push) <= 0.3 * v * (1 + 1e-12)).all()
    expected = 0.3 * raw if scale < 1 else guidance(rule(0.3, scaling="match_norm"), BASE, value, x, 0.5)
    torch.testing.assert_close(push, expected)


@pytest.mark.parametrize(
    ("t", "sigma"), [(0.01, 25.0), (1 / 26, 25.0), (0.1, 9.0), (0.5, 1.0), (0.9, 1 / 9), (1.0, 0.0)]
)
def test_sigma_multiplies_the_gradient_by_the_clamped_diffusion(t, sigma):
    x = noise(8, 3, 2)
    raw, push = (guidance(qsteer.Tweedie(0.7, scaling=s), BASE, VALUE, x, t) for s in ("raw", "sigma"))
    torch.testing.assert_close(push, sigma * raw, rtol=1e-9, atol=1e-12)


def test_qgf_at_noise_uses_the_clamped_sigma():
    x = noise(8, 3, 2)
    raw, push = (guidance(qsteer.QGF(0.7, scaling=s), BASE, VALUE, x, 0.0) for s in ("raw", "sigma"))
    torch.testing.assert_close(push, 25 * raw)


@pytest.mark.parametrize("scaling", ["match_norm", "clip_norm", "raw", "sigma"])
@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_rows_do_not_feel_each_other(rule, scaling):
    """Norms are per row: an action does not depend on what else is in the batch."""
    x = noise(5, 3, 2) * torch.tensor([0.1, 1.0, 2.0, 5.0, 0.5], dtype=DOUBLE)[:, None, None]
    rule = rule(0.05, scaling=scaling)
    together = qsteer.sample(BASE, VALUE, x, rule=rule)
    alone = torch.cat([qsteer.sample(BASE, VALUE, row[None], rule=rule) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_a_flat_value_pushes_nowhere():
    flat = qsteer.value(lambda a: 0.0 * total(a))
    x = noise(3, 2, 2)
    for rule in (
        qsteer.Tweedie(0.5),
        qsteer.QGF(0.5, scaling="match_norm"),
        qsteer.Tweedie(0.5, scaling="clip_norm"),
    ):
        assert torch.equal(qsteer.sample(BASE, flat, x, rule=rule), qsteer.sample(BASE, None, x))


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_strength_zero_is_the_field_itself_at_no_cost(rule):
    field, value, x = CountingField(nonlinear), CountingValue(bumpy), noise(3, 2, 2, dtype=torch.float32)
    state = torch.get_rng_state()
    for zero in (rule(0.0), qsteer.Negated(rule(0.0)), rule(0.0, scaling="sigma")):
        assert zero(field, value) is field
        assert torch.equal(qsteer.sample(field, value, x, rule=zero), euler(nonlinear, x))
    assert value.tally.calls == value.tally.backwards == field.tally.backwards == 0
    assert torch.equal(state, torch.get_rng_state())


def test_strength_bends_the_action_the_more_the_larger_it_is():
    x = noise(20, 2, 2)
    base = qsteer.sample(BASE, None, x)
    moved = [
        norms(qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie(a)) - base).mean()
        for a in (0.05, 0.1, 0.2, 0.4)
    ]
    assert 0 < moved[0] < moved[1] < moved[2] < moved[3]


def test_defaults_are_the_papers():
    assert qsteer.Tweedie() == qsteer.Tweedie(
        0.2, scaling="match_norm", clip=(-1.0, 1.0), start=0.0, stop=1.0
    )
    assert qsteer.QGF() == qsteer.QGF(0.02, scaling="raw", clip=(-1.0, 1.0))
    for rule in (qsteer.NoisyGradient, qsteer.ThroughTime, qsteer.RandomDirection):
        assert rule() == rule(0.2, scaling="match_norm", clip=(-1.0, 1.0), start=0.0, stop=1.0)


# ------------------------------------------------------------------------------------------- cost and windows


def through_time_sum(k: int) -> int:
    return sum(k - i for i in range(1, k))


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("rule", "forwards", "backwards", "critic"),
    [
        (lambda k: qsteer.Tweedie(0.2), lambda k: k, lambda k: k - 1, lambda k: k - 1),
        (lambda k: qsteer.QGF(), lambda k: k, lambda k: 0, lambda k: k),
        (lambda k: qsteer.NoisyGradient(), lambda k: k, lambda k: 0, lambda k: k - 1),
        (
            lambda k: qsteer.ThroughTime(steps=k),
            lambda k: 1 + through_time_sum(k),
            through_time_sum,
            lambda k: k - 1,
        ),
        (lambda k: qsteer.RandomDirection(), lambda k: k, lambda k: 0, lambda k: 0),
        (lambda k: qsteer.Negated(qsteer.Tweedie()), lambda k: k, lambda k: k - 1, lambda k: k - 1),
        (lambda k: None, lambda k: k, lambda k: 0, lambda k: 0),
    ],
    ids=["Tweedie", "QGF", "NoisyGradient", "ThroughTime", "RandomDirection", "Negated", "none"],
)
def test_cost_of_an_action_is_what_the_docstring_says(rule, forwards, backwards, critic, steps, members):
    """Also inside best-of-n: the same number of calls, each on n rows per observation."""
    sampler = qsteer.Euler(steps) if members == 1 else qsteer.BestOfN(members, qsteer.Euler(steps))
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(field, value, noise(2, 2, 2), rule=rule(steps), sampler=sampler)
    assert field.tally.rows == [2 * members] * forwards(steps)
    assert field.tally.backwards == backwards(steps)
    assert value.tally.rows == [2 * members] * (critic(steps) + (members > 1))
    assert value.tally.backwards == critic(steps)
    assert value.tally.members == 0


@pytest.mark.parametrize("rule", [r for r in ALL if r is not qsteer.QGF], **by_name)
def test_noise_itself_is_left_alone(rule):
    x = noise(3, 2, 2)
    assert torch.equal(guidance(rule(0.5), BASE, VALUE, x, 0.0), torch.zeros_like(x))
    assert (norms(guidance(rule(0.5), BASE, VALUE, x, float(np.float32(0.1)))) > 0).all()


def test_qgf_guides_noise_too():
    assert (norms(guidance(qsteer.QGF(0.5), BASE, VALUE, noise(3, 2, 2), 0.0)) > 0).all()


@pytest.mark.parametrize(
    ("window", "guided"),
    [
        ({}, range(1, 10)),
        ({"start": 0.3}, range(3, 10)),
        ({"stop": 0.6}, range(1, 7)),
        ({"start": 0.3, "stop": 0.6}, range(3, 7)),
        ({"start": 0.7, "stop": 0.7}, [7]),
        ({"start": 0.31, "stop": 0.39}, []),
        ({"start": 1.0}, []),
    ],
)
@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_guided_steps_are_those_from_start_to_stop_both_included(rule, window, guided):
    first = [0] if rule is qsteer.QGF and window.get("start", 0.0) == 0.0 else []
    trace = qsteer.Trace()
    value, x = CountingValue(bumpy), noise(2, 2, 2, dtype=torch.float32)
    out = qsteer.sample(qsteer.field(nonlinear), value, x, rule=rule(0.1, **window), trace=trace)
    np.testing.assert_allclose(trace.arrays()["t"], [i / 10 for i in [*first, *guided]], atol=1e-6)
    assert value.tally.backwards == len([*first, *guided])
    moved = not torch.equal(out, qsteer.sample(BASE, None, x))
    assert moved == bool([*first, *guided])


def test_rows_at_different_times_are_each_guided_as_alone():
    x, t = noise(4, 2, 2), torch.tensor([0.0, 0.2, 0.5, 0.8], dtype=DOUBLE)
    for rule in (qsteer.Tweedie(0.3, stop=0.5), qsteer.QGF(0.3, scaling="sigma", start=0.2)):
        steered = rule(BASE, VALUE)
        alone = torch.cat([steered(x[i : i + 1], t[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(steered(x, t), alone, rtol=1e-12, atol=1e-12)
        inside = [rule.start <= float(s) <= rule.stop and (rule.at_noise or s > 0) for s in t]
        assert [not torch.equal(a, b) for a, b in zip(steered(x, t), BASE(x, t), strict=True)] == inside


# ------------------------------------------------------------------------------------------------------ masks

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
SEEN = MASK.bool()


def seen_only(a: torch.Tensor) -> torch.Tensor:
    return bumpy(a[:, SEEN][:, :, None])


@pytest.mark.parametrize("mask", [MASK, MASK.float(), MASK.bool()], ids=["int", "float", "bool"])
@pytest.mark.parametrize("rule", ALL, **by_name)
def test_masked_entries_get_no_guidance_and_are_in_neither_norm(rule, mask):
    x, value = noise(4, 2, 3), qsteer.value(seen_only, mask=mask)
    v = nonlinear(x, fixed_times(0.5, 4))
    push = guidance(rule(0.3, scaling="match_norm"), BASE, value, x, 0.5)
    assert (push[:, ~SEEN] == 0).all()
    ratio = push[:, SEEN].norm(dim=1) / v[:, SEEN].norm(dim=1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3), rtol=1e-6, atol=0)
    unmasked = guidance(rule(1.0, scaling="raw"), BASE, qsteer.value(seen_only), x, 0.5)
    if rule in (qsteer.Tweedie, qsteer.ThroughTime):
        assert (unmasked[:, ~SEEN].abs() > 0).all()  # the full Jacobian does reach padding: the mask matters
    direction = unmasked[:, SEEN] / unmasked[:, SEEN].norm(dim=1, keepdim=True)
    if rule is not qsteer.RandomDirection:
        torch.testing.assert_close(push[:, SEEN] / push[:, SEEN].norm(dim=1, keepdim=True), direction)


@pytest.mark.parametrize("scaling", ["match_norm", "clip_norm"])
def test_the_velocity_of_masked_entries_does_not_change_the_strength(scaling):
    x, value = noise(4, 2, 3), qsteer.value(seen_only, mask=MASK)
    louder = qsteer.field(lambda x, t: torch.where(SEEN, nonlinear(x, t), 100.0))
    for rule in (qsteer.QGF(0.3, scaling=scaling), qsteer.NoisyGradient(0.3, scaling=scaling)):
        torch.testing.assert_close(guidance(rule, louder, value, x, 0.5), guidance(rule, BASE, value, x, 0.5))


def test_masked_entries_are_the_base_policys_own_whatever_their_gradient_is():
    def bad_outside(a):
        if a.requires_grad:
            a.register_hook(lambda g: torch.where(SEEN, g, torch.nan))
        return seen_only(a)

    x, field, trace = noise(4, 2, 3, dtype=torch.float32), qsteer.field(constant), qsteer.Trace()
    value = qsteer.value(bad_outside, mask=MASK)
    out = qsteer.sample(field, value, x, rule=qsteer.QGF(0.3), trace=trace)
    base = qsteer.sample(field, None, x)
    assert torch.equal(out[:, ~SEEN], base[:, ~SEEN]) and not torch.isclose(out, base)[:, SEEN].any()
    assert trace.fallbacks == 0


# -------------------------------------------------------------------------------------------------- fallbacks

BAD = torch.tensor([False, True, False, True, False])


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
@pytest.mark.parametrize("scaling", ["match_norm", "raw", "sigma"])
def test_rows_without_a_finite_value_or_gradient_are_the_base_policys_and_the_others_untouched(
    rule, kind, scaling
):
    x, trace = noise(5, 2, 2, dtype=torch.float32), qsteer.Trace()
    rule = rule(0.1, scaling=scaling)
    out = qsteer.sample(BASE, qsteer.value(spoiled(bumpy, kind), BAD), x, rule=rule, trace=trace)
    assert torch.equal(out[BAD], qsteer.sample(BASE, None, x)[BAD])
    assert torch.equal(out[~BAD], qsteer.sample(BASE, VALUE, x, rule=rule)[~BAD])
    steps = 10 if isinstance(rule, qsteer.QGF) else 9
    assert trace.fallbacks == 2 * steps
    strength = trace.arrays()["strength"]
    assert np.isnan(strength[BAD]).all() and np.isfinite(strength[~BAD]).all()


@pytest.mark.filterwarnings("ignore:steering met non-finite")
def test_only_the_steps_without_a_finite_value_fall_back():
    calls, bad_steps, x = [], {3, 7}, noise(5, 2, 2)

    def value(a, bad):
        calls.append(len(calls) + 1)  # t = 0 is not guided, so call i is step i
        return torch.where(bad & (calls[-1] in bad_steps), torch.nan, bumpy(a))

    trace, rule = qsteer.Trace(steps=False), qsteer.Tweedie(0.3)
    out = qsteer.sample(BASE, qsteer.value(value, BAD), x, rule=rule, trace=trace)
    steered, expected = rule(BASE, VALUE), x
    for i in range(10):
        t = torch.full((5,), i / 10, dtype=torch.float32).to(DOUBLE)
        here = (BAD & (i in bad_steps))[:, None, None]
        expected = expected + 0.1 * torch.where(here, nonlinear(expected, t), steered(expected, t)).detach()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert trace.fallbacks == 4


def test_fallbacks_are_counted_always_and_warned_of_once():
    value, x, trace = qsteer.value(spoiled(bumpy, "nan"), BAD), noise(5, 2, 2), qsteer.Trace(steps=False)
    with pytest.warns(RuntimeWarning, match="18 row-steps.*fell back.*look at the critic's inputs") as seen:
        qsteer.sample(BASE, value, x, rule=qsteer.Tweedie(), trace=trace)
        qsteer.sample(BASE, value, x, rule=qsteer.Tweedie(), trace=trace)
    assert len(seen) == 1 and trace.fallbacks == 36
    with pytest.warns(RuntimeWarning, match="18 row-steps"):  # without a trace too
        qsteer.sample(BASE, value, x, rule=qsteer.Tweedie())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie())


@pytest.mark.filterwarnings("ignore:steering met non-finite")
def test_a_policys_own_non_finite_row_spoils_no_other():
    field = qsteer.field(lambda x, t, bad: torch.where(bad[:, None, None], torch.nan, nonlinear(x, t)), BAD)
    x, trace = noise(5, 2, 2), qsteer.Trace(steps=False)
    out = qsteer.sample(field, VALUE, x, rule=qsteer.Tweedie(), trace=trace)
    assert torch.equal(out[~BAD], qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie())[~BAD])
    assert out[BAD].isnan().all() and trace.fallbacks == 18


# --------------------------------------------------------------------------- autograd modes, dtypes, networks


class Network(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4)).to(
            dtype
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        return (
            self.layers(x.flatten(1)).reshape(x.shape) if t is not None else self.layers(x.flatten(1)).sum(1)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ALL, **by_name)
def test_steering_leaves_the_networks_and_the_noise_as_they_were(rule, dtype):
    policy, critic, x = Network(dtype), Network(dtype), noise(3, 2, 2, dtype=dtype)
    before = [p.clone() for net in (policy, critic) for p in net.parameters()]
    kept = x.clone()
    out = qsteer.sample(qsteer.field(policy), qsteer.value(critic), x, rule=rule(0.3))
    after = [p for net in (policy, critic) for p in net.parameters()]
    assert all(
        p.grad is None and p.requires_grad and torch.equal(p, q) for p, q in zip(after, before, strict=True)
    )
    assert torch.equal(x, kept) and not x.requires_grad and x.grad is None
    assert out.dtype == dtype and not out.requires_grad and out.grad_fn is None
    assert not torch.allclose(out, qsteer.sample(qsteer.field(policy), None, x))


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_float32_agrees_with_float64(rule):
    if rule is qsteer.RandomDirection:  # its directions are drawn in the chunk's dtype
        pytest.skip("another stream")
    x = noise(3, 2, 2)
    single, double = (qsteer.sample(BASE, VALUE, x.to(d), rule=rule(0.2)) for d in (torch.float32, DOUBLE))
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_autograd_mode_of_the_caller_does_not_matter(rule):
    x, policy, critic = noise(3, 2, 2, dtype=torch.float32), Network(torch.float32), Network(torch.float32)
    field, value = qsteer.field(policy), qsteer.value(critic)
    plain = qsteer.sample(field, value, x, rule=rule(0.3))
    with torch.no_grad():
        assert torch.equal(qsteer.sample(field, value, x, rule=rule(0.3)), plain)
    with torch.inference_mode():
        made_inside = x + 0.0
        assert made_inside.is_inference()
        inside = qsteer.sample(field, value, made_inside, rule=rule(0.3))
        assert torch.is_inference_mode_enabled()
    assert torch.equal(inside, plain) and not inside.is_inference()
    assert torch.equal(qsteer.sample(field, value, x.clone().requires_grad_(), rule=rule(0.3)), plain)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sampler", [qsteer.Euler(), qsteer.BestOfN(3), qsteer.TrustRegion()], ids=repr)
def test_observations_made_in_inference_mode_can_be_steered_on(sampler):
    with torch.inference_mode():
        obs = noise(3, 1, 1) + 0.0
        field = qsteer.field(lambda x, t, o: o["a"] * torch.sin(x), {"a": obs})
        value = qsteer.value(lambda a, o: (o * a * a).flatten(1).sum(1), obs)
        torch.manual_seed(0)
        inside = qsteer.sample(field, value, noise(3, 2, 2), rule=qsteer.Tweedie(), sampler=sampler)
    obs = noise(3, 1, 1)
    field = qsteer.field(lambda x, t, o: o["a"] * torch.sin(x), {"a": obs})
    value = qsteer.value(lambda a, o: (o * a * a).flatten(1).sum(1), obs)
    torch.manual_seed(0)
    assert torch.equal(
        inside, qsteer.sample(field, value, noise(3, 2, 2), rule=qsteer.Tweedie(), sampler=sampler)
    )


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_a_steered_field_is_a_field_and_repeats_as_one(rule):
    obs = noise(3, 1, 1)
    field = qsteer.field(lambda x, t, o: o * nonlinear(x, t), obs)
    value = Ensemble((lambda a, o: o[:, 0, 0] * bumpy(a),), obs, mask=torch.tensor([[1, 1], [1, 0]]))
    x, t = noise(3, 2, 2), fixed_times(float(np.float32(0.5)), 3)
    for made in (rule(0.3), qsteer.Negated(rule(0.3))):
        steered = made(field, value)
        assert isinstance(steered, qsteer.Field) and steered.base is field
        many = steered.repeat(2)(x.repeat_interleave(2, 0), t.repeat_interleave(2, 0))
        torch.testing.assert_close(many, steered(x, t).repeat_interleave(2, 0), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("rule", ALL, **by_name)
@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strengths_out_of_range_are_refused_and_point_to_negated(rule, strength):
    with (
        as_installed(),
        pytest.raises(ValueError, match=r"finite strength of at least 0, got.*qsteer\.Negated\(rule\)"),
    ):
        rule(strength)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"scaling": "matchnorm"}, "expected one of match_norm, raw, clip_norm, sigma, got 'matchnorm'"),
        ({"start": -0.1}, r"expected 0 <= start <= stop <= 1 in paper time \(0 is noise\), got -0.1"),
        ({"start": 0.7, "stop": 0.3}, "expected 0 <= start <= stop <= 1.*got 0.7, 0.3"),
        ({"stop": 1.5}, "expected 0 <= start <= stop <= 1"),
        ({"start": float("nan")}, "expected 0 <= start <= stop <= 1"),
        (
            {"clip": (1.0, -1.0)},
            r"expected \(low, high\) with low < high, or None for no clipping, got \(1.0, -1.0\)",
        ),
        ({"clip": (0.0, 0.0)}, "low < high"),
        ({"clip": (-1.0, 0.0, 1.0)}, "low < high"),
        ({"clip": (float("nan"), 1.0)}, "low < high"),
        ({"clip": 1.0}, "low < high"),
    ],
)
@pytest.mark.parametrize("rule", ALL, **by_name)
def test_arguments_out_of_range_are_refused_with_what_was_expected(rule, bad, message):
    with as_installed(), pytest.raises(ValueError, match=message):
        rule(**bad)


def test_negating_something_else_is_refused():
    with (
        as_installed(),
        pytest.raises(TypeError, match=r"expected a guidance rule such as Tweedie\(\), got Euler"),
    ):
        qsteer.Negated(qsteer.Euler())


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_values_without_a_gradient_are_refused_and_point_to_best_of_n(rule):
    for fn in (lambda a: total(a.detach()), lambda a: torch.zeros(len(a))):
        with pytest.raises(
            ValueError, match=r"differentiable in the action.*detach\(\) or no_grad\(\).*qsteer\.BestOfN"
        ):
            qsteer.sample(BASE, qsteer.value(fn), noise(2, 2, 2), rule=rule(0.1))


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_rules_are_immutable_and_compare_by_what_they_do(rule):
    with pytest.raises(AttributeError):
        rule().start = 0.5
    assert rule(0.1) == rule(0.1) != rule(0.2)
    assert hash(rule(0.1)) == hash(rule(0.1))


def test_tweedie_says_that_the_jacobian_is_lost():
    field = qsteer.field(torch.no_grad()(lambda x, t: torch.tanh(x)))
    value = qsteer.value(lambda a: a.flatten(1).sum(1))
    with pytest.warns(RuntimeWarning, match="without no_grad"):
        qsteer.sample(field, value, torch.randn(2, 3, 2), rule=qsteer.Tweedie())

"""GLASS against closed forms.

For x1 ~ N(m, s²) the endpoint posterior is N(D, P), so that the inner flow is the flow of a Gaussian again,
whose velocity is known: a derivation of GLASS without its formula. A mixture's posterior is a mixture.
"""

import math

import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    GAUSSIAN,
    MIXTURE,
    CountingField,
    Gaussian,
    Host,
    Mixture,
    as_installed,
    bumpy,
    differences,
    fixed_times,
    noise,
    nonlinear,
    uniform,
)

import qsteer
from qsteer.maps import GlassPosterior, glass_velocity

MODES = Mixture(
    torch.tensor([0.3, 0.7], dtype=DOUBLE),
    torch.tensor([[[-1.0]], [[1.0]]], dtype=DOUBLE),
    torch.tensor([0.15, 0.15], dtype=DOUBLE),
)


def test_glass_velocity_is_the_published_formula():
    x, xbar = noise(50, 2, 2), noise(50, 2, 2, seed=1)
    t, u = uniform(50), uniform(50, seed=2)
    a, b = t[:, None, None], u[:, None, None]
    r = (a**2 * (1 - b) ** 2 + (1 - a) ** 2 * b**2).sqrt()
    q = (1 - a) * (1 - b)
    star = r / (r + q)
    v = nonlinear(star * ((1 - b) ** 2 * a * x + (1 - a) ** 2 * b * xbar) / r**2, star.flatten())
    outer, answer = a * (1 - b) / (r * (r + q)), (1 - a) / (r + q)
    inner = (b * (1 - a) ** 2 - a**2 * (1 - b) - r * (1 - a)) / (r * (r + q))
    torch.testing.assert_close(
        glass_velocity(BASE, x, t, xbar, u), outer * x + inner * xbar + answer * v, rtol=1e-11, atol=1e-11
    )


def test_glass_velocity_is_the_velocity_of_the_flow_to_a_gaussian_posterior():
    x, xbar, t, u = noise(50, 1, 3), noise(50, 1, 3, seed=1), uniform(50), uniform(50, seed=2)
    posterior = Gaussian(GAUSSIAN.denoised(x, t), GAUSSIAN.variance(x, t).sqrt())
    got = glass_velocity(qsteer.field(GAUSSIAN.velocity), x, t, xbar, u)
    torch.testing.assert_close(got, posterior.velocity(xbar, u), rtol=1e-9, atol=1e-9)


def posterior_of(base: Mixture, x: torch.Tensor, t: torch.Tensor) -> Mixture:
    """The mixture of one row's endpoint posterior."""
    means = torch.stack([g.denoised(x, t)[0] for g in base.parts()])
    variances = torch.stack([g.variance(x, t).flatten()[0] for g in base.parts()])
    return Mixture(base.posterior(x, t)[:, 0, 0, 0], means, variances.sqrt())


@pytest.mark.parametrize("t", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("u", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_glass_velocity_is_the_velocity_of_the_flow_to_a_mixture_posterior(t, u):
    x, xbar = noise(1, 2, 2), noise(30, 2, 2, seed=1)
    posterior = posterior_of(MIXTURE, x, fixed_times(t, 1))
    got = glass_velocity(
        qsteer.field(MIXTURE.velocity),
        x.expand(30, 2, 2),
        fixed_times(t, 30),
        xbar,
        fixed_times(u, 30),
    )
    torch.testing.assert_close(got, posterior.velocity(xbar, fixed_times(u, 30)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("u", [0.0, 1e-6, 0.5, 1.0])
def test_glass_velocity_at_outer_time_zero_is_the_base_flow_whatever_the_outer_state(u, dtype):
    x, xbar = noise(5, 2, 2, dtype=dtype), noise(5, 2, 2, seed=1, dtype=dtype)
    times = fixed_times(u, 5, dtype)
    got = glass_velocity(BASE, x, fixed_times(0.0, 5, dtype), xbar, times)
    torch.testing.assert_close(got, nonlinear(xbar, times))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("t", [1e-6, 0.5, 1 - 1e-6])
def test_glass_velocity_at_inner_time_zero_points_to_the_denoised_action(t, dtype):
    x, xbar = noise(5, 2, 2, dtype=dtype), noise(5, 2, 2, seed=1, dtype=dtype)
    times = fixed_times(t, 5, dtype)
    got = glass_velocity(BASE, x, times, xbar, fixed_times(0.0, 5, dtype))
    expected = qsteer.flow.denoise(x, nonlinear(x, times), times) - xbar
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("t", [0.0, 1e-6, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("u", [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
def test_glass_velocity_is_finite_at_every_corner_and_asks_once_within_the_policys_time(t, u, dtype):
    asked = []

    def velocity(x, t):
        asked.append(t)
        return nonlinear(x, t)

    x, xbar = noise(4, 2, 2, dtype=dtype), noise(4, 2, 2, seed=1, dtype=dtype)
    v = glass_velocity(qsteer.field(velocity), x, fixed_times(t, 4, dtype), xbar, fixed_times(u, 4, dtype))
    assert torch.isfinite(v).all() and v.dtype == dtype
    assert len(asked) == 1 and (asked[0] >= max(t, u) - 1e-6).all() and (asked[0] <= 1).all()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_glass_samples_have_a_gaussian_posteriors_mean_and_its_std_as_the_steps_grow(t):
    """Samples are affine in the noise, entry by entry: three noises give mean and std without sampling error.

    The mean runs along a straight line, on which every step is exact.
    """
    x, times = noise(4, 1, 3), fixed_times(t, 4)
    eps = torch.tensor([0.0, 1.0, -2.0], dtype=DOUBLE)[:, None, None, None].expand(3, 4, 1, 3)
    mean, std = GAUSSIAN.denoised(x, times), GAUSSIAN.variance(x, times).sqrt()
    errors = []
    for steps in (50, 100, 200):
        zero, one, minus_two = GlassPosterior(qsteer.field(GAUSSIAN.velocity), steps)(eps, x, times)
        torch.testing.assert_close(minus_two - zero, -2 * (one - zero), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(zero, mean, rtol=1e-9, atol=1e-9)
        errors.append((one - zero - std).abs().mean())
    assert errors[-1] < 0.01
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6])
def test_glass_samples_have_a_mixture_posteriors_mode_weights_and_moments(t):
    """4 standard errors, and 0.01 for 60 steps."""
    n, x, times = 4000, torch.tensor([[[-0.1]], [[0.05]], [[0.3]]], dtype=DOUBLE), fixed_times(t, 3)
    x1 = GlassPosterior(qsteer.field(MODES.velocity), 60)(noise(n, 3, 1, 1), x, times)[..., 0, 0]
    weight = MODES.posterior(x, times)[1, :, 0, 0]
    assert ((0.02 < weight) & (weight < 0.98)).all()
    error = (weight * (1 - weight) / n).sqrt()
    assert (((x1 > 0).double().mean(0) - weight).abs() < 4 * error + 0.01).all()
    mean, variance = MODES.denoised(x, times)[:, 0, 0], MODES.covariance(x, times)[:, 0, 0]
    assert ((x1.mean(0) - mean).abs() < 4 * (variance / n).sqrt() + 0.01).all()
    square = (x1 - mean) ** 2
    assert ((square.mean(0) - variance).abs() < 4 * square.std(0) / math.sqrt(n) + 0.01).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("field", [BASE, Host(nonlinear)], ids=["paper", "mirrored"])
def test_glass_samples_are_the_same_when_the_first_velocity_is_known(field, steps):
    x, eps, times = noise(3, 2, 2), noise(4, 3, 2, 2, seed=1), fixed_times(0.4, 3)
    posterior = GlassPosterior(field, steps)
    got = posterior.given(field(x, times), eps, x, times)
    torch.testing.assert_close(got, posterior(eps, x, times), rtol=1e-6, atol=1e-6)
    if steps == 1:
        denoised = qsteer.flow.denoise(x, field(x, times), times)
        torch.testing.assert_close(got, denoised.expand(4, 3, 2, 2))
    else:
        assert (got.std(0) > 1e-3).all()


def test_glass_samples_of_a_mirrored_host_are_those_of_the_paper():
    x, eps = noise(3, 2, 2), noise(4, 3, 2, 2, seed=1)
    host = Host(lambda x, u: -MIXTURE.velocity(x, 1 - u.to(x.dtype)))
    got, expected = (
        GlassPosterior(field, 7)(eps, x, fixed_times(0.4, 3))
        for field in (host, qsteer.field(MIXTURE.velocity))
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_glass_costs_steps_forwards_on_all_samples_and_one_less_inside_a_rule(steps):
    field, x, eps, times = CountingField(nonlinear), noise(3, 2, 2), noise(5, 3, 2, 2), fixed_times(0.4, 3)
    posterior = GlassPosterior(field, steps)
    posterior(eps, x, times)
    assert field.tally.rows == [15] * steps
    field.tally.rows.clear()
    posterior.given(noise(3, 2, 2), eps, x, times)
    assert field.tally.rows == [15] * (steps - 1)


@pytest.mark.parametrize("known", [False, True])
def test_glass_samples_are_differentiable_in_the_outer_state(known):
    eps, times = noise(3, 4, 2, 2, seed=1), fixed_times(0.4, 4)

    def score(x):
        posterior = GlassPosterior(BASE, 3)
        x1 = posterior.given(BASE(x, times), eps, x, times) if known else posterior(eps, x, times)
        return sum(bumpy(sample) for sample in x1)

    x = noise(4, 2, 2).requires_grad_()
    g = torch.autograd.grad(score(x).sum(), x)[0]
    torch.testing.assert_close(g, differences(score, x.detach()), rtol=1e-6, atol=1e-6)


def test_glass_samples_of_a_batch_are_those_of_each_observation_alone():
    goals = torch.tensor([-3.0, 0.0, 5.0], dtype=DOUBLE)[:, None, None]
    x, eps, times = noise(3, 2, 2), noise(4, 3, 2, 2, seed=1), torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE)

    def field(rows):
        return qsteer.field(lambda x, t, o: o + nonlinear(x, t), goals[rows])

    got = GlassPosterior(field(slice(None)), 3)(eps, x, times)
    for b in range(3):
        rows = slice(b, b + 1)
        alone = GlassPosterior(field(rows), 3)(eps[:, rows], x[rows], times[rows])
        torch.testing.assert_close(got[:, rows], alone, rtol=1e-12, atol=1e-12)


def test_glass_without_steps_or_policy_is_refused():
    with as_installed(), pytest.raises(ValueError, match=r"GlassPosterior.steps: expected at least 1, got 0"):
        GlassPosterior(BASE, 0)
    with pytest.raises(ValueError, match=r"expected a policy to sample from.*Posterior\(GlassPosterior"):
        GlassPosterior()(noise(1, 1, 2, 2), noise(1, 2, 2), fixed_times(0.5, 1))

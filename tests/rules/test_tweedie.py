"""Tweedie's gradient against finite differences and the posterior's covariance."""

import pytest
import torch
from fields import BASE, MIXTURE, VALUE, bumpy, differences, fixed_times, guidance, noise, nonlinear, norms
from guidance_rules import RAW

import qsteer


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_tweedies_gradient_on_a_mixture_is_the_posterior_covariance_times_the_values_gradient(t):
    """d E[x1 | x_t] / dx = t/(1-t)² Cov[x1 | x_t], symmetric: a second derivation of the Jacobian."""
    x, times = noise(10, 2, 2), fixed_times(t, 10)
    slope = differences(bumpy, MIXTURE.denoised(x, times)).flatten(1)
    expected = t / (1 - t) ** 2 * torch.einsum("bij,bj->bi", MIXTURE.covariance(x, times), slope)
    got = guidance(qsteer.Tweedie(1.0, **RAW), qsteer.field(MIXTURE.velocity), VALUE, x, t)
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_tweedies_gradient_is_the_finite_difference_through_the_policy_and_qgfs_is_not(t):
    x, times = noise(6, 3, 2), fixed_times(t, 6)
    expected = differences(lambda z: bumpy(z + (1 - t) * nonlinear(z, times)), x)
    torch.testing.assert_close(
        guidance(qsteer.Tweedie(1.0, **RAW), BASE, VALUE, x, t), expected, rtol=1e-6, atol=1e-6
    )
    identity = guidance(qsteer.QGF(1.0, **RAW), BASE, VALUE, x, t)
    assert (norms(identity - expected) > 0.3 * (1 - t) * norms(expected)).all()  # J = I + (1 - t) dv/dx


def test_tweedie_says_that_the_jacobian_is_lost():
    field = qsteer.field(torch.no_grad()(lambda x, t: torch.tanh(x)))
    value = qsteer.value(lambda a: a.flatten(1).sum(1))
    with pytest.warns(RuntimeWarning, match="without no_grad"):
        qsteer.sample(field, value, torch.randn(2, 3, 2), rule=qsteer.Tweedie())

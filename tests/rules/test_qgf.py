"""QGF: the value's gradient at the denoised action, as if the Jacobian were the identity."""

import pytest
import torch
from fields import BASE, VALUE, bumpy, constant, differences, fixed_times, guidance, noise, nonlinear, norms
from guidance_rules import RAW

import qsteer


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


def test_qgf_at_noise_uses_the_clamped_sigma():
    x = noise(8, 3, 2)
    raw, push = (guidance(qsteer.QGF(0.7, scaling=s), BASE, VALUE, x, 0.0) for s in ("raw", "sigma"))
    torch.testing.assert_close(push, 25 * raw)


def test_qgf_guides_noise_too():
    assert (norms(guidance(qsteer.QGF(0.5), BASE, VALUE, noise(3, 2, 2), 0.0)) > 0).all()

"""The scalings of a direction: matched and clipped norms, raw, and sigma."""

import pytest
import torch
from fields import BASE, VALUE, bumpy, fixed_times, guidance, noise, nonlinear, norms
from guidance_rules import ALL, BY_VALUE, by_name

import qsteer


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

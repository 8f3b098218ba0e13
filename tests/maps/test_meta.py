"""Meta flow maps: where they start, what they sample, and that they learn."""

import pytest
import torch
from fields import BASE, DOUBLE, PLANE, fixed_times, noise, nonlinear, uniform
from small_maps import NETWORKS, features, small

import qsteer
from qsteer.maps import (
    GlassPosterior,
    MetaFlowMap,
    MetaMapConfig,
    adaptive,
    diagonal_loss,
    glass_velocity,
    semigroup_loss,
)
from qsteer.maps.glass import glass


@pytest.mark.parametrize("network", NETWORKS)
def test_a_residual_meta_map_starts_as_glass_and_its_samples_as_the_denoised_action(network):
    meta = small(network, MetaFlowMap, MetaMapConfig)
    meta.net.start_at_zero()
    x, xbar, t, u = noise(3, 2, 2), noise(3, 2, 2, seed=1), uniform(3), uniform(3, seed=2)
    z = meta.net.encode(features(network))
    got = meta.velocity(z, xbar, u, torch.ones_like(u), x, t, glass(BASE, x, t, xbar, u))
    torch.testing.assert_close(got, glass_velocity(BASE, x, t, xbar, u))
    samples = meta.bind(features(network), BASE)(noise(5, 3, 2, 2), x, t)
    expected = qsteer.flow.denoise(x, nonlinear(x, t), t).expand(5, 3, 2, 2)
    torch.testing.assert_close(samples, expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("residual", [True, False])
def test_meta_samples_are_the_jump_from_inner_time_zero_to_one(network, residual):
    meta = small(network, MetaFlowMap, MetaMapConfig, residual=residual)
    x, eps, t = noise(3, 2, 2), noise(5, 3, 2, 2, seed=1), torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)
    posterior = meta.bind(features(network), BASE)
    samples, zero, one = posterior(eps, x, t), fixed_times(0.0, 3), fixed_times(1.0, 3)
    z = meta.net.encode(features(network))
    for sample, xbar in zip(samples, eps, strict=True):
        base = glass(BASE, x, t, xbar, zero) if residual else None
        torch.testing.assert_close(sample, xbar + meta.velocity(z, xbar, zero, one, x, t, base))
    assert (samples.std(0) > 1e-3).all()
    if residual:
        torch.testing.assert_close(posterior.given(nonlinear(x, t), eps, x, t), samples)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean over 16 directions of W1; a, b of shape (N, B, D)."""
    d = torch.nn.functional.normalize(noise(a.shape[-1], 16, seed=9, dtype=a.dtype), dim=0)
    return ((a @ d).sort(0).values - (b @ d).sort(0).values).abs().mean()


def test_a_meta_map_distilled_from_the_exact_field_approaches_glass():
    torch.manual_seed(0)
    field = qsteer.field(PLANE.velocity)
    meta = MetaFlowMap(MetaMapConfig(horizon=1, action_dim=2, features=1, hidden=(64, 64), harmonics=2))
    optimiser = torch.optim.Adam(meta.parameters(), 4e-3)
    observed = torch.zeros(256, 1)
    x = qsteer.flow.interpolate(noise(64, 1, 2, dtype=torch.float32), PLANE.draw(64), torch.rand(64) ** 2)
    t, eps = torch.linspace(0.05, 0.7, 64), torch.randn(256, 64, 1, 2)
    truth = GlassPosterior(field, 25)(eps, x, t)[:, :, 0]

    def distance():
        with torch.no_grad():
            samples = meta.bind(observed[:64], field)(torch.randn(256, 64, 1, 2), x, t)
        return float(sliced_wasserstein(samples[:, :, 0], truth))

    before = distance()
    for step in range(300):
        z = meta.net.encode(observed)
        t_, x1 = torch.rand(256) ** 2, PLANE.draw(256, seed=step + 1)
        x_ = qsteer.flow.interpolate(torch.randn(256, 1, 2), x1, t_)
        u, w = torch.rand(256, 2).sort(1).values.unbind(1)

        def velocity(xbar, u, w, z=z, x_=x_, t_=t_):
            return meta.velocity(z, xbar, u, w, x_, t_, glass(field, x_, t_, xbar, u))

        noise_ = torch.randn(256, 1, 2)
        xbar = qsteer.flow.interpolate(noise_, x1, u)
        diagonal = diagonal_loss(velocity, noise_, x1, u, glass_velocity(field, x_, t_, xbar, u))
        consistency = semigroup_loss(velocity, xbar, u, w, u + torch.rand(256) * (w - u))
        loss = (adaptive(diagonal, 0.5) + 0.5 * adaptive(consistency, 1.0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = distance()
    floor = float(sliced_wasserstein(GlassPosterior(field, 25)(torch.randn_like(eps), x, t)[:, :, 0], truth))
    print(f"sliced W1 to GLASS: untrained {before:.3f}, trained {after:.3f}, GLASS again {floor:.3f}")
    assert after < before / 2

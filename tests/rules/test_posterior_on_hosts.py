"""Posterior guidance on lerobot's own code: Tweedie without spread, and the true gradient."""

from collections.abc import Iterator

import hosts
import pytest
import torch
from map_hosts import N, build, chunk, config, lend, meta_map
from torch import Tensor, nn

import qsteer
from qsteer.maps import GlassPosterior, MetaFlowMap
from qsteer.steering.handle import steer


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(name: str) -> Iterator[nn.Module]:
    yield from lend(name)


@pytest.mark.parametrize("kind", ["GLASS of one step", "an untrained residual map"])
def test_without_spread_posterior_is_tweedie(policy: nn.Module, name: str, kind: str):
    posterior = GlassPosterior(steps=1) if kind == "GLASS of one step" else MetaFlowMap(config(name))
    base, chunks = chunk(policy), []
    for rule in (qsteer.Tweedie(alpha=0.4), qsteer.Posterior(posterior, alpha=0.4, samples=N)):
        with steer(policy, hosts.Target(), rule):
            chunks.append(chunk(policy))
    assert (chunks[0] - base).abs().max() > 0.05
    torch.testing.assert_close(chunks[0], chunks[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["glass", "map"])
def test_law_08_the_posteriors_gradient_is_the_true_one(
    name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
):
    """Against central differences of ``log mean_n exp Q(x1_n)`` at fixed noise, through the host's own code.

    Hosts cast to float32 on the way. Here that is a name for float64: they compute in double precision.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    policy, seen = build(name).double(), []
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in hosts.observe(policy).items()
    }
    with steer(policy, hosts.Target().double(), hosts.Spy(seen)):
        policy.predict_action_chunk(batch, noise=hosts.draw(policy).double())
        field, value, noise = seen[0]
        posterior = GlassPosterior(field, steps=3) if sampler == "glass" else meta_map(name).double()
        rule = qsteer.Posterior(
            posterior, alpha=1.0, samples=N, scaling="raw", clip=None, standardize=False, tau=0.3
        )
        bound = rule.on(field).posterior
        for time, x in ((0.2, noise), (0.7, 0.5 * noise)):
            t = torch.tensor([time], dtype=torch.float64)
            torch.manual_seed(0)
            push = (rule(field, value)(x, t) - field(x, t))[0]
            torch.manual_seed(0)
            eps = torch.randn(N, *x.shape, dtype=torch.float64)

            def potential(x: Tensor, t: Tensor = t, eps: Tensor = eps) -> Tensor:
                q = torch.cat([value(sample) for sample in bound(eps, x, t)])
                return (0.3 * q).logsumexp(0)

            differences = torch.zeros_like(x[0])
            for i, j in value.mask.nonzero().tolist():
                nudge = torch.zeros_like(x)
                nudge[0, i, j] = 1e-5
                with torch.no_grad():
                    differences[i, j] = (potential(x + nudge) - potential(x - nudge)) / 2e-5
            error = (push - differences).norm() / differences.norm()
            tweedie = qsteer.Tweedie(alpha=1.0, scaling="raw", clip=None)(field, value)
            apart = (push - 0.3 * (tweedie(x, t) - field(x, t))[0]).norm() / push.norm()
            print(f"{name} t={time}: error {error:.1e}, samples are not their mean: {apart:.2f}")
            assert push.dtype == torch.float64
            assert error < 1e-7
            assert apart > 0.02

"""Micro-benchmarks of rules, samplers and critics: `make bench`. The ordinary suite counts instead of timing.

The policy is the demonstration's in size, so that what a method adds is not lost in it.
"""

from typing import Any

import pytest
import torch

import qsteer
from qsteer.bench.latency import Subject, make_maps, make_subject
from qsteer.maps import GlassPosterior
from qsteer.testing import hosts

torch.set_num_threads(1)
GLASS = GlassPosterior(steps=4)
EULER = qsteer.Euler()
RULES = [
    None,
    qsteer.Tweedie(),
    qsteer.Tweedie(alpha="auto"),
    qsteer.Gated(qsteer.Tweedie()),
    qsteer.QGF(),
    qsteer.NoisyGradient(),
    qsteer.RandomDirection(),
    qsteer.ThroughTime(),
    qsteer.Posterior(GLASS, samples=4),
    qsteer.GradientFreePosterior(GLASS, samples=4),
]
SAMPLERS = [
    qsteer.Euler(),
    qsteer.BestOfN(8),
    qsteer.BestOfN(32),
    qsteer.RandomOfN(8),
    qsteer.TrustRegion(),
    qsteer.BeamSearch(4, 4, 1),
    qsteer.KeepBest(),
]
CRITICS: dict[str, dict[str, Any]] = {
    "demonstration": {},
    "qpilots": {"hidden": (128,) * 3, "members": 10},
    "one member": {"members": 1},
}


@pytest.fixture(scope="module")
def small() -> Subject:
    return make_subject("mlp", "small", chunk=5)


@pytest.mark.benchmark(group="rules")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule).split("(")[0])
def test_rule(benchmark: Any, small: Subject, rule: qsteer.Rule | None) -> None:
    field, value, noise = small.open()
    benchmark(qsteer.sample, field, value, noise, rule=rule)


@pytest.mark.benchmark(group="samplers")
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: str(sampler).split(", inner")[0])
def test_sampler(benchmark: Any, small: Subject, sampler: qsteer.Sampler) -> None:
    field, value, noise = small.open()
    benchmark(qsteer.sample, field, value, noise, sampler=sampler)


@pytest.mark.benchmark(group="maps")
@pytest.mark.parametrize("kind", ["posterior", "gradient-free", "beam search"])
def test_map(benchmark: Any, small: Subject, kind: str) -> None:
    meta, flow = make_maps(small)
    rule = {"posterior": qsteer.Posterior, "gradient-free": qsteer.GradientFreePosterior}.get(kind)
    sampler = EULER if rule else qsteer.BeamSearch(4, 4, 1, flow_map=flow)
    field, value, noise = small.open()
    benchmark(
        qsteer.sample, field, value, noise, rule=rule(meta, samples=4) if rule else None, sampler=sampler
    )


@pytest.mark.benchmark(group="critics")
@pytest.mark.parametrize("what", ["bind", "forward", "gradient"])
@pytest.mark.parametrize("kind", CRITICS)
def test_critic(benchmark: Any, kind: str, what: str) -> None:
    config = qsteer.CriticConfig(obs_dim=28, action_dim=5, horizon=5, **CRITICS[kind], rho=0.0)
    critic = qsteer.Critic(config).requires_grad_(False)
    obs = torch.randn(1, 28)
    value, a = critic.bind(obs), torch.randn(1, 5, 5)

    def gradient() -> torch.Tensor:
        x = a.clone().requires_grad_()
        return torch.autograd.grad(value(x).sum(), x)[0]

    benchmark({"bind": lambda: critic.bind(obs), "forward": lambda: value(a), "gradient": gradient}[what])


@pytest.mark.benchmark(group="hosts")
@pytest.mark.parametrize("host", hosts.HOSTS)
def test_steering_a_host_costs_its_mechanism(benchmark: Any, host: str) -> None:
    """Tiny hosts: what is seen is the interception and the loop, not the network."""
    found = make_subject(host, "tiny", cameras=1, chunk=6)
    with qsteer.steer(found.policy, found.critic, EULER):
        benchmark(found.action)

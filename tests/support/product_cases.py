"""Every rule, every sampler, every host in every number format, to be combined."""

from functools import cache

import hosts
import torch
from compiled_cases import GLASS
from torch import Tensor, nn

import qsteer
from qsteer.types import Rule, Sampler

RULES: dict[type[Rule] | None, tuple[Rule | None, ...]] = {
    None: (None,),
    qsteer.Tweedie: (qsteer.Tweedie(alpha=0.3), qsteer.Tweedie(alpha="auto")),
    qsteer.ForwardTweedie: (qsteer.ForwardTweedie(), qsteer.ForwardTweedie(stale=True)),
    qsteer.QGF: (qsteer.QGF(),),
    qsteer.NoisyGradient: (qsteer.NoisyGradient(),),
    qsteer.ThroughTime: (qsteer.ThroughTime(),),
    qsteer.RandomDirection: (qsteer.RandomDirection(),),
    qsteer.Posterior: (qsteer.Posterior(GLASS, samples=2),),
    qsteer.GradientFreePosterior: (qsteer.GradientFreePosterior(GLASS, samples=2),),
    qsteer.Randomized: (qsteer.Randomized(qsteer.QGF()),),
    qsteer.Negated: (qsteer.Negated(qsteer.Tweedie()),),
    qsteer.Gated: (qsteer.Gated(qsteer.Tweedie()),),
}
SAMPLERS: dict[type[Sampler], Sampler] = {
    qsteer.Euler: qsteer.Euler(clip=(-2.0, 2.0)),
    qsteer.BestOfN: qsteer.BestOfN(2),
    qsteer.RandomOfN: qsteer.RandomOfN(2),
    qsteer.TrustRegion: qsteer.TrustRegion(beta=0.5, typical=1.0),
    qsteer.BeamSearch: qsteer.BeamSearch(2, 2, 1),
    qsteer.FeynmanKac: qsteer.FeynmanKac(2),
    qsteer.KeepBest: qsteer.KeepBest(),
}
FORMATS = {
    "plain": (torch.float32, torch.bfloat16, torch.float16),
    "pi0": (torch.float32, torch.bfloat16),
    "pi05": (torch.float32, torch.bfloat16),
    "smolvla": (torch.float32,),
}
"""What a CPU computes of each host, and lerobot builds."""


@cache
def host(name: str, dtype: torch.dtype) -> nn.Module:
    """A host that computes in a format, of three steps."""
    if name == "plain":
        policy = hosts.build(name).to(dtype)
    elif dtype == torch.float32:
        policy = hosts.build(name)
    else:
        policy = getattr(hosts.random_hosts, name)(dtype=dtype)
    hosts.set_steps(policy, 3)
    return policy.eval()


def draw(policy: nn.Module, name: str, dtype: torch.dtype, *seeds: int) -> Tensor:
    """One noise for each seed; lerobot's own is single whatever the weights are."""
    noise = torch.cat([hosts.draw(policy, 1, seed) for seed in seeds])
    return noise.to(dtype) if name == "plain" else noise

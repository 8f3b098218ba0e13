"""The methods that the fast path is tested with, on which hosts, and a critic."""

from typing import Any

import pytest
import torch
from torch import nn

import qsteer
from qsteer.critics import Critic, CriticConfig
from qsteer.maps import GlassPosterior

PREPARED = ("pi0", "pi05", "smolvla")
GLASS = GlassPosterior(steps=2)
METHODS: tuple[tuple[qsteer.Rule | None, qsteer.Sampler], ...] = (
    (None, qsteer.Euler()),
    (qsteer.Tweedie(alpha=0.3), qsteer.Euler()),
    (qsteer.Tweedie(alpha="auto"), qsteer.Euler()),
    (qsteer.Tweedie(alpha=0.3, start=0.4, stop=0.8), qsteer.Euler(steps=7)),
    (qsteer.Tweedie(every=2), qsteer.Euler(steps=7)),
    (qsteer.ForwardTweedie(), qsteer.Euler()),
    (qsteer.ForwardTweedie(stale=True), qsteer.Euler()),
    (qsteer.QGF(), qsteer.Euler()),
    (qsteer.NoisyGradient(), qsteer.Euler()),
    (qsteer.ThroughTime(), qsteer.Euler()),
    (qsteer.Posterior(GLASS, samples=3), qsteer.Euler()),
    (qsteer.GradientFreePosterior(GLASS, samples=3), qsteer.Euler()),
    (qsteer.RandomDirection(), qsteer.Euler()),
    (qsteer.RandomDirection(redraw=True), qsteer.Euler()),
    (qsteer.Randomized(qsteer.QGF()), qsteer.Euler()),
    (qsteer.Negated(qsteer.Tweedie()), qsteer.Euler()),
    (qsteer.Gated(qsteer.Tweedie()), qsteer.Euler()),
    (None, qsteer.BestOfN(4)),
    (None, qsteer.RandomOfN(4)),
    (None, qsteer.TrustRegion(beta=0.5)),
    (None, qsteer.BeamSearch(2, 2, 1)),
    (None, qsteer.FeynmanKac(3)),
    (qsteer.Tweedie(), qsteer.KeepBest()),
    (qsteer.Tweedie(), qsteer.BestOfN(3)),
)
CASES = [
    pytest.param(
        name,
        method,
        id=f"{name}-{method[0]}-{method[1]}",
        marks=pytest.mark.slow if name == "smolvla" and i != 1 else (),
    )
    for name in (*PREPARED, "plain")
    for i, method in enumerate(METHODS[:4] if name == "pi0" else METHODS)
]


def critic(policy: nn.Module, seed: int = 0) -> Critic:
    """A small critic that fits the tiny hosts, with gradients that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(16, 16)))


def runs(handle: Any) -> list[Any]:
    """The kinds of action that a handle has compiled."""
    return list(handle._compiled.runs)

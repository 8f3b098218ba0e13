"""A field and a value, and the passes through them that every method must make."""

import torch

import qsteer
from qsteer.maps import GlassPosterior

H, A = 3, 2
FIELD = qsteer.field(lambda x, t: torch.tanh(x.flip(1)) - x)
VALUE = qsteer.value(lambda a: -(a**2).flatten(1).sum(1))
GLASS = GlassPosterior(steps=4)

# rule, sampler, policy's (forwards, rows, backwards, rows) for one observation, the critic's
COUNTED = [
    (None, qsteer.Euler(), (10, 10, 0, 0), (0, 0, 0, 0)),
    (None, qsteer.Euler(4), (4, 4, 0, 0), (0, 0, 0, 0)),
    (qsteer.Tweedie(), qsteer.Euler(), (10, 10, 9, 9), (9, 9, 9, 9)),
    (qsteer.Tweedie(alpha=0.0), qsteer.Euler(), (10, 10, 0, 0), (0, 0, 0, 0)),
    (qsteer.Tweedie(start=0.5), qsteer.Euler(), (10, 10, 5, 5), (5, 5, 5, 5)),
    (qsteer.Tweedie(alpha="auto"), qsteer.Euler(), (10, 10, 9, 9), (18, 81, 9, 9)),
    (qsteer.Gated(qsteer.Tweedie()), qsteer.Euler(), (10, 10, 9, 9), (18, 27, 9, 9)),
    (qsteer.Negated(qsteer.Tweedie()), qsteer.Euler(), (10, 10, 9, 9), (9, 9, 9, 9)),
    (qsteer.Randomized(qsteer.Tweedie()), qsteer.Euler(), (10, 10, 9, 9), (9, 9, 9, 9)),
    (qsteer.QGF(), qsteer.Euler(), (10, 10, 0, 0), (10, 10, 10, 10)),
    (qsteer.NoisyGradient(), qsteer.Euler(), (10, 10, 0, 0), (9, 9, 9, 9)),
    (qsteer.RandomDirection(), qsteer.Euler(), (10, 10, 0, 0), (0, 0, 0, 0)),
    (qsteer.ThroughTime(), qsteer.Euler(), (1 + 45, 46, 45, 45), (9, 9, 9, 9)),
    (qsteer.Posterior(GLASS, samples=4), qsteer.Euler(), (37, 118, 36, 117), (9, 36, 9, 36)),
    (qsteer.GradientFreePosterior(GLASS, samples=4), qsteer.Euler(), (37, 118, 0, 0), (9, 36, 0, 0)),
    (None, qsteer.BestOfN(8), (10, 80, 0, 0), (1, 8, 0, 0)),
    (None, qsteer.RandomOfN(8), (10, 10, 0, 0), (0, 0, 0, 0)),
    (None, qsteer.TrustRegion(), (10, 10, 0, 0), (1, 1, 1, 1)),
    (None, qsteer.TrustRegion(beta=0.3), (10, 10, 0, 0), (2, 2, 1, 1)),
    (None, qsteer.FeynmanKac(8), (10, 80, 0, 0), (9, 72, 0, 0)),
    (None, qsteer.BeamSearch(4, 4, 1), (14, 104, 0, 0), (3, 24, 1, 4)),
    (None, qsteer.BeamSearch(4, rounds=0), (10, 40, 0, 0), (2, 8, 1, 4)),
    (qsteer.Tweedie(), qsteer.KeepBest(), (20, 20, 9, 9), (11, 11, 9, 9)),
    (qsteer.Tweedie(), qsteer.BestOfN(8), (10, 80, 9, 72), (10, 80, 9, 72)),
]

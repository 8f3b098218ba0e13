"""Critics and gradients of any size: k Q + b steers as Q does, and no square leaves its format."""

import pytest
import torch
from fields import noise, norms

import qsteer
from qsteer.flow import norm
from qsteer.maps import GlassPosterior

FIELD = qsteer.field(lambda x, t: torch.tanh(x.flip(1)) - x)
GOAL = torch.tensor([[0.5, -0.3], [0.2, 0.4]])


class Members(qsteer.Value):
    """Three members that disagree, times k."""

    def __init__(self, k: float):
        self.k = k

    def members(self, a):
        off = torch.tensor([-0.1, 0.0, 0.2])[:, None, None, None]
        return -((a - GOAL.to(a) - off.to(a)) ** 2).flatten(2).sum(2) * self.k

    def __call__(self, a):
        return self.members(a).mean(0)

    def repeat(self, k):
        return self


RULES = [
    (qsteer.Tweedie(0.3), None),
    (qsteer.Tweedie("auto"), None),
    (qsteer.ForwardTweedie(0.3), None),
    (qsteer.QGF(0.3, scaling="match_norm"), None),
    (qsteer.QGF("auto", scaling="match_norm"), None),
    (qsteer.Posterior(GlassPosterior(steps=2), samples=3), None),
    (qsteer.GradientFreePosterior(GlassPosterior(steps=2), samples=3), None),
    (qsteer.Gated(qsteer.Tweedie(0.3)), None),
    (None, qsteer.TrustRegion(0.3, beta=0.5)),
    (None, qsteer.BeamSearch(2, 2, 1)),
]


@pytest.mark.parametrize("k", [1e-30, 1e-12, 1e20, 1e30])
@pytest.mark.parametrize(("rule", "sampler"), RULES, ids=str)
def test_a_critic_of_any_scale_steers_alike(rule, sampler, k):
    x, found = noise(4, 2, 2, dtype=torch.float32), []
    for scale in (1.0, k):
        torch.manual_seed(0)
        trace = qsteer.Trace()
        found.append(
            qsteer.sample(FIELD, Members(scale), x, rule=rule, sampler=sampler or qsteer.Euler(), trace=trace)
        )
        assert trace.fallbacks == 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert (found[0] - qsteer.sample(FIELD, None, x)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_are_those_of_double_precision(dtype):
    largest = torch.finfo(dtype).max / 4
    for size in (largest, 1.0, torch.finfo(dtype).tiny):
        x = (torch.rand(3, 2, 2, dtype=torch.float64) * size).to(dtype)
        torch.testing.assert_close(norm(x).double(), norms(x.double()), rtol=1e-6, atol=0)


def test_a_gradient_of_exactly_zero_pushes_nowhere_and_is_no_fallback():
    flat = qsteer.value(lambda a: (a * 0).flatten(1).sum(1))
    x, trace = noise(3, 2, 2), qsteer.Trace()
    for rule, sampler in RULES[:4] + RULES[-2:-1]:
        got = qsteer.sample(FIELD, flat, x, rule=rule, sampler=sampler or qsteer.Euler(), trace=trace)
        assert torch.equal(got, qsteer.sample(FIELD, None, x)), rule
    assert trace.fallbacks == 0

"""Posterior guidance row by row: rows know nothing of one another, and fall back alone."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fields import BASE, DOUBLE, Ensemble, as_installed, bumpy, constant, noise, nonlinear, norms, spoiled
from guidance_rules import POSTERIORS, by_name
from small_maps import untrained

import qsteer
from qsteer.maps import GlassPosterior
from qsteer.types import PosteriorSampler


@dataclass(frozen=True)
class Replay(PosteriorSampler):
    """A posterior that looks up the rows' noise, whatever noise it is given."""

    posterior: Any
    eps: torch.Tensor

    def on(self, field: qsteer.Field) -> "Replay":
        return Replay(self.posterior.on(field), self.eps)

    def draw(self, field, eps, x, t):
        return self.posterior.draw(field, self.eps, x, t)

    def __call__(self, eps, x, t):
        return self.posterior(self.eps, x, t)


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
@pytest.mark.parametrize("posterior", ["glass", "mlp", "transformer"])
def test_rows_do_not_know_of_one_another(rule, posterior):
    x, t = noise(3, 2, 2), torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE)
    eps, sampler, context = noise(6, 3, 2, 2, seed=4), GlassPosterior(), noise(3, 4, seed=8)
    if posterior != "glass":
        sampler, context = untrained(posterior)
        sampler.net.last.weight.data += noise(2 if posterior == "transformer" else 4, 16)
    goal = noise(3, 2, 2, seed=5)

    def steer(rows):
        observed = torch.utils._pytree.tree_map(lambda part: part[rows], context)
        field = qsteer.field(lambda x, t, o: nonlinear(x, t) + o[0], (goal[rows], observed))
        field = Featured(field, observed)
        value = qsteer.value(lambda a, o: bumpy(a - o), goal[rows])
        return rule(Replay(sampler, eps[:, rows]), 0.5)(field, value)(x[rows], t[rows])

    whole = steer(slice(None))
    for b in range(3):
        torch.testing.assert_close(steer(slice(b, b + 1)), whole[b : b + 1], rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Featured(qsteer.Field):
    """A field whose features are not all it knows of its observations."""

    inner: qsteer.Field
    features: Any

    def __call__(self, x, t):
        return self.inner(x, t)

    def repeat(self, k):
        return Featured(self.inner.repeat(k), qsteer.flow.repeat_rows(self.features, k))


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize(
    ("rule", "kind"),
    [(rule, kind) for rule in POSTERIORS for kind in ("nan", "inf", "-inf")] + [(POSTERIORS[0], "gradient")],
)
def test_rows_whose_samples_have_no_finite_value_fall_back_and_are_counted(rule, kind):
    x, bad, trace = noise(3, 2, 2), torch.tensor([False, True, False]), qsteer.Trace(steps=False)
    outs = []
    for value in (Ensemble((spoiled(bumpy, kind),), bad), Ensemble((spoiled(bumpy, kind),), bad & False)):
        torch.manual_seed(0)
        outs.append(qsteer.sample(BASE, value, x, rule=rule(GlassPosterior(), 0.3), trace=trace))
    assert trace.fallbacks == 9
    assert torch.equal(outs[0][bad], qsteer.sample(BASE, None, x)[bad])
    torch.testing.assert_close(outs[0][~bad], outs[1][~bad])
    assert not torch.equal(outs[1][bad], outs[0][bad])


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_one_sample_without_a_value_is_enough_to_fall_back(rule):
    x, trace, value = noise(3, 1, 2), qsteer.Trace(steps=False), qsteer.value(half)
    eps = noise(4, 3, 1, 2, seed=1)
    eps[:, :, 0, 0] = -eps[:, :, 0, 0].abs() - 10.0
    eps[2, 1, 0, 0] = 10.0  # of 4 samples, one of the middle row
    method = rule(Replay(Plain(), eps), 0.3, clip=None)
    field = qsteer.field(constant)
    out = qsteer.sample(field, value, x, rule=method, trace=trace)
    base = qsteer.sample(field, None, x)
    assert trace.fallbacks == 9 and torch.equal(out[1], base[1])
    assert (norms(out - base)[[0, 2]] > 1e-3).all()


def half(a: torch.Tensor) -> torch.Tensor:
    """Not a number where the first entry is above 5."""
    return torch.where(a[:, 0, 0] > 5, torch.nan, bumpy(a))


@dataclass(frozen=True)
class Plain(PosteriorSampler):
    """x1 = x + eps."""

    def __call__(self, eps, x, t):
        return x + eps


@pytest.mark.filterwarnings("ignore:steering met non-finite")
def test_at_the_action_a_gradient_free_posterior_falls_back_and_says_so():
    x, trace = noise(3, 2, 2), qsteer.Trace(steps=False)
    steered = qsteer.GradientFreePosterior(GlassPosterior(), 0.3)(BASE, Ensemble((bumpy,)))
    with qsteer.trace.record_action(trace), torch.no_grad():
        assert torch.equal(steered(x, 1.0), BASE(x, 1.0))
    assert trace.fallbacks == 3


def test_a_posterior_that_wants_to_be_bound_is_no_plain_function():
    class Own:
        def on(self, field):
            return self

        def __call__(self, eps, x, t):
            return x + eps

    with pytest.raises(TypeError, match=r"posterior: expected a function .*subclass qsteer.types.Post"):
        qsteer.Posterior(Own())


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bfloat16])
def test_scores_of_any_type_weigh_actions_of_any_type(kind):
    """A rule of thumb counts; a critic is float32 beside a policy in bfloat16."""
    field = qsteer.field(lambda x, t: -x)
    value = qsteer.value(lambda a: (10 * a).flatten(1).sum(1).to(kind))
    rule = qsteer.GradientFreePosterior(GlassPosterior(), 0.3)
    x = noise(2, 2, 2).to(torch.bfloat16)
    with as_installed():
        assert qsteer.sample(field, value, x, rule=rule).dtype == torch.bfloat16

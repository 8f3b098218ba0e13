"""Agreement of estimates with a true gradient, along a chain."""

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    MIXTURE,
    VALUE,
    bumpy,
    fixed_times,
    jacobian,
    noise,
    nonlinear,
    slope_at_denoised,
)

import qsteer
from qsteer.evaluation.gradients import agreement


def test_agreement_is_one_where_the_methods_are_one():
    x, field = noise(6, 2, 2), qsteer.field(MIXTURE.velocity)
    rules = {"itself": qsteer.Tweedie(2.0, scaling="raw"), "forward": qsteer.ForwardTweedie()}
    for found in agreement(field, VALUE, x, rules).values():
        torch.testing.assert_close(found.t, torch.arange(1, 10, dtype=DOUBLE) / 10, rtol=0, atol=1e-6)
        ones = torch.ones(9, 6, dtype=DOUBLE)
        torch.testing.assert_close(found.cosine, ones, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.ratio, ones, rtol=0, atol=1e-4)


def test_agreement_by_hand_where_the_jacobian_is_not_symmetric():
    """Along the policy's own chain, and along the steered one."""
    for truth in (qsteer.Tweedie(0.0, clip=None), qsteer.Tweedie(0.4, clip=None)):
        x, rules = noise(6, 2, 2), {"forward": qsteer.ForwardTweedie(clip=None), "qgf": qsteer.QGF(clip=None)}
        found = agreement(BASE, VALUE, x, rules, truth=truth, steps=5)
        steered = truth(BASE, VALUE)
        for i in range(5):
            t = float(np.float32(i / 5))
            if i > 0:
                j, slope = jacobian(nonlinear, x, t), slope_at_denoised(nonlinear, x, t)
                true = torch.einsum("bji,bj->bi", j, slope)
                for name, g in ("forward", torch.einsum("bij,bj->bi", j, slope)), ("qgf", slope):
                    cosine = (g * true).sum(1) / (g.norm(dim=1) * true.norm(dim=1))
                    torch.testing.assert_close(found[name].cosine[i - 1], cosine, rtol=0, atol=1e-5)
                    ratio = g.norm(dim=1) / true.norm(dim=1)
                    torch.testing.assert_close(found[name].ratio[i - 1], ratio, rtol=1e-5, atol=1e-5)
            x = (x + steered(x, fixed_times(t, 6)) / 5).detach()
        assert found["forward"].cosine.shape == (4, 6)
        assert (found["forward"].cosine < 0.99).any()


def test_agreement_remembers_along_the_chain_and_skips_what_a_rule_skips():
    x = noise(4, 2, 2)
    rules = {
        "stale": qsteer.ForwardTweedie(stale=True, clip=None),
        "exact": qsteer.ForwardTweedie(clip=None),
        "every": qsteer.Tweedie(every=4),
    }
    found = agreement(BASE, VALUE, x, rules, truth=qsteer.Tweedie(clip=None))
    assert torch.equal(found["stale"].cosine[0], found["exact"].cosine[0]), "the first step waits"
    assert (found["stale"].cosine[1:] != found["exact"].cosine[1:]).all()
    guided = ~found["every"].cosine.isnan().any(1)
    assert guided.nonzero().flatten().tolist() == [0, 4, 8]
    again = agreement(BASE, VALUE, x, rules, truth=qsteer.Tweedie(clip=None))
    assert torch.equal(again["stale"].cosine, found["stale"].cosine)


def test_agreement_sees_what_the_critic_sees():
    mask = torch.tensor([[1, 1], [1, 0]])
    value = qsteer.value(lambda a: bumpy(torch.where(mask.bool(), a, 0.0)), mask=mask)
    x, rule = noise(4, 2, 2), {"qgf": qsteer.QGF(clip=None)}
    louder = qsteer.field(lambda x, t: nonlinear(x, t) + torch.where(mask.bool(), 0.0, 100.0 * x.sum()))
    with torch.inference_mode():
        found = agreement(louder, value, x, rule, truth=qsteer.Tweedie(0.0, clip=None), steps=2)["qgf"]
    x = x + 0.5 * louder(x, fixed_times(0.0, 4))
    t = fixed_times(0.5, 4)
    with torch.enable_grad():
        a, b = (
            torch.where(mask.bool(), r.ascent(louder, value, x.clone(), t).gradient, 0.0).flatten(1)
            for r in (qsteer.QGF(clip=None), qsteer.Tweedie(clip=None))
        )
    torch.testing.assert_close(found.cosine[0], torch.cosine_similarity(a, b))


def test_agreement_without_a_guided_step_is_refused():
    with pytest.raises(ValueError, match="at least one of the chain's steps"):
        agreement(BASE, VALUE, noise(1, 2, 2), {}, truth=qsteer.Tweedie(start=0.95))

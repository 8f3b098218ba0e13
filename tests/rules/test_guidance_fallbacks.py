"""Rows without a finite value, gradient or velocity: the base policy's, and counted."""

import warnings

import numpy as np
import pytest
import torch
from fields import BASE, DOUBLE, VALUE, bumpy, noise, nonlinear, spoiled
from guidance_rules import BY_VALUE, by_name

import qsteer

BAD = torch.tensor([False, True, False, True, False])


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "gradient"])
@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
@pytest.mark.parametrize("scaling", ["match_norm", "raw", "sigma"])
def test_rows_without_a_finite_value_or_gradient_are_the_base_policys_and_the_others_untouched(
    rule, kind, scaling
):
    x, trace = noise(5, 2, 2, dtype=torch.float32), qsteer.Trace()
    rule = rule(0.1, scaling=scaling)
    out = qsteer.sample(BASE, qsteer.value(spoiled(bumpy, kind), BAD), x, rule=rule, trace=trace)
    assert torch.equal(out[BAD], qsteer.sample(BASE, None, x)[BAD])
    assert torch.equal(out[~BAD], qsteer.sample(BASE, VALUE, x, rule=rule)[~BAD])
    steps = 10 if isinstance(rule, qsteer.QGF) else 9
    assert trace.fallbacks == 2 * steps
    strength = trace.arrays()["strength"]
    assert np.isnan(strength[BAD]).all() and np.isfinite(strength[~BAD]).all()


@pytest.mark.filterwarnings("ignore:steering met non-finite")
def test_only_the_steps_without_a_finite_value_fall_back():
    calls, bad_steps, x = [], {3, 7}, noise(5, 2, 2)

    def value(a, bad):
        calls.append(len(calls) + 1)  # t = 0 is not guided, so call i is step i
        return torch.where(bad & (calls[-1] in bad_steps), torch.nan, bumpy(a))

    trace, rule = qsteer.Trace(steps=False), qsteer.Tweedie(0.3)
    out = qsteer.sample(BASE, qsteer.value(value, BAD), x, rule=rule, trace=trace)
    steered, expected = rule(BASE, VALUE), x
    for i in range(10):
        t = torch.full((5,), i / 10, dtype=torch.float32).to(DOUBLE)
        here = (BAD & (i in bad_steps))[:, None, None]
        expected = expected + 0.1 * torch.where(here, nonlinear(expected, t), steered(expected, t)).detach()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert trace.fallbacks == 4


def test_fallbacks_are_counted_always_and_warned_of_once():
    value, x, trace = qsteer.value(spoiled(bumpy, "nan"), BAD), noise(5, 2, 2), qsteer.Trace(steps=False)
    with pytest.warns(RuntimeWarning, match="18 row-steps.*fell back.*look at the critic's inputs") as seen:
        qsteer.sample(BASE, value, x, rule=qsteer.Tweedie(), trace=trace)
        qsteer.sample(BASE, value, x, rule=qsteer.Tweedie(), trace=trace)
    assert len(seen) == 1 and trace.fallbacks == 36
    with pytest.warns(RuntimeWarning, match="18 row-steps"):  # without a trace too
        qsteer.sample(BASE, value, x, rule=qsteer.Tweedie())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie())


@pytest.mark.filterwarnings("ignore:steering met non-finite")
def test_a_policys_own_non_finite_row_spoils_no_other():
    field = qsteer.field(lambda x, t, bad: torch.where(bad[:, None, None], torch.nan, nonlinear(x, t)), BAD)
    x, trace = noise(5, 2, 2), qsteer.Trace(steps=False)
    out = qsteer.sample(field, VALUE, x, rule=qsteer.Tweedie(), trace=trace)
    assert torch.equal(out[~BAD], qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie())[~BAD])
    assert out[BAD].isnan().all() and trace.fallbacks == 18

"""Rules made of a rule: downhill, and gated where the members disagree."""

import math

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    CONSTANT,
    DOUBLE,
    VALUE,
    Ensemble,
    as_installed,
    fixed_times,
    guidance,
    noise,
    norms,
    total,
)
from guidance_rules import BY_VALUE, by_name
from members import SLOPES, members

import qsteer
from qsteer.bench.counting import count


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_negated_is_the_same_guidance_downhill(rule):
    x = noise(4, 2, 2)
    up, down = (guidance(r, BASE, VALUE, x, 0.5) for r in (rule(0.3), qsteer.Negated(rule(0.3))))
    torch.testing.assert_close(down, -up)
    assert (norms(up) > 0.01).all()


def test_negating_something_else_is_refused():
    with (
        as_installed(),
        pytest.raises(TypeError, match=r"expected a guidance rule such as Tweedie\(\), got Euler"),
    ):
        qsteer.Negated(qsteer.Euler())


def test_negated_goes_as_far_downhill_as_the_rule_goes_up():
    x, rule = noise(10, 2, 2), qsteer.Tweedie("auto")
    up, down = (guidance(r, BASE, members(), x, 0.5) for r in (rule, qsteer.Negated(rule)))
    torch.testing.assert_close(down, -up)
    assert (norms(up) > 0).any()


# ------------------------------------------------------------------------------------------------------ gates

AGREED = torch.tensor([[1.0, 0.2], [0.5, -0.3]], dtype=DOUBLE)


def linear_pair(spread: float, **kwargs) -> Ensemble:
    """Two linear members whose gains from any push along their mean differ by std / |mean| = spread."""
    return members(torch.stack([AGREED * (1 + spread), AGREED * (1 - spread)]), curvature=0.0, **kwargs)


@pytest.mark.parametrize("rule", [qsteer.Tweedie(0.3, clip=None), qsteer.Negated(qsteer.QGF(0.3, clip=None))])
@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
def test_the_gate_closes_where_deviation_over_mean_passes_the_limit(rule, spread):
    x, times = noise(4, 2, 2), fixed_times(0.5, 4)
    steered, base = rule(CONSTANT, linear_pair(spread))(x, times), CONSTANT(x, times)
    for limit, expected in (
        (0.99 * spread, base),
        (1.01 * spread, steered),
        (math.inf, steered),
        (0.0, base),
    ):
        assert torch.equal(qsteer.Gated(rule, limit)(CONSTANT, linear_pair(spread))(x, times), expected)
    assert not torch.equal(steered, base)


def test_the_gate_does_not_see_scales_or_offsets_and_is_the_rows_own():
    x, times = 2 * noise(40, 2, 2), fixed_times(0.5, 40)
    gated = qsteer.Gated(qsteer.Tweedie(0.3, clip=None), 0.3)
    base = CONSTANT(x, times)

    def open_rows(value):
        return (gated(CONSTANT, value)(x, times) != base).flatten(1).any(1)

    expected = open_rows(members(curvature=0.2))
    assert expected.any() and not expected.all()
    scaled = members(1e3 * SLOPES, curvature=1e3 * 0.2, offsets=(1.0, 2.0, 3.0, -4.0))
    assert torch.equal(open_rows(scaled), expected)
    alone = torch.cat([gated(CONSTANT, members(curvature=0.2))(x[i : i + 1], times[:1]) for i in range(40)])
    torch.testing.assert_close(
        gated(CONSTANT, members(curvature=0.2))(x, times), alone, rtol=1e-12, atol=1e-12
    )


def test_gated_rows_are_counted_apart_from_fallbacks_and_left_out_of_the_trace():
    x, trace = noise(3, 2, 2), qsteer.Trace()
    spread = torch.tensor([0.1, 5.0, 0.1], dtype=DOUBLE)
    value = Ensemble(tuple(lambda a, e, s=s: (1 + s * e) * total(a) for s in (1, -1)), spread)
    out = qsteer.sample(BASE, value, x, rule=qsteer.Gated(qsteer.Tweedie(0.3)), trace=trace)
    assert (trace.gated, trace.fallbacks) == (9, 0)
    assert "9 gated" in str(trace)
    found = trace.arrays()["strength"]
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()
    assert torch.equal(out[1], qsteer.sample(BASE, None, x)[1])
    qsteer.sample(BASE, value, x, rule=qsteer.Gated(qsteer.Tweedie(0.3)), trace=trace)
    assert trace.gated == 18


@pytest.mark.filterwarnings("ignore:steering met non-finite")
def test_what_is_not_finite_is_a_fallback_and_not_gated():
    trace = qsteer.Trace(steps=False)
    value = Ensemble((lambda a: total(a) * math.nan, total))
    qsteer.sample(BASE, value, noise(3, 2, 2), rule=qsteer.Gated(qsteer.Tweedie(0.3)), trace=trace)
    assert (trace.gated, trace.fallbacks) == (0, 27)


def test_one_member_agrees_with_itself():
    x = noise(3, 2, 2)
    out = qsteer.sample(BASE, VALUE, x, rule=qsteer.Gated(qsteer.Tweedie(0.3), 0.0))
    assert torch.equal(out, qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie(0.3)))


def test_the_gate_costs_one_critic_forward_on_two_rows_and_keeps_the_bypass():
    x, value = noise(1, 2, 2), members()
    plain = count(BASE, value, x, qsteer.Tweedie(0.2))
    gated = count(BASE, value, x, qsteer.Gated(qsteer.Tweedie(0.2)))
    assert gated.field == plain.field and gated.value.backwards == plain.value.backwards
    assert gated.value.forwards == plain.value.forwards + 9
    assert gated.value.forward_rows == plain.value.forward_rows + 9 * 2
    assert qsteer.Gated(qsteer.Tweedie(0.0))(BASE, value) is BASE


def test_a_gated_field_repeats_with_its_gate():
    x, times = noise(4, 2, 2), fixed_times(0.5, 4)
    steered = qsteer.Gated(qsteer.Tweedie("auto"), 0.7)(BASE, members())
    many = steered.repeat(2)(x.repeat_interleave(2, 0), times.repeat_interleave(2, 0))
    torch.testing.assert_close(many, steered(x, times).repeat_interleave(2, 0), rtol=1e-12, atol=1e-12)


def test_gates_that_make_no_sense_are_refused():
    with as_installed():
        with pytest.raises(
            TypeError, match=r"Gated: expected a guidance rule such as Tweedie\(\), got Euler"
        ):
            qsteer.Gated(qsteer.Euler())
        for limit in (-0.1, math.nan):
            with pytest.raises(ValueError, match=r"limit: expected at least 0.*inf gates nothing"):
                qsteer.Gated(qsteer.Tweedie(), limit)

"""Strengths the critic chooses: against the closed forms of quadratic and linear members.

On a constant velocity v the denoised action is D = x + (1 - t) v with Jacobian 1, so that every rule below
follows the mean member's own gradient g. Members Q_j(a) = <w_j, a> - k/2 |a - y|² have the slopes
s_j = <w_j - k (D - y), g/|g|> and the curvature k on every ray, hence
    strength = clamp((mean_j s_j - caution std_j s_j) / (k (1 - t) |v|), 0, cap).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    CONSTANT,
    DOUBLE,
    VALUE,
    Ensemble,
    Gaussian,
    Mixture,
    as_installed,
    constant,
    fixed_times,
    guidance,
    noise,
    nonlinear,
    norms,
    total,
)
from members import CURVATURE, GOAL, SLOPES, members

import qsteer
from qsteer.bench.counting import count
from qsteer.evaluation.arms import parse
from qsteer.maps import GlassPosterior
from qsteer.rules.strength import improvements

FREE = qsteer.Auto(1.0, trust=math.inf)
RULES = [
    qsteer.Tweedie("auto"),
    qsteer.ForwardTweedie("auto"),
    qsteer.ForwardTweedie("auto", stale=True),
    qsteer.QGF("auto", scaling="match_norm"),
    qsteer.NoisyGradient("auto"),
    qsteer.ThroughTime("auto"),
    qsteer.Posterior(GlassPosterior(), "auto", samples=2),
    qsteer.GradientFreePosterior(GlassPosterior(), "auto", samples=4),
]
by_class = {"ids": lambda rule: type(rule).__name__}


def slopes_on_the_ray(x: torch.Tensor, t: float, slopes=SLOPES, goal=GOAL, curvature=CURVATURE):
    d = x + (1 - t) * constant(x, None)
    gradients = slopes[:, None] - curvature * (d - goal)
    g = gradients.mean(0)
    return (gradients * g).flatten(2).sum(2) / norms(g), g


def strength(rule, value, x, t, field=CONSTANT):
    return norms(guidance(rule, field, value, x, t)) / norms(field(x, fixed_times(t, len(x))))


# ----------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("caution", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_strength_is_cautious_slope_over_curvature(caution, t):
    x = 2 * noise(200, 2, 2)
    largest = 1.5 / (1 - t)
    auto = qsteer.Auto(caution, trust=math.inf, largest=largest)
    s, g = slopes_on_the_ray(x, t)
    best = (s.mean(0) - caution * s.std(0, correction=0)) / CURVATURE
    expected = (best / ((1 - t) * norms(constant(x, None)))).clamp(0.0, largest)
    inside = ((expected > 0) & (expected < largest)).double().mean()
    assert inside > 0.05, "not the bounds alone are tested"
    push = guidance(qsteer.Tweedie(auto, clip=None), CONSTANT, members(), x, t)
    torch.testing.assert_close(
        push, expected[:, None, None] * norms(constant(x, None))[:, None, None] * g / norms(g)[:, None, None]
    )


@pytest.mark.parametrize("candidates", [3, 4, 8, 17])
def test_number_of_candidates_does_not_matter_to_a_quadratic(candidates):
    x = noise(50, 2, 2)
    rules = [qsteer.Tweedie(replace(FREE, candidates=n), clip=None) for n in (candidates, 9)]
    torch.testing.assert_close(*(strength(rule, members(), x, 0.5) for rule in rules))


@pytest.mark.parametrize("caution", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("rule", [qsteer.Tweedie, qsteer.ThroughTime])
def test_members_that_agree_are_followed_to_their_maximum_and_no_further(rule, caution):
    """Each step closes h / (1 - t) of the gap, the last one all of it; offsets are no disagreement."""
    x = noise(20, 2, 2)
    agreed = members(torch.zeros(3, 2, 2, dtype=DOUBLE), offsets=(0.0, 5.0, -7.0))
    auto = qsteer.Auto(caution, trust=math.inf, largest=100.0)
    out = qsteer.sample(CONSTANT, agreed, x, rule=rule(auto, clip=None))
    torch.testing.assert_close(out, GOAL.expand_as(out), rtol=0, atol=1e-7)


def test_members_that_are_split_on_the_sign_leave_the_base_policy_alone():
    w = noise(1, 2, 2, seed=5)
    split = members(torch.cat([1.2 * w, -w]), curvature=0.0)  # slopes 1.2, -1: mean 0.1, std 1.1
    x, times = noise(5, 2, 2), fixed_times(0.5, 5)
    for caution, moves in ((0.0, True), (0.09, True), (0.1, False), (1.0, False)):
        steered = qsteer.Tweedie(qsteer.Auto(caution), clip=None)(CONSTANT, split)
        assert torch.equal(steered(x, times), CONSTANT(x, times)) != moves


def test_disagreement_of_the_slopes_shrinks_the_strength_in_proportion():
    x, t = noise(8, 2, 2), 0.5
    w, goal = noise(1, 2, 2, seed=5), 100 * torch.ones(1, 2, 2, dtype=DOUBLE)
    found = []
    for split in (0.0, 1.0, 2.0):  # members' slopes on the ray: mean ± split <w, g> / |g|
        value = members(torch.cat([split * w, -split * w]), goal, 1.0)
        auto = qsteer.Auto(1.0, trust=math.inf, largest=1e3)
        found.append(
            strength(qsteer.Tweedie(auto, clip=None), value, x, t) * norms(constant(x, None)) * (1 - t)
        )
    _, g = slopes_on_the_ray(x, t, torch.zeros(1, 2, 2, dtype=DOUBLE), goal, 1.0)
    lost = ((w * g).flatten(1).sum(1) / norms(g)).abs()
    torch.testing.assert_close(found[0] - found[1], lost)
    torch.testing.assert_close(found[1] - found[2], lost)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("trust", [0.3, 1.0])
def test_tweedies_displacement_of_a_linear_value_is_trust_deviations_of_the_true_posterior(t, trust):
    """Mahalanobis length by the covariance of a mixture's posterior, which the rule never sees."""
    means, stds = noise(3, 2, 2, seed=7), torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE)
    base = Mixture(torch.tensor([0.3, 0.5, 0.2], dtype=DOUBLE), means, stds)
    x, times = noise(20, 2, 2), fixed_times(t, 20)
    auto = qsteer.Auto(trust=trust, largest=100.0)
    value = qsteer.value(lambda a: (SLOPES[0] * a).flatten(1).sum(1))
    push = guidance(qsteer.Tweedie(auto, clip=None), qsteer.field(base.velocity), value, x, t)
    moved = (1 - t) * push.flatten(1)
    squared = (moved * torch.linalg.solve(base.covariance(x, times), moved)).sum(1)
    torch.testing.assert_close(squared.sqrt(), torch.full_like(squared, trust), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rule", [qsteer.QGF, qsteer.NoisyGradient, qsteer.ThroughTime])
def test_other_rules_trust_the_posterior_of_unit_gaussian_actions(rule, t):
    """The displacement (1 - t) alpha |v| of a linear value, against Gaussian.variance."""
    t = float(np.float32(t))
    x, one = noise(6, 2, 2), torch.ones(2, 2, dtype=DOUBLE)
    deviation = Gaussian(0 * one, one).variance(x, fixed_times(t, 6))[0, 0, 0].sqrt()
    for trust in (0.3, 1.0):
        for largest in (0.05, 1.0):
            auto = qsteer.Auto(trust=trust, largest=largest)
            made = rule(auto, scaling="match_norm", clip=None)
            cap = trust * deviation / ((1 - t) * norms(nonlinear(x, fixed_times(t, 6))))
            got = strength(made, qsteer.value(total), x, t, BASE)
            torch.testing.assert_close(got, cap.clamp(max=largest), rtol=1e-6, atol=1e-6)


def test_no_trust_region_leaves_the_largest_strength():
    for rule in (qsteer.Tweedie(FREE, clip=None), qsteer.QGF(FREE, scaling="match_norm", clip=None)):
        got = strength(rule, qsteer.value(total), noise(6, 2, 2), 0.5, CONSTANT)
        torch.testing.assert_close(got, torch.ones_like(got))


def test_strength_does_not_depend_on_the_values_scale_or_offset():
    x = noise(50, 2, 2)
    for factor, offset in ((0.1, 0.0), (1e4, 0.0), (1.0, -50.0)):
        other = members(factor * SLOPES, curvature=factor * CURVATURE, offsets=[offset] * 4)
        for rule in (qsteer.Tweedie(FREE, clip=None), qsteer.Tweedie("auto")):
            expected = strength(rule, members(), x, 0.5)
            torch.testing.assert_close(strength(rule, other, x, 0.5), expected, rtol=1e-6, atol=1e-6)


def test_strength_vanishes_with_the_slope_and_with_an_infinite_curvature():
    x, rule = noise(1, 2, 2), qsteer.Tweedie(FREE, clip=None)
    d = x + 0.5 * constant(x, None)
    assert strength(rule, members(0 * SLOPES, d), x, 0.5) == 0  # at the maximum
    weak = [strength(rule, members(SLOPES * s, d), x, 0.5) for s in (1e-2, 1e-3)]
    torch.testing.assert_close(weak[0], 10 * weak[1], rtol=1e-6, atol=1e-12)
    stiff = [strength(rule, members(SLOPES, d, k), x, 0.5) for k in (1e3, 1e4)]
    torch.testing.assert_close(stiff[0], 10 * stiff[1], rtol=1e-6, atol=1e-12)
    assert weak[0] > 0 and stiff[0] > 0


def test_candidates_are_clipped_as_the_rules_own_action_is():
    x = torch.zeros(1, 2, 2, dtype=DOUBLE)
    asked = []

    def value(a):
        asked.append(a.detach())
        return a.flatten(1).sum(1)

    qsteer.sample(CONSTANT, qsteer.value(value), x, rule=qsteer.Tweedie(FREE, clip=(-0.2, 0.1)))
    assert len(asked) == 18 and all(((a >= -0.2 - 1e-9) & (a <= 0.1 + 1e-9)).all() for a in asked)


def test_improvements_are_relative_to_the_first_action():
    a, value = noise(3, 4, 2, 2), members(offsets=(1.0, 2.0, 3.0, 4.0))
    expected = torch.stack([value.members(part) - value.members(a[0]) for part in a], 1)
    torch.testing.assert_close(improvements(value, a), expected)


# -------------------------------------------------------------------------------------- laws every rule keeps


@pytest.mark.parametrize("rule", RULES, **by_class)
def test_every_guidance_rule_may_choose_its_strength(rule):
    x, trace = noise(4, 2, 2, dtype=torch.float32), qsteer.Trace()
    torch.manual_seed(0)
    out = qsteer.sample(BASE, VALUE, x, rule=rule, trace=trace)
    found = trace.arrays()["strength"]
    assert (found <= 1 + 1e-6).all() and len(np.unique(found.round(5))) > found.size / 2
    assert not torch.equal(out, qsteer.sample(BASE, None, x)) and trace.fallbacks == 0
    assert rule(BASE, VALUE) is not BASE


def test_a_score_without_a_gradient_is_enough_where_the_rule_needs_none():
    value = qsteer.value(lambda a: total(a).detach())
    rule = qsteer.GradientFreePosterior(GlassPosterior(), "auto")
    x = noise(4, 2, 2)
    torch.manual_seed(0)
    assert not torch.equal(qsteer.sample(BASE, value, x, rule=rule), qsteer.sample(BASE, None, x))


def test_rows_choose_alone():
    x, t = noise(5, 2, 2), torch.tensor([0.1, 0.2, 0.5, 0.8, 0.0], dtype=DOUBLE)
    steered = qsteer.Tweedie("auto")(BASE, members())
    alone = torch.cat([steered(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(steered(x, t), alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(alone[4], BASE(x, t)[4])


def test_strengths_are_chosen_for_each_rows_own_observation():
    obs = noise(5, 1, 1)
    value = Ensemble(
        (lambda a, o: -((a - o) ** 2).flatten(1).sum(1), lambda a, o: o[:, 0, 0] * total(a)), obs
    )
    x, times = noise(5, 2, 2), fixed_times(0.5, 5)
    rule = qsteer.Tweedie("auto", clip=None)
    alone = [rule(BASE, replace(value, context=obs[i : i + 1]))(x[i : i + 1], times[:1]) for i in range(5)]
    torch.testing.assert_close(rule(BASE, value)(x, times), torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_it_costs_one_critic_forward_on_all_candidates_per_guided_step():
    x, value = noise(1, 2, 2), members()
    number, auto = (
        count(BASE, value, x, qsteer.Tweedie(alpha)) for alpha in (0.2, qsteer.Auto(candidates=5))
    )
    assert auto.field == number.field
    assert auto.value.backwards == number.value.backwards == 9
    assert auto.value.forwards == number.value.forwards + 9
    assert auto.value.forward_rows == number.value.forward_rows + 9 * 5


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_whose_value_is_not_finite_on_the_ray_keep_the_base_velocity(bad):
    x, times = noise(6, 2, 2), fixed_times(0.5, 6)
    d = x + 0.5 * constant(x, None)
    flag = torch.tensor([True, False, False, True, False, False])

    def broken(a, at):  # finite where the gradient is taken, not along the ray
        off = (a - at).flatten(1).abs().sum(1) > 1e-9
        return torch.where(off & (at[:, 0, 0] > -50), bad, total(a))

    value = Ensemble((lambda a, at: total(a), broken), torch.where(flag[:, None, None], d, -100.0))
    rule, trace = qsteer.Tweedie("auto", clip=None), qsteer.Trace(steps=False)
    with qsteer.trace.record_action(trace):
        out = rule(CONSTANT, value)(x, times)
    assert torch.equal(out[flag], CONSTANT(x, times)[flag])
    assert torch.equal(out[~flag], rule(CONSTANT, qsteer.value(total))(x, times)[~flag])
    assert trace.fallbacks == 2


def test_masked_entries_are_neither_pushed_nor_measured():
    mask = torch.tensor([[1, 1], [1, 0]])
    seen, x, t = mask.bool(), noise(5, 2, 2), 0.5
    louder = qsteer.field(lambda x, t: torch.where(seen, nonlinear(x, t), 100.0))
    value = qsteer.value(lambda a: total(torch.where(seen, a, 0.0)), mask=mask)
    rule = qsteer.QGF("auto", scaling="match_norm", clip=None)
    push, other = (guidance(rule, field, value, x, t) for field in (BASE, louder))
    torch.testing.assert_close(push, other)
    assert (push[:, ~seen] == 0).all()
    v = torch.where(seen, nonlinear(x, fixed_times(t, 5)), 0.0)
    cap = 1 / (math.hypot(0.5, 0.5) * norms(v))
    torch.testing.assert_close(norms(push) / norms(v), cap.clamp(max=1.0))


def test_the_trace_shows_the_strength_used():
    x, trace = noise(5, 2, 2), qsteer.Trace()
    rule = qsteer.Tweedie(FREE, clip=None)
    with qsteer.trace.record_action(trace):
        rule(CONSTANT, members())(x, fixed_times(0.5, 5))
    expected = strength(rule, members(), x, 0.5)
    np.testing.assert_allclose(trace.arrays()["strength"][:, 0], expected.float(), rtol=1e-5)


def test_autograd_mode_of_the_caller_does_not_matter():
    x, rule = noise(3, 2, 2, dtype=torch.float32), qsteer.Tweedie("auto")
    plain = qsteer.sample(BASE, VALUE, x, rule=rule)
    with torch.inference_mode():
        assert torch.equal(qsteer.sample(BASE, VALUE, x + 0.0, rule=rule), plain)
    assert not plain.requires_grad and plain.dtype == torch.float32


def test_auto_is_its_defaults_and_arms_know_it():
    x = noise(3, 2, 2)
    by_name, by_class = (
        qsteer.sample(BASE, members(), x, rule=qsteer.Tweedie(a)) for a in ("auto", qsteer.Auto())
    )
    assert torch.equal(by_name, by_class)
    assert parse("tweedie=auto").rule == qsteer.Tweedie("auto")
    assert parse("qgf-matched=auto+best-of-4").rule == qsteer.QGF("auto", scaling="match_norm")
    assert (parse("tweedie=auto").name, parse("tweedie=auto").kind) == ("tweedie", "steered")
    for spec in (
        "random-direction=auto",
        "qgf=auto",
        "tweedie-raw=auto",
        "tweedie=automatic",
        "best-of-auto",
    ):
        with as_installed(), pytest.raises(ValueError, match="expected 'base'"):
            parse(spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: qsteer.Tweedie("Auto"),
            r"finite strength of at least 0, got Auto.*'auto' or qsteer\.Auto\(\)",
        ),
        (
            lambda: qsteer.QGF("auto"),
            "QGF: expected scaling 'match_norm' with an automatic strength.*got 'raw'",
        ),
        (lambda: qsteer.Tweedie(qsteer.Auto(), scaling="sigma"), "expected scaling 'match_norm'"),
        (
            lambda: qsteer.RandomDirection("auto"),
            "expected a number as strength, got 'auto': it asks no critic",
        ),
        (lambda: qsteer.Auto(-1.0), "caution"),
        (lambda: qsteer.Auto(math.nan), "caution"),
        (lambda: qsteer.Auto(math.inf), "caution"),
        (lambda: qsteer.Auto(trust=0.0), "trust"),
        (lambda: qsteer.Auto(trust=math.nan), "trust"),
        (lambda: qsteer.Auto(largest=0.0), "largest"),
        (lambda: qsteer.Auto(largest=math.inf), "largest"),
        (lambda: qsteer.Auto(candidates=2), "at least 3 candidates, got 2"),
    ],
)
def test_what_cannot_be_chosen_is_refused(make, message):
    with as_installed(), pytest.raises(ValueError, match=message):
        make()


def test_where_the_critic_is_flat_nothing_is_pushed_and_nothing_falls_back():
    """A saturated success critic: its gradients are exactly zero."""
    trace, x = qsteer.Trace(), noise(4, 2, 2, dtype=torch.float32)
    value = qsteer.value(lambda a: torch.sigmoid(200 + a.flatten(1).sum(1)))
    base = qsteer.field(lambda x, t: torch.sin(x))
    out = qsteer.sample(base, value, x, rule=qsteer.Tweedie("auto"), trace=trace)
    assert trace.fallbacks == 0 and torch.equal(out, qsteer.sample(base, None, x))
    assert not trace.arrays()["strength"].any()

"""Which steps are guided: those of a window, and every k-th of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
    CountingValue,
    Host,
    as_installed,
    bumpy,
    differences,
    guidance,
    noise,
    nonlinear,
    norms,
)
from guidance_rules import ALL, BY_VALUE, by_name

import qsteer
from qsteer.bench.counting import count
from qsteer.clock import MIRRORED, Chain
from qsteer.maps import EulerMap


@pytest.mark.parametrize("rule", [r for r in ALL if r is not qsteer.QGF], **by_name)
def test_noise_itself_is_left_alone(rule):
    x = noise(3, 2, 2)
    assert torch.equal(guidance(rule(0.5), BASE, VALUE, x, 0.0), torch.zeros_like(x))
    assert (norms(guidance(rule(0.5), BASE, VALUE, x, float(np.float32(0.1)))) > 0).all()


@pytest.mark.parametrize(
    ("window", "guided"),
    [
        ({}, range(1, 10)),
        ({"start": 0.3}, range(3, 10)),
        ({"stop": 0.6}, range(1, 7)),
        ({"start": 0.3, "stop": 0.6}, range(3, 7)),
        ({"start": 0.7, "stop": 0.7}, [7]),
        ({"start": 0.31, "stop": 0.39}, []),
        ({"start": 1.0}, []),
    ],
)
@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_guided_steps_are_those_from_start_to_stop_both_included(rule, window, guided):
    first = [0] if rule is qsteer.QGF and window.get("start", 0.0) == 0.0 else []
    trace = qsteer.Trace()
    value, x = CountingValue(bumpy), noise(2, 2, 2, dtype=torch.float32)
    out = qsteer.sample(qsteer.field(nonlinear), value, x, rule=rule(0.1, **window), trace=trace)
    np.testing.assert_allclose(trace.arrays()["t"], [i / 10 for i in [*first, *guided]], atol=1e-6)
    assert value.tally.backwards == len([*first, *guided])
    moved = not torch.equal(out, qsteer.sample(BASE, None, x))
    assert moved == bool([*first, *guided])


def test_rows_at_different_times_are_each_guided_as_alone():
    x, t = noise(4, 2, 2), torch.tensor([0.0, 0.2, 0.5, 0.8], dtype=DOUBLE)
    for rule in (qsteer.Tweedie(0.3, stop=0.5), qsteer.QGF(0.3, scaling="sigma", start=0.2)):
        steered = rule(BASE, VALUE)
        alone = torch.cat([steered(x[i : i + 1], t[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(steered(x, t), alone, rtol=1e-12, atol=1e-12)
        inside = [rule.start <= float(s) <= rule.stop and (rule.at_noise or s > 0) for s in t]
        assert [not torch.equal(a, b) for a, b in zip(steered(x, t), BASE(x, t), strict=True)] == inside


# -------------------------------------------------------------------------------------------- every k-th step


def indices(trace: qsteer.Trace, steps: int) -> list[int]:
    return [round(t * steps) for t in trace.arrays()["t"]]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (qsteer.Tweedie(0.1), range(1, 10)),
        (qsteer.Tweedie(0.1, every=2), [1, 3, 5, 7, 9]),
        (qsteer.Tweedie(0.1, every=3), [1, 4, 7]),
        (qsteer.Tweedie(0.1, every=100), [1]),
        (qsteer.Tweedie(0.1, every=2, start=0.2), [2, 4, 6, 8]),
        (qsteer.Tweedie(0.1, every=3, start=0.31, stop=0.9), [4, 7]),
        (qsteer.QGF(0.1, every=4), [0, 4, 8]),
        (qsteer.QGF(0.1, every=4, start=0.1), [1, 5, 9]),
        (qsteer.NoisyGradient(0.1, every=2, stop=0.6), [1, 3, 5]),
        (qsteer.ForwardTweedie(0.1, every=2), [1, 3, 5, 7, 9]),
        (qsteer.Gated(qsteer.Negated(qsteer.Tweedie(0.1, every=4))), [1, 5, 9]),
    ],
    ids=repr,
)
def test_the_first_step_of_the_window_is_guided_and_every_kth_from_there(rule, expected):
    trace, x = qsteer.Trace(), noise(2, 2, 2, dtype=torch.float32)
    out = qsteer.sample(BASE, VALUE, x, rule=rule, trace=trace)
    assert indices(trace, 10) == list(expected)
    steered = rule(BASE, VALUE)
    for i in range(10):
        t = torch.full((2,), i / 10)
        if i in expected and isinstance(rule, qsteer.Tweedie):
            x = x + 0.1 * replace(rule, every=1)(BASE, VALUE)(x, t)
        else:
            x = x + 0.1 * (steered if i in expected else BASE)(x, t)
    assert torch.equal(out, x.detach())


@pytest.mark.parametrize("clock", [None, MIRRORED], ids=["paper", "mirrored"])
@pytest.mark.parametrize("steps", [1, 2, 5, 7, 20, 50])
def test_steps_are_the_samplers_own(steps, clock):
    """Not those of the field's clock, which has ten."""
    field = BASE if clock is None else Host(lambda x, u: -nonlinear(x, 1 - u), clock)
    for every in (1, 2, 3):
        trace, rule = qsteer.Trace(), qsteer.Tweedie(0.1, every=every)
        for sampler in (qsteer.Euler(steps), qsteer.BestOfN(3, qsteer.Euler(steps))):
            qsteer.sample(field, VALUE, noise(1, 2, 2), rule=rule, sampler=sampler, trace=trace)
            assert indices(trace, steps) == list(range(1, steps, every))


def test_a_fields_own_number_of_steps_counts_without_another():
    field, trace = qsteer.field(nonlinear, clock=replace(MIRRORED, steps=6, sign=1)), qsteer.Trace()
    qsteer.sample(field, VALUE, noise(1, 2, 2), rule=qsteer.Tweedie(0.1, every=2), trace=trace)
    assert indices(trace, 6) == [1, 3, 5]


def test_jumps_by_the_policys_own_integration_count_their_steps_from_noise():
    x, trace = noise(2, 2, 2), qsteer.Trace()
    steered = qsteer.Tweedie(0.1, every=2)(BASE, VALUE)
    with qsteer.trace.record_action(trace), torch.no_grad():
        EulerMap(steered, 20)(x, 0.6, 1.0)
    assert indices(trace, 20) == [13, 15, 17, 19]


@pytest.mark.parametrize(("every", "guided"), [(1, 9), (2, 5), (3, 3), (9, 1)])
def test_unguided_steps_cost_one_forward(every, guided):
    x = noise(1, 2, 2)
    cost = count(BASE, VALUE, x, qsteer.Tweedie(0.1, every=every))
    assert (cost.field.forwards, cost.field.backwards) == (10, guided)
    assert (cost.value.forwards, cost.value.backwards) == (guided, guided)
    beam = qsteer.BeamSearch(2, 2, inner=qsteer.Euler(10))
    several = count(BASE, VALUE, x, qsteer.Tweedie(0.1, every=every), beam)
    later = sum(i >= 6 for i in range(1, 10, every))
    assert several.field.backwards == guided + later


@pytest.mark.parametrize("every", [0, -1, 2.0, math.nan, "2"])
def test_every_is_a_positive_int(every):
    with as_installed(), pytest.raises(ValueError, match="every: expected an int of at least 1, got"):
        qsteer.Tweedie(every=every)


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_times_per_row_that_are_all_outside_the_window_cost_nothing(rule):
    x, value, state = noise(3, 2, 2), CountingValue(bumpy), torch.get_rng_state()
    method = rule(0.5, start=0.5)
    times = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    own = [each.get_state() for each in method.generators(x.device)]
    assert torch.equal(method(BASE, value)(x, times), nonlinear(x, times))
    assert value.tally.calls == 0 and torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, own, [each.get_state() for each in method.generators(x.device)]))


@pytest.mark.parametrize("t", [1, np.float32(0.5), np.float64(0.5)], ids=str)
def test_any_number_is_a_time(t):
    x, steered = noise(3, 2, 2), qsteer.Tweedie(0.3)(BASE, VALUE)
    with as_installed(), torch.no_grad():
        assert torch.equal(steered(x, t), steered(x, float(t)))


@pytest.mark.parametrize(
    ("rule", "steps"),
    [(qsteer.Tweedie(0.3), 1), (qsteer.Tweedie(0.3, start=0.95), 10), (qsteer.QGF(start=0.5, stop=0.51), 3)],
    ids=str,
)
def test_a_rule_that_guides_no_step_of_the_chain_says_so(rule, steps):
    with pytest.warns(RuntimeWarning, match=f"expected at least one guided step, got none of {steps}"):
        qsteer.sample(BASE, VALUE, noise(1, 2, 2), rule=rule, sampler=qsteer.Euler(steps))


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25)], ids=repr)
def test_numpy_numbers_and_scalar_tensors_are_numbers(number):
    with as_installed():
        rule = qsteer.Tweedie(number)
        assert rule == qsteer.Tweedie(0.25) and isinstance(rule.alpha, float)
        assert qsteer.QGF(weight=number) == qsteer.QGF(0.25)
        assert qsteer.TrustRegion(eta=number) == qsteer.TrustRegion(eta=0.25)
        assert qsteer.BestOfN(np.int64(3)) == qsteer.BestOfN(3)


def test_a_critic_that_detaches_the_action_is_named():
    weight = torch.ones((), dtype=DOUBLE, requires_grad=True)
    value = qsteer.value(lambda a: weight * a.detach().flatten(1).sum(1))
    with pytest.raises(ValueError, match="expected a score that is differentiable in the action"):
        qsteer.sample(BASE, value, noise(1, 2, 2), rule=qsteer.QGF())


@pytest.mark.parametrize("snr", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("every", [2, 3])
def test_a_beams_completions_are_guided_at_every_kth_step_of_their_own_length(snr, every):
    """They begin at t' = snr / (1 + snr), on the grid of the whole chain or off it."""
    trace, x = qsteer.Trace(), noise(1, 2, 2)
    beam = qsteer.BeamSearch(2, 2, 1, snr=snr)
    qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie(0.1, every=every), sampler=beam, trace=trace)
    start = snr / (1 + snr)
    steps = math.ceil((1 - start) * 10 - 1e-4)
    stride = (1 - start) / steps
    before = round(start / stride)  # steps of this length from noise to there, of which the second is guided
    times = [start + i * stride for i in range(steps) if (before + i - 1) % every == 0]
    completion = [step.t for step in trace.actions[0] if len(step.value) == 4]
    np.testing.assert_allclose(completion, times, atol=1e-6)


@pytest.mark.parametrize("snr", [1.5, 2.0, 3.0])
def test_through_time_follows_a_beams_completions(snr):
    """The gradient of the value of the completion's own end, by finite differences."""
    t = snr / (1 + snr)
    jump, x = EulerMap(BASE), noise(3, 2, 2)
    steps = math.ceil((1 - t) * 10 - 1e-4)
    rule = qsteer.ThroughTime(1.0, scaling="raw", clip=None)
    steered = rule(BASE, VALUE).chain(None, Chain(t, (1 - t) / steps))
    pushed = steered(x, BASE.clock.snap(t)) - BASE(x, t)
    torch.testing.assert_close(pushed, differences(lambda a: VALUE(jump(a, t, 1.0)), x), rtol=1e-5, atol=1e-5)

"""Control arms: gradients at the noisy action, through the rest of the chain, and in random directions."""

import math

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
    as_installed,
    bumpy,
    constant,
    differences,
    fixed_times,
    guidance,
    noise,
    nonlinear,
    norms,
    total,
)
from guidance_rules import RAW

import qsteer


def test_noisy_gradient_is_the_finite_difference_at_the_noisy_action():
    x = noise(6, 3, 2)
    got = guidance(qsteer.NoisyGradient(1.0, **RAW), BASE, VALUE, x, 0.5)
    torch.testing.assert_close(got, differences(bumpy, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("i", [1, 3, 4])
def test_through_times_gradient_is_the_finite_difference_of_the_rest_of_the_chain(i):
    x, steps = noise(4, 2, 2), 5

    def finish(z):
        for k in range(i, steps):
            z = z + nonlinear(z, fixed_times(float(np.float32(k / steps)), 4)) / steps
        return bumpy(z)

    got = guidance(qsteer.ThroughTime(1.0, steps=steps, **RAW), BASE, VALUE, x, float(np.float32(i / steps)))
    torch.testing.assert_close(got, differences(finish, x), rtol=1e-6, atol=1e-6)


def test_through_time_is_tweedie_at_the_last_step():
    x, t = noise(4, 2, 2), 0.9
    through = guidance(qsteer.ThroughTime(1.0, **RAW), BASE, VALUE, x, t)
    torch.testing.assert_close(
        through, guidance(qsteer.Tweedie(1.0, **RAW), BASE, VALUE, x, t), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("steps", [4, 5, 15])
def test_through_time_follows_the_samplers_own_chain(steps):
    x, sampler = noise(2, 2, 2), qsteer.Euler(steps)
    outs = [
        qsteer.sample(BASE, VALUE, x, rule=qsteer.ThroughTime(steps=given), sampler=sampler)
        for given in (None, steps)
    ]
    assert torch.equal(*outs)


def test_through_time_refuses_rows_at_several_times():
    steered = qsteer.ThroughTime()(BASE, VALUE)
    with pytest.raises(ValueError, match=r"expected rows at one time.*got several"):
        steered(noise(2, 2, 2), torch.tensor([0.1, 0.2], dtype=DOUBLE))


@pytest.mark.parametrize("steps", [4, 8, 15, 20])
def test_through_time_refuses_a_chain_of_another_number_of_steps(steps):
    with pytest.raises(
        ValueError, match=r"chain's own number of steps.*give ThroughTime\(steps=...\) the sampler's"
    ):
        qsteer.sample(
            BASE,
            VALUE,
            noise(1, 2, 2),
            rule=qsteer.ThroughTime(stop=0.8, steps=10),
            sampler=qsteer.Euler(steps),
        )


def test_random_directions_have_no_direction_and_follow_their_seed_alone():
    x, field, value = noise(500, 2, 2), qsteer.field(constant), qsteer.value(total)
    state = torch.get_rng_state()
    first, second, again = (
        guidance(rule, field, value, x, 0.5)
        for rule in [*[qsteer.RandomDirection(1.0, seed=3)] * 2, qsteer.RandomDirection(1.0, seed=3)]
    )
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())  # the other arms' noise is not disturbed
    unit = torch.cat([first, second]) / norms(constant(x, None))[0]
    torch.testing.assert_close(norms(unit), torch.ones(1000, dtype=DOUBLE))
    assert unit.mean(0).abs().max() < 5 * math.sqrt(
        1 / 4 / 1000
    )  # unit vectors in 4 dimensions: variance 1/4
    correlation = (first * second).flatten(1).sum(1) / norms(first) / norms(second)
    assert correlation.mean().abs() < 5 * math.sqrt(1 / 4 / 500)
    other = guidance(qsteer.RandomDirection(1.0, seed=4), field, value, x, 0.5)
    assert not torch.allclose(other, first)


CONTROLLED = [
    qsteer.Tweedie(0.3),
    qsteer.Tweedie(0.3, scaling="raw"),
    qsteer.Tweedie(0.3, scaling="clip_norm", every=3),
    qsteer.Tweedie(0.3, scaling="sigma", start=0.3, stop=0.7),
    qsteer.Tweedie("auto"),
    qsteer.QGF(0.3),
]


@pytest.mark.parametrize("rule", CONTROLLED, ids=str)
def test_a_randomized_rule_pushes_as_far_as_the_rule_at_its_own_steps_and_elsewhere(rule):
    field = qsteer.field(lambda x, t: torch.tanh(x.flip(1)) - x)
    value = qsteer.value(lambda a: -((a - 0.5) ** 2).flatten(1).sum(1), mask=torch.tensor([[1, 1], [1, 0]]))
    own, control = rule(field, value), qsteer.Randomized(rule)(field, value)
    x, guided = noise(50, 2, 2), 0
    for t, _ in own.clock.grid():
        push, random = own(x, t) - field(x, t), control(x, t) - field(x, t)
        torch.testing.assert_close(norms(random), norms(push))
        assert (random[:, 1, 1] == 0).all()  # the critic does not see it
        cosine = (push * random).flatten(1).sum(1) / (norms(push) * norms(random)).clamp(min=1e-30)
        assert cosine.mean().abs() < 5 / math.sqrt(3 * 50)
        guided += bool(push.any())
    assert guided == sum(rule.guides(t) for t, _ in own.clock.grid())


@pytest.mark.parametrize(
    "control",
    [qsteer.RandomDirection, lambda **k: qsteer.Randomized(qsteer.QGF(0.2, scaling="match_norm"), **k)],
)
def test_one_direction_lasts_a_chain_unless_it_is_redrawn(control):
    """With a constant velocity all pushes are of one length: aligned they add, redrawn they cancel."""
    field, value, x = qsteer.field(constant), qsteer.value(total), noise(400, 3, 3)
    base = qsteer.sample(field, value, x)
    once, again, redrawn = (
        norms(qsteer.sample(field, value, x, rule=rule) - base)
        for rule in (control(), control(), control(redraw=True))
    )
    steps = 9 if control is qsteer.RandomDirection else 10
    alpha_v = 0.2 * norms(constant(x, None))
    torch.testing.assert_close(once, steps / 10 * alpha_v)
    torch.testing.assert_close(again, once)
    torch.testing.assert_close(
        (redrawn**2).mean().sqrt(), math.sqrt(steps) / 10 * alpha_v[0], rtol=0.1, atol=0
    )


def test_a_callers_noise_of_the_same_seed_is_no_direction():
    x = noise(50, 2, 2, seed=0)
    push = guidance(qsteer.RandomDirection(1.0, seed=0), qsteer.field(constant), qsteer.value(total), x, 0.5)
    cosine = (push * x).flatten(1).sum(1) / norms(push) / norms(x)
    assert cosine.mean().abs() < 5 / math.sqrt(4 * 50)


def test_chains_and_rows_have_directions_of_their_own():
    field, value, rule, x = (
        qsteer.field(constant),
        qsteer.value(total),
        qsteer.RandomDirection(),
        noise(2, 2, 2),
    )
    base = qsteer.sample(field, value, x)
    first, second = (qsteer.sample(field, value, x, rule=rule) - base for _ in range(2))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])


def test_a_randomized_rule_is_of_guidance_and_of_strength_0_nothing():
    with as_installed(), pytest.raises(TypeError, match="expected a guidance rule such as Tweedie"):
        qsteer.Randomized(qsteer.Negated(qsteer.Tweedie()))
    field = qsteer.field(constant)
    assert qsteer.Randomized(qsteer.Tweedie(0.0))(field, qsteer.value(total)) is field

"""Control arms: gradients at the noisy action, through the rest of the chain, and in random directions."""

import math

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
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

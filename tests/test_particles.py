"""Feynman-Kac particles: the tilted law, the chain's own, limits, counts and misuse."""

import math

import pytest
import torch
from fields import BASE, DOUBLE, VALUE, Gaussian, as_installed, noise, total

import qsteer
from qsteer.particles import systematic
from qsteer.randomness import seeded
from qsteer.samplers import Draws

LAW = Gaussian(torch.tensor([[0.5]], dtype=DOUBLE), torch.tensor([[0.7]], dtype=DOUBLE))
"""Tilted by exp(b a): N(m + b s^2, s^2)."""
SAMPLER = qsteer.FeynmanKac(4)


def test_one_particle_is_the_inner_sampler_bit_for_bit_and_draws_nothing():
    x, inner, state = noise(3, 2, 2), qsteer.Euler(7, clip=(-1.0, 1.0)), torch.get_rng_state()
    out = qsteer.sample(BASE, None, x, sampler=qsteer.FeynmanKac(1, inner=inner))
    assert torch.equal(out, qsteer.sample(BASE, None, x, sampler=inner))
    assert torch.equal(state, torch.get_rng_state())


def test_draws_are_torchs_kept_by_draws_and_each_rows_own_when_seeded():
    x, draws = noise(3, 2, 2), Draws()
    torch.manual_seed(0)
    first = qsteer.sample(BASE, VALUE, x, sampler=SAMPLER)
    torch.manual_seed(0)
    assert torch.equal(first, qsteer.sample(BASE, VALUE, x, sampler=SAMPLER))
    with draws.recorded():
        kept = qsteer.sample(BASE, VALUE, x, sampler=SAMPLER)
    with draws.replayed():
        assert torch.equal(kept, qsteer.sample(BASE, VALUE, x, sampler=SAMPLER))
    with seeded([5, 6, 7]):
        together = qsteer.sample(BASE, VALUE, x, sampler=SAMPLER)
    with seeded([6]):
        alone = qsteer.sample(BASE, VALUE, x[1:2], sampler=SAMPLER)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)


def test_particles_keep_their_own_observation():
    goals = torch.tensor([-300.0, 0.0, 500.0], dtype=DOUBLE)[:, None, None]
    field = qsteer.field(lambda x, t, o: o - x, goals, bounds=None)
    value = qsteer.value(lambda a, o: -(a - o).square().flatten(1).sum(1), goals)
    out = qsteer.sample(field, value, noise(3, 2, 2), sampler=SAMPLER)
    assert ((out - goals).abs() < 250).all()


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_non_finite_values_never_win_and_a_row_without_any_other_is_counted(strength, kind):
    """Spoilt: actions with a first entry above 0; on a still field that of the last fresh noise's share."""
    x, trace, sampler = noise(400, 1, 4), qsteer.Trace(steps=False), qsteer.FeynmanKac(8, strength)
    field = qsteer.field(lambda x, t: torch.zeros_like(x))
    value = qsteer.value(lambda a: torch.where(a[:, 0, 0] > 0, float(kind), total(a)))
    out = qsteer.sample(field, value, x, sampler=sampler, trace=trace)
    assert (out[:, 0, 0] > 0).sum() <= trace.fallbacks < 40
    spoilt = qsteer.value(lambda a: torch.full_like(a[:, 0, 0], float(kind)))
    trace = qsteer.Trace(steps=False)
    out = qsteer.sample(field, spoilt, x, sampler=sampler, trace=trace)
    assert out.isfinite().all() and trace.fallbacks == 400


def test_selecting_without_a_value_is_refused():
    with pytest.raises(ValueError, match="FeynmanKac: expected a value"):
        qsteer.sample(BASE, None, noise(1, 2, 2), sampler=SAMPLER)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: qsteer.FeynmanKac(0), ValueError, "particles: expected at least 1"),
        (lambda: qsteer.FeynmanKac(2.5), TypeError, "expected a whole number"),
        (
            lambda: qsteer.FeynmanKac(4, -1.0),
            ValueError,
            "strength: expected a finite number of at least 0, got -1.0",
        ),
        (lambda: qsteer.FeynmanKac(4, math.inf), ValueError, "strength: expected a finite number"),
        (lambda: qsteer.FeynmanKac(4, inner=qsteer.BestOfN(2)), TypeError, "inner: expected an Euler"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with as_installed(), pytest.raises(error, match=message):
        make()


def test_systematic_draws_take_each_its_share_rounded_up_or_down():
    weights = noise(200, 7).exp()
    picks = systematic(weights, 50)
    count = torch.nn.functional.one_hot(picks, 7).sum(1)
    share = 50 * weights / weights.sum(1, keepdim=True)
    assert ((count >= share.floor()) & (count <= share.ceil())).all()
    assert (systematic(torch.tensor([[0.0, 1.0, 0.0]], dtype=DOUBLE), 9) == 1).all()


def chain_law(steps: int) -> tuple[float, float]:
    """Mean and variance of the stochastic chain of particles: affine, plus fresh noise."""
    mean, var = 0.0, 1.0
    for i in range(steps):
        t, s, m, v = i / steps, (i + 1) / steps, 0.5, 0.49
        gain = t * v / ((1 - t) ** 2 + t**2 * v)  # D = m + gain (x - t m)
        kept = t * (1 - s) / (s * (1 - t)) if s < 1 else 0.0
        slope = s * gain + (1 - s) * kept * (1 - t * gain) / (1 - t)
        centre = (x := mean) * slope + (m - gain * t * m) * (s - (1 - s) * kept * t / (1 - t))
        mean, var = centre, slope**2 * var + (1 - s) ** 2 * (1 - kept**2)
        del x
    return mean, var


def test_the_stochastic_chain_has_the_policys_law_to_first_order():
    errors = [abs(chain_law(steps)[1] - 0.49) for steps in (20, 40, 80)]
    assert 1.7 < errors[0] / errors[1] < 2.4 and 1.8 < errors[1] / errors[2] < 2.3
    assert all(abs(chain_law(steps)[0] - 0.5) < 1e-9 for steps in (5, 10, 40))


@pytest.mark.parametrize("slope", [0.0, 2.0])
def test_particles_tend_to_the_tilted_law(slope):
    """p(a) exp(b a) of the chain's own Gaussian law N(m, v) is N(m + b v, v). 5 std errors, 256 particles."""
    torch.manual_seed(1)
    field, value = qsteer.field(LAW.velocity, bounds=None), qsteer.value(lambda a: slope * total(a))
    out = qsteer.sample(field, value, torch.randn(1500, 1, 1, dtype=DOUBLE), sampler=qsteer.FeynmanKac(256))
    m, v = chain_law(10)
    assert abs(out.mean() - (m + slope * v)) < 5 * math.sqrt(v / 1500) + 0.01
    assert abs(out.var() - v) < 5 * v * math.sqrt(2 / 1500) + 0.01


def test_resampled_particles_part_again_and_reach_where_no_first_draw_was():
    """Tilted by 5 standard deviations: 16 draws end at their maximum, 1.77 on average; particles go on."""
    torch.manual_seed(0)
    field, value = qsteer.field(LAW.velocity, bounds=None), qsteer.value(total)
    x, (m, v) = torch.randn(300, 1, 1, dtype=DOUBLE), chain_law(40)
    steps = qsteer.Euler(40)
    far = qsteer.sample(field, value, x, sampler=qsteer.FeynmanKac(16, 5 / math.sqrt(v), inner=steps))
    still = qsteer.sample(field, value, x, sampler=qsteer.BestOfN(16, steps))
    assert (far.mean() - m) / math.sqrt(v) > 2.5 > (still.mean() - m) / math.sqrt(v)

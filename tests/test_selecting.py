"""Expectile weights, Feynman-Kac particles and pruned seeds: closed forms, counts, limits and misuse."""

import math

import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
    CountingField,
    CountingValue,
    Gaussian,
    as_installed,
    bumpy,
    noise,
    nonlinear,
    total,
)

import qsteer
from qsteer.randomness import seeded
from qsteer.samplers import Draws
from qsteer.selecting import ExpectileOfN, FeynmanKac, PruneSeeds, drawn, expectile_weights

SAMPLERS = [ExpectileOfN(4), FeynmanKac(4), PruneSeeds(4, 2)]
STILL = qsteer.field(lambda x, t: torch.zeros_like(x))


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    "sampler", [ExpectileOfN, FeynmanKac, lambda n, inner: PruneSeeds(n, 1, inner=inner)]
)
def test_one_candidate_is_the_inner_sampler_bit_for_bit_and_draws_nothing(sampler):
    x, inner, state = noise(3, 2, 2), qsteer.Euler(7, clip=(-1.0, 1.0)), torch.get_rng_state()
    out = qsteer.sample(BASE, None, x, sampler=sampler(1, inner=inner))
    assert torch.equal(out, qsteer.sample(BASE, None, x, sampler=inner))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_are_torchs_kept_by_draws_and_each_rows_own_when_seeded(sampler):
    x, draws = noise(3, 2, 2), Draws()
    torch.manual_seed(0)
    first = qsteer.sample(BASE, VALUE, x, sampler=sampler)
    torch.manual_seed(0)
    assert torch.equal(first, qsteer.sample(BASE, VALUE, x, sampler=sampler))
    with draws.recorded():
        kept = qsteer.sample(BASE, VALUE, x, sampler=sampler)
    with draws.replayed():
        assert torch.equal(kept, qsteer.sample(BASE, VALUE, x, sampler=sampler))
    with seeded([5, 6, 7]):
        together = qsteer.sample(BASE, VALUE, x, sampler=sampler)
    with seeded([6]):
        alone = qsteer.sample(BASE, VALUE, x[1:2], sampler=sampler)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_candidates_keep_their_own_observation(sampler):
    goals = torch.tensor([-300.0, 0.0, 500.0], dtype=DOUBLE)[:, None, None]
    field = qsteer.field(lambda x, t, o: o - x, goals, bounds=None)
    value = qsteer.value(lambda a, o: -(a - o).square().flatten(1).sum(1), goals)
    out = qsteer.sample(field, value, noise(3, 2, 2), sampler=sampler)
    assert ((out - goals).abs() < 250).all()


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_non_finite_values_never_win_and_a_row_without_any_other_is_counted(sampler, kind):
    """Spoiled: actions with a first entry above 0, which on this field is that of the particle's noise."""
    x, trace = noise(40, 1, 4), qsteer.Trace(steps=False)
    x[:, 0, 0] = -x[:, 0, 0].abs()
    value = qsteer.value(lambda a: torch.where(a[:, 0, 0] > 0, float(kind), total(a)))
    field = qsteer.field(lambda x, t: torch.zeros_like(x))
    out = qsteer.sample(field, value, x, sampler=sampler, trace=trace)
    assert (out[:, 0, 0] <= 0).all() or trace.fallbacks > 0
    spoilt = qsteer.value(lambda a: torch.full_like(a[:, 0, 0], float(kind)))
    trace = qsteer.Trace(steps=False)
    out = qsteer.sample(field, spoilt, x, sampler=sampler, trace=trace)
    assert out.isfinite().all() and trace.fallbacks == 40


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_selecting_without_a_value_is_refused(sampler):
    with pytest.raises(ValueError, match=rf"{type(sampler).__name__}: expected a value"):
        qsteer.sample(BASE, None, noise(1, 2, 2), sampler=sampler)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ExpectileOfN(0), ValueError, "ExpectileOfN: expected n of at least 1 candidate, got 0"),
        (lambda: ExpectileOfN(4, 1.0), ValueError, r"expectile: expected 0.5 <= expectile < 1, got 1.0"),
        (lambda: ExpectileOfN(4, 0.4), ValueError, r"expectile: expected 0.5 <= expectile < 1, got 0.4"),
        (lambda: ExpectileOfN(2.5), TypeError, "expected a whole number"),
        (lambda: FeynmanKac(0), ValueError, "particles: expected at least 1"),
        (
            lambda: FeynmanKac(4, -1.0),
            ValueError,
            "strength: expected a finite number of at least 0, got -1.0",
        ),
        (lambda: FeynmanKac(4, math.inf), ValueError, "strength: expected a finite number"),
        (lambda: FeynmanKac(4, inner=qsteer.BestOfN(2)), TypeError, "inner: expected an Euler"),
        (lambda: PruneSeeds(4, 5), ValueError, "keep: expected 1 to 4, got 5"),
        (lambda: PruneSeeds(4, 0), ValueError, "keep: expected 1 to 4, got 0"),
        (lambda: PruneSeeds(4, 2, look=qsteer.Tweedie()), TypeError, "expected inner to be a sampler"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with as_installed(), pytest.raises(error, match=message):
        make()


# ------------------------------------------------------------------------------------------ expectiles


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9, 0.999])
def test_expectile_weights_are_those_of_the_minimiser_found_by_bisection(expectile):
    """V solves sum |expectile - 1(q < V)| (q - V) = 0, which falls in V."""
    q = noise(50, 9)
    low, high = q.amin(1, keepdim=True), q.amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        slope = (torch.where(q < middle, 1 - expectile, expectile) * (q - middle)).sum(1, keepdim=True)
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    expected = (expectile - (q < low).double()).abs()
    torch.testing.assert_close(expectile_weights(q, expectile), expected)
    torch.testing.assert_close(expectile_weights(7 * q - 1e4, expectile), expected)  # in any unit


def test_expectile_weights_of_equal_and_of_lost_values():
    inf = torch.inf
    q = torch.tensor([[2.0, 2.0, 2.0], [-inf, 1.0, 3.0], [-inf, -inf, -inf]], dtype=DOUBLE)
    weights = expectile_weights(q, 0.9)
    assert weights[0].unique().numel() == 1
    torch.testing.assert_close(weights[1], torch.tensor([0.0, 0.1, 0.9], dtype=DOUBLE))
    assert weights[2].tolist() == [1.0, 0.0, 0.0] or weights[2].argmax() == 0


def test_expectile_of_a_half_is_random_and_towards_one_the_best():
    x, n = torch.zeros(4000, 1, 1, dtype=DOUBLE), 4
    torch.manual_seed(0)
    pool = torch.cat([x[:, None], torch.randn(4000, n - 1, 1, 1, dtype=DOUBLE)], 1)
    for expectile in (0.5, 1 - 1e-9):
        torch.manual_seed(0)
        out = qsteer.sample(STILL, qsteer.value(total), x, sampler=ExpectileOfN(n, expectile))
        share = (pool.flatten(1) == out.flatten(1)).double().mean(0)
        if expectile == 0.5:
            assert ((share - 1 / n).abs() < 5 * math.sqrt(0.1875 / 4000)).all()
        else:
            assert torch.equal(out[:, 0, 0], pool.flatten(1).amax(1))


def test_systematic_draws_take_each_its_share_rounded_up_or_down():
    weights = noise(200, 7).exp()
    picks = drawn(weights, 50)
    count = torch.nn.functional.one_hot(picks, 7).sum(1)
    share = 50 * weights / weights.sum(1, keepdim=True)
    assert ((count >= share.floor()) & (count <= share.ceil())).all()
    assert (drawn(torch.tensor([[0.0, 1.0, 0.0]], dtype=DOUBLE), 9) == 1).all()


# ------------------------------------------------------------------------------------------ Feynman-Kac

LAW = Gaussian(torch.tensor([[0.5]], dtype=DOUBLE), torch.tensor([[0.7]], dtype=DOUBLE))
"""Tilted by exp(b a): N(m + b s^2, s^2)."""


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
    out = qsteer.sample(field, value, torch.randn(1500, 1, 1, dtype=DOUBLE), sampler=FeynmanKac(256))
    m, v = chain_law(10)
    assert abs(out.mean() - (m + slope * v)) < 5 * math.sqrt(v / 1500) + 0.01
    assert abs(out.var() - v) < 5 * v * math.sqrt(2 / 1500) + 0.01


def test_resampled_particles_part_again_and_reach_where_no_first_draw_was():
    """Tilted by 5 standard deviations: 16 draws end at their maximum, 1.77 on average; particles go on."""
    torch.manual_seed(0)
    field, value = qsteer.field(LAW.velocity, bounds=None), qsteer.value(total)
    x, (m, v) = torch.randn(300, 1, 1, dtype=DOUBLE), chain_law(40)
    steps = qsteer.Euler(40)
    far = qsteer.sample(field, value, x, sampler=FeynmanKac(16, 5 / math.sqrt(v), inner=steps))
    still = qsteer.sample(field, value, x, sampler=qsteer.BestOfN(16, steps))
    assert (far.mean() - m) / math.sqrt(v) > 2.5 > (still.mean() - m) / math.sqrt(v)


def test_particles_cost_the_chain_on_each_and_a_critic_forward_a_step_but_the_first():
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(field, value, noise(3, 2, 2), sampler=FeynmanKac(5))
    assert field.tally.rows == [15] * 10 and value.tally.rows == [15] * 9
    assert field.tally.backwards == value.tally.backwards == 0


# ------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("keep", [1, 3, 8])
def test_where_the_look_orders_rightly_it_is_best_of_n_bit_for_bit_at_a_fraction(keep):
    """On a still field, every chain of whatever length ends where it began."""
    x, field, value = noise(6, 2, 2), CountingField(lambda x, t: 0 * x), CountingValue(bumpy)
    torch.manual_seed(0)
    out = qsteer.sample(field, value, x, sampler=PruneSeeds(8, keep, look=qsteer.Euler(1)))
    torch.manual_seed(0)
    assert torch.equal(out, qsteer.sample(STILL, VALUE, x, sampler=qsteer.BestOfN(8)))
    assert field.tally.rows == [48] + [6 * keep] * 10 and value.tally.rows == [48, 6 * keep]


def test_keeping_all_is_best_of_n():
    x, outs = noise(6, 2, 2), []
    for sampler in (PruneSeeds(5, 5), qsteer.BestOfN(5)):
        torch.manual_seed(0)
        outs.append(qsteer.sample(BASE, VALUE, x, sampler=sampler))
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)

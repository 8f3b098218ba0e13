"""Samplers: the order of Euler, the law of the maximum, nested candidates, projections and guards."""

import math

import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
    CountingField,
    CountingValue,
    Ensemble,
    as_installed,
    bumpy,
    constant,
    differences,
    euler,
    noise,
    nonlinear,
    norms,
    spoiled,
    total,
)

import qsteer
from qsteer.maps import trust_radius

SELECTING = [qsteer.BestOfN, qsteer.RandomOfN]
BAD = torch.tensor([False, True, False])


# ------------------------------------------------------------------------------------------------------ Euler


@pytest.mark.parametrize(
    "rule", [None, qsteer.Tweedie(0.3, scaling="raw", clip=None), qsteer.QGF(0.2, clip=None)]
)
def test_euler_is_of_order_one(rule):
    """Doubling the steps halves the error, steered or not (Tweedie's missing first step is of that order)."""
    x, value = noise(20, 2, 2), qsteer.value(lambda a: -0.5 * (a - 0.3).square().flatten(1).sum(1))
    actions = [qsteer.sample(BASE, value, x, rule=rule, sampler=qsteer.Euler(k)) for k in (10, 20, 40, 320)]
    errors = [norms(a - actions[-1]).mean() for a in actions[:-1]]
    assert errors[0] > 1e-3
    assert 1.7 < errors[0] / errors[1] < 2.4 and 1.8 < errors[1] / errors[2] < 2.4


def test_euler_is_exact_on_a_constant_field():
    x = noise(3, 2, 2)
    for steps in (1, 7, 10):
        out = qsteer.sample(qsteer.field(constant), None, x, sampler=qsteer.Euler(steps))
        torch.testing.assert_close(out, x + constant(x, None))


def test_euler_takes_ten_steps_of_a_tenth():
    x, field = noise(3, 2, 2), CountingField(nonlinear)
    assert torch.equal(qsteer.sample(field, None, x), euler(nonlinear, x, 10))
    assert field.tally.rows == [3] * 10


def test_clip_bounds_the_finished_action_and_nothing_before_it():
    x = 3 * noise(20, 2, 2)
    free = qsteer.sample(BASE, None, x)
    assert (free.abs() > 1).any()
    clipped = qsteer.sample(BASE, None, x, sampler=qsteer.Euler(clip=(-1.0, 0.5)))
    assert torch.equal(clipped, free.clamp(-1.0, 0.5))


# -------------------------------------------------------------------------------------------------- best of n


@pytest.mark.parametrize("sampler", SELECTING)
@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.3)])
def test_one_candidate_is_the_inner_sampler_bit_for_bit_and_draws_nothing(sampler, rule):
    x, inner, state = (
        noise(3, 2, 2, dtype=torch.float32),
        qsteer.Euler(7, clip=(-1.0, 1.0)),
        torch.get_rng_state(),
    )
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    out = qsteer.sample(field, value, x, rule=rule, sampler=sampler(1, inner))
    assert torch.equal(out, qsteer.sample(BASE, VALUE, x, rule=rule, sampler=inner))
    assert field.tally.rows == [3] * 7 and value.tally.calls == (6 if rule else 0)
    assert torch.equal(state, torch.get_rng_state())
    assert qsteer.sample(BASE, None, x, sampler=sampler(1)).shape == x.shape  # and needs no value


def pool_of(x: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """The candidates' noise (B, n, H, A): the caller's, then n - 1 draws of torch's generator."""
    torch.manual_seed(seed)
    fresh = torch.randn(len(x), n - 1, *x.shape[1:], dtype=x.dtype)
    return torch.cat([x[:, None], fresh], 1)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.3)])
def test_best_of_n_is_the_best_of_n_separately_sampled_candidates(n, rule):
    x = noise(4, 2, 2)
    pool = pool_of(x, n, seed=n)
    each = torch.stack([qsteer.sample(BASE, VALUE, pool[:, i], rule=rule) for i in range(n)], 1)
    q = torch.stack([bumpy(each[:, i]) for i in range(n)], 1)
    torch.manual_seed(n)
    out = qsteer.sample(BASE, VALUE, x, rule=rule, sampler=qsteer.BestOfN(n))
    torch.testing.assert_close(out, each[torch.arange(4), q.argmax(1)], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bumpy(out), q.amax(1), rtol=1e-12, atol=1e-12)


def test_value_is_monotone_in_n_over_nested_candidates():
    """With sixteen entries a chunk, torch draws the same first candidates whatever their number."""
    x = noise(1, 4, 4)
    assert torch.equal(pool_of(x, 12, 0)[:, :5], pool_of(x, 5, 0))
    steps = 0
    for seed in range(5):
        values = []
        for n in range(1, 13):
            torch.manual_seed(seed)
            values.append(float(bumpy(qsteer.sample(BASE, VALUE, x, sampler=qsteer.BestOfN(n)))))
        assert values == sorted(values)
        steps += len(set(values)) - 1
    assert steps > 4


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (8, 1.4236), (32, 2.0697)],
)
def test_value_of_best_of_n_is_the_expected_maximum_of_n_normals(n, expected):
    """On a constant field the sum of 4 entries is N(., 4): order statistics are tabulated. 5 std errors."""
    torch.manual_seed(n)
    x = torch.randn(4000, 2, 2, dtype=DOUBLE)
    out = qsteer.sample(
        qsteer.field(constant), qsteer.value(total), x, sampler=qsteer.BestOfN(n, qsteer.Euler(1))
    )
    z = (total(out) - constant(x[:1], None).sum()) / 2
    assert abs(z.mean() - expected) < 5 * z.std() / math.sqrt(4000)


def test_best_of_n_runs_all_candidates_as_one_batch():
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(field, value, noise(3, 2, 2), sampler=qsteer.BestOfN(5))
    assert field.tally.rows == [15] * 10 and value.tally.rows == [15]
    assert field.tally.backwards == value.tally.backwards == value.tally.members == 0


@pytest.mark.parametrize(
    "sampler",
    [
        qsteer.BestOfN(4),
        qsteer.BestOfN(2, qsteer.BestOfN(3)),
        qsteer.KeepBest(qsteer.BestOfN(4)),
        qsteer.BestOfN(4, qsteer.KeepBest()),
        qsteer.TrustRegion(0.1, inner=qsteer.BestOfN(4)),
        qsteer.BestOfN(4, qsteer.TrustRegion(0.1)),
        qsteer.RandomOfN(4, qsteer.BestOfN(2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.2, clip=None)])
def test_candidates_keep_their_own_observation(sampler, rule):
    """Observations are far apart: a candidate steered or judged by another row's would land far away."""
    goals = torch.tensor([-300.0, 0.0, 500.0], dtype=DOUBLE)[:, None, None]
    field = qsteer.field(lambda x, t, o: o + torch.sin(x), goals)
    value = qsteer.value(lambda a, o: -(a - o).square().flatten(1).sum(1), goals)
    torch.manual_seed(0)
    out = qsteer.sample(field, value, noise(3, 2, 2), rule=rule, sampler=sampler)
    assert ((out - goals).abs() < 150).all()


def test_nested_best_of_n_draws_candidates_of_candidates():
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(field, value, noise(3, 2, 2), sampler=qsteer.BestOfN(2, qsteer.BestOfN(5)))
    assert field.tally.rows == [30] * 10 and value.tally.rows == [30, 6]


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_non_finite_values_never_win(kind):
    """Spoiled: candidates with a first entry above 0. A row without any other keeps candidate 0, counted."""
    x = noise(40, 1, 4)
    x[:, 0, 0] = -x[:, 0, 0].abs()
    field = qsteer.field(lambda x, t: torch.zeros_like(x))
    value = qsteer.value(lambda a: torch.where(a[:, 0, 0] > 0, float(kind), total(a)))
    trace = qsteer.Trace(steps=False)
    pool = pool_of(x, 4, seed=0)
    q = torch.where(pool[:, :, 0, 0] > 0, -torch.inf, pool.flatten(2).sum(2))
    torch.manual_seed(0)
    out = qsteer.sample(field, value, x, sampler=qsteer.BestOfN(4), trace=trace)
    assert torch.equal(out, pool[torch.arange(40), q.argmax(1)]) and trace.fallbacks == 0
    spoilt = qsteer.value(lambda a: torch.full_like(a[:, 0, 0], float(kind)))
    out = qsteer.sample(field, spoilt, x, sampler=qsteer.BestOfN(4), trace=trace)
    assert torch.equal(out, x) and trace.fallbacks == 40


# ------------------------------------------------------------------------------------------------ random of n


def test_random_of_n_is_one_of_the_same_candidates_each_as_often():
    x, n = noise(2000, 2, 2), 4
    pool = pool_of(x, n, seed=3)
    field = CountingField(lambda x, t: torch.zeros_like(x))
    torch.manual_seed(3)
    out = qsteer.sample(field, None, x, sampler=qsteer.RandomOfN(n))
    same = (out[:, None] == pool).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    assert ((same.double().mean(0) - 1 / n).abs() < 5 * math.sqrt(1 / n * (1 - 1 / n) / 2000)).all()
    assert field.tally.rows == [2000] * 10  # only the drawn candidate is integrated


def test_random_of_n_has_the_law_of_the_base_policy():
    """Through an odd nonlinear field: mean 0, and the base policy's second moment. 5 std errors."""
    torch.manual_seed(0)
    field, x = qsteer.field(lambda x, t: torch.sin(2 * x)), torch.randn(8000, 1, 1, dtype=DOUBLE)
    base = qsteer.sample(field, None, torch.randn(8000, 1, 1, dtype=DOUBLE))
    out = qsteer.sample(field, qsteer.value(total), x, sampler=qsteer.RandomOfN(8))
    assert abs(out.mean()) < 5 * out.std() / math.sqrt(8000)
    second = [a.square() for a in (out, base)]
    error = math.sqrt(sum(float(s.var()) for s in second) / 8000)
    assert abs(second[0].mean() - second[1].mean()) < 5 * error
    assert not torch.equal(out, qsteer.sample(field, None, x))


@pytest.mark.parametrize("sampler", SELECTING)
def test_further_candidates_follow_torchs_generator(sampler):
    x = noise(4, 2, 2)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(qsteer.sample(BASE, VALUE, x, sampler=sampler(4)))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


# ----------------------------------------------------------------------------------------------- trust region


@pytest.mark.parametrize("eta", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.3)])
def test_projection_moves_by_exactly_eta_along_the_values_gradient(eta, rule):
    x = noise(6, 3, 2)
    a = qsteer.sample(BASE, VALUE, x, rule=rule)
    moved = qsteer.sample(BASE, VALUE, x, rule=rule, sampler=qsteer.TrustRegion(eta)) - a
    torch.testing.assert_close(norms(moved), torch.full((6,), eta, dtype=DOUBLE), rtol=1e-6, atol=0)
    g = differences(bumpy, a)
    torch.testing.assert_close(moved / eta, g / norms(g)[:, None, None], rtol=1e-5, atol=1e-6)


def test_no_other_displacement_of_that_norm_raises_a_linear_value_more():
    slope, x, eta = noise(3, 2, seed=5), noise(1, 3, 2), 0.3
    value = qsteer.value(lambda a: (slope * a).flatten(1).sum(1))
    a = qsteer.sample(BASE, None, x)
    best = value(qsteer.sample(BASE, value, x, sampler=qsteer.TrustRegion(eta)))
    torch.testing.assert_close(best, value(a) + eta * slope.norm())  # Cauchy-Schwarz, attained
    others = noise(5000, 3, 2, seed=6)
    others = a + eta * others / norms(others)[:, None, None]
    assert (value(others) <= best).all() and value(others).max() > value(a) + 0.7 * eta * slope.norm()


def test_projection_raises_the_value_and_radius_zero_is_the_inner_sampler_at_no_cost():
    x, value = noise(20, 2, 2), CountingValue(bumpy)
    a = qsteer.sample(BASE, None, x)
    assert (bumpy(qsteer.sample(BASE, VALUE, x, sampler=qsteer.TrustRegion(0.01))) > bumpy(a)).all()
    assert torch.equal(qsteer.sample(BASE, value, x, sampler=qsteer.TrustRegion(0.0, beta=0.3)), a)
    assert value.tally.calls == value.tally.members == 0


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_projection_costs_one_critic_gradient_and_members_only_with_beta(beta):
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(field, value, noise(3, 2, 2), sampler=qsteer.TrustRegion(beta=beta))
    assert field.tally.rows == [3] * 10 and field.tally.backwards == 0
    assert value.tally.rows == [3] and value.tally.backwards == 1 and value.tally.members == (beta > 0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 5.0])
def test_radius_shrinks_with_the_disagreement_of_two_critics_as_in_the_paper(beta):
    """delta = |Q1 - Q2| / sqrt 2, over its batch mean; eta / (1 + beta delta)."""
    q = noise(2, 7)
    delta = (q[0] - q[1]).abs() / math.sqrt(2)
    expected = 0.3 / (1 + beta * delta / delta.mean())
    torch.testing.assert_close(trust_radius(0.3, q, beta), expected, rtol=1e-6, atol=0)
    x = noise(7, 2, 2)
    value = Ensemble((bumpy, lambda a: 2 * bumpy(a) + a[:, 0, 0] ** 2))
    a = qsteer.sample(BASE, value, x)
    moved = qsteer.sample(BASE, value, x, sampler=qsteer.TrustRegion(0.3, beta)) - a
    torch.testing.assert_close(norms(moved), trust_radius(0.3, value.members(a), beta), rtol=1e-6, atol=0)


def test_projection_moves_only_entries_which_the_critic_sees():
    mask = torch.tensor([[1, 0], [1, 1], [0, 0]])
    value, x = qsteer.value(bumpy, mask=mask), noise(4, 3, 2)
    moved = qsteer.sample(BASE, value, x, sampler=qsteer.TrustRegion(0.3)) - qsteer.sample(BASE, None, x)
    assert (moved[:, ~mask.bool()] == 0).all()
    torch.testing.assert_close(norms(moved), torch.full((4,), 0.3, dtype=DOUBLE), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rows_without_a_finite_value_or_gradient_are_not_projected_and_the_others_are(kind, beta):
    x, trace = noise(3, 2, 2, dtype=torch.float32), qsteer.Trace(steps=False)
    sampler = qsteer.TrustRegion(0.3, beta)
    value = Ensemble((spoiled(bumpy, kind), lambda a, bad: 3 * bumpy(a)), BAD)
    out, a = qsteer.sample(BASE, value, x, sampler=sampler, trace=trace), qsteer.sample(BASE, None, x)
    assert torch.equal(out[BAD], a[BAD]) and trace.fallbacks == 1
    moved = norms(out - a)[~BAD]
    if beta == 0:
        torch.testing.assert_close(moved, torch.full((2,), 0.3), rtol=1e-5, atol=0)
    else:
        assert ((0.1 < moved) & (moved < 0.3)).all()


# -------------------------------------------------------------------------------------------------- keep best


@pytest.mark.parametrize(
    "rule", [qsteer.Tweedie(0.3), qsteer.Tweedie(3.0), qsteer.Negated(qsteer.QGF(0.5))], ids=repr
)
def test_keep_best_is_the_better_of_the_steered_and_the_unsteered_action_row_by_row(rule):
    x = noise(40, 2, 2)
    base, steered = (qsteer.sample(BASE, VALUE, x, rule=r) for r in (None, rule))
    out = qsteer.sample(BASE, VALUE, x, rule=rule, sampler=qsteer.KeepBest())
    worse = bumpy(base) > bumpy(steered)
    assert worse.any() and not worse.all()
    assert torch.equal(out, torch.where(worse[:, None, None], base, steered))
    assert torch.equal(bumpy(out), torch.maximum(bumpy(base), bumpy(steered)))


def test_keep_best_costs_two_chains_and_two_critic_forwards():
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(
        field, value, noise(3, 2, 2), rule=qsteer.Tweedie(), sampler=qsteer.KeepBest(qsteer.Euler(4))
    )
    assert field.tally.rows == [3] * 8 and field.tally.backwards == 3
    assert value.tally.rows == [3] * (3 + 2) and value.tally.backwards == 3


def test_keep_best_without_a_rule_is_its_inner_sampler():
    x = noise(5, 2, 2)
    assert torch.equal(qsteer.sample(BASE, VALUE, x, sampler=qsteer.KeepBest()), qsteer.sample(BASE, None, x))


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("bad", ["steered", "base", "both"])
def test_keep_best_trusts_no_non_finite_value_as_best_of_n_does_not(kind, bad):
    """The rule here moves every entry by one; the critic is bad on either side."""
    x, trace = noise(4, 1, 2), qsteer.Trace(steps=False)
    field = qsteer.field(lambda x, t: torch.zeros_like(x))

    class Shifted(qsteer.Field):
        base = field

        def __call__(self, x, t):
            return torch.ones_like(x)

        def repeat(self, k):
            return self

    base = qsteer.sample(field, None, x)
    spoil = {
        "steered": lambda a: a[:, 0, 0] > 0.5 + base[:, 0, 0],
        "base": lambda a: a[:, 0, 0] < 0.5 + base[:, 0, 0],
    }
    spoil["both"] = lambda a: torch.ones_like(a[:, 0, 0]).bool()
    value = qsteer.value(lambda a: torch.where(spoil[bad](a), float(kind), -total(a)))
    out = qsteer.sample(field, value, x, rule=lambda f, v: Shifted(), sampler=qsteer.KeepBest(), trace=trace)
    torch.testing.assert_close(out, x + 1 if bad == "base" else x)
    assert trace.fallbacks == (0 if bad == "base" else 4)


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("steps", [0, -1])
def test_chains_without_steps_are_refused(steps):
    with (
        as_installed(),
        pytest.raises(ValueError, match=f"steps: expected at least 1, got {steps}; pi0 uses 10"),
    ):
        qsteer.Euler(steps)


@pytest.mark.parametrize("clip", [(1.0, -1.0), (0.0, 0.0), 1.0])
def test_bounds_out_of_order_are_refused(clip):
    with (
        as_installed(),
        pytest.raises(ValueError, match=r"clip: expected \(low, high\) with low < high, \"policy\""),
    ):
        qsteer.Euler(clip=clip)


@pytest.mark.parametrize("sampler", SELECTING)
def test_fewer_than_one_candidate_is_refused(sampler):
    with (
        as_installed(),
        pytest.raises(ValueError, match=f"{sampler.__name__}: expected n of at least 1 candidate, got 0"),
    ):
        sampler(0)


@pytest.mark.parametrize(
    "bad", [{"eta": -0.1}, {"beta": -1.0}, {"eta": float("nan")}, {"beta": float("inf")}]
)
def test_impossible_radii_are_refused(bad):
    with as_installed(), pytest.raises(ValueError, match="eta, beta: expected finite numbers of at least 0"):
        qsteer.TrustRegion(**bad)


@pytest.mark.parametrize("sampler", [qsteer.BestOfN(2), qsteer.TrustRegion(), qsteer.KeepBest()], ids=repr)
def test_selecting_without_a_value_is_refused_with_a_remedy(sampler):
    with pytest.raises(ValueError, match=rf"{type(sampler).__name__}: expected a value.*qsteer\.value\(fn\)"):
        qsteer.sample(BASE, None, noise(1, 2, 2), sampler=sampler)


def test_projection_needs_a_differentiable_value():
    value = qsteer.value(lambda a: total(a.detach()))
    with pytest.raises(ValueError, match=r"differentiable in the action.*qsteer\.BestOfN"):
        qsteer.sample(BASE, value, noise(1, 2, 2), sampler=qsteer.TrustRegion())


@pytest.mark.parametrize(
    "sampler", [qsteer.Euler(), qsteer.BestOfN(2), qsteer.TrustRegion(), qsteer.KeepBest()]
)
def test_samplers_are_immutable_and_keep_the_chunks_dtype(sampler):
    with pytest.raises(AttributeError):
        sampler.inner = None
    for dtype in (torch.float32, torch.float64):
        out = qsteer.sample(BASE, VALUE, noise(2, 2, 2, dtype=dtype), rule=qsteer.Tweedie(), sampler=sampler)
        assert out.dtype == dtype and out.shape == (2, 2, 2) and not out.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda i: qsteer.BestOfN(2, i),
        lambda i: qsteer.RandomOfN(2, i),
        lambda i: qsteer.TrustRegion(inner=i),
        lambda i: qsteer.BeamSearch(inner=i),
        qsteer.KeepBest,
    ],
)
@pytest.mark.parametrize("inner", [qsteer.Tweedie(), qsteer.Euler, None], ids=str)
def test_an_inner_that_makes_no_actions_is_refused_when_it_is_given(make, inner):
    with as_installed(), pytest.raises(TypeError, match="expected inner to be a sampler such as Euler"):
        make(inner)


@pytest.mark.parametrize(
    "make",
    [
        lambda: qsteer.Euler(5.0),
        lambda: qsteer.BestOfN(2.5),
        lambda: qsteer.BestOfN(True),
        lambda: qsteer.BeamSearch(rounds=1.0),
    ],
)
def test_numbers_of_things_are_whole(make):
    with as_installed(), pytest.raises(TypeError, match=r"expected a whole number, got .*pass an int"):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sampler",
    [qsteer.TrustRegion(0.3), qsteer.TrustRegion(0.3, beta=0.5), qsteer.BeamSearch(1, 1, rounds=0, eta=0.3)],
    ids=str,
)
def test_a_finished_action_moves_by_eta_in_every_number_format(dtype, sampler):
    x, trace = torch.zeros(2, 2, 2, dtype=dtype), qsteer.Trace(steps=False)
    field, value = qsteer.field(lambda x, t: torch.zeros_like(x)), qsteer.value(total)
    out = qsteer.sample(field, value, x, sampler=sampler, trace=trace)
    assert trace.fallbacks == 0
    torch.testing.assert_close(norms(out.float()), torch.full((2,), 0.3), rtol=1e-2, atol=0)

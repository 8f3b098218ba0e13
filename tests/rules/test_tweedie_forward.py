"""ForwardTweedie: a finite difference in place of the transposed Jacobian.

Where the velocity is that of a distribution (`fields.Gaussian`, `fields.Mixture`), J = dD/dx is symmetric and
ForwardTweedie is Tweedie; where it is not (`fields.nonlinear`), it is J g and not J^T g.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    MIXTURE,
    VALUE,
    CountingField,
    CountingValue,
    Gaussian,
    as_installed,
    bumpy,
    fixed_times,
    guidance,
    jacobian,
    noise,
    nonlinear,
    norms,
    slope_at_denoised,
    spoiled,
)
from guidance_rules import RAW

import qsteer

SLOPE = torch.tensor([[1.5, -0.8], [0.4, 0.3]], dtype=DOUBLE)


def linear(a: torch.Tensor) -> torch.Tensor:
    return (SLOPE * a).flatten(1).sum(1)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_it_is_tweedie_where_the_jacobian_is_symmetric(t):
    x, field = noise(20, 2, 2), qsteer.field(MIXTURE.velocity)
    tweedie = guidance(qsteer.Tweedie(1.0, **RAW), field, VALUE, x, t)
    torch.testing.assert_close(
        guidance(qsteer.ForwardTweedie(1.0, **RAW), field, VALUE, x, t), tweedie, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_its_error_is_of_first_order_in_eps(t):
    x, field = noise(20, 2, 2), qsteer.field(MIXTURE.velocity)
    tweedie = guidance(qsteer.Tweedie(1.0, **RAW), field, VALUE, x, t)
    errors = [
        norms(guidance(qsteer.ForwardTweedie(1.0, eps=eps, **RAW), field, VALUE, x, t) - tweedie).median()
        for eps in (4e-3, 2e-3, 1e-3)
    ]
    assert errors[0] > 1e-6, "there is an error to speak of"
    ratios = torch.stack(errors[:-1]) / torch.stack(errors[1:])
    assert ((1.9 < ratios) & (ratios < 2.1)).all()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_elsewhere_it_is_the_jacobian_and_not_its_transpose(t):
    x = noise(8, 2, 2)
    j, slope = jacobian(nonlinear, x, t), slope_at_denoised(nonlinear, x, t)
    got = guidance(qsteer.ForwardTweedie(1.0, **RAW), BASE, VALUE, x, t).flatten(1)
    torch.testing.assert_close(got, torch.einsum("bij,bj->bi", j, slope), rtol=1e-5, atol=1e-5)
    transposed = torch.einsum("bji,bj->bi", j, slope)
    torch.testing.assert_close(guidance(qsteer.Tweedie(1.0, **RAW), BASE, VALUE, x, t).flatten(1), transposed)
    assert ((got - transposed).norm(dim=1) > 0.1 * (1 - t) * transposed.norm(dim=1)).any()


@pytest.mark.parametrize("stale", [False, True])
def test_chains_of_a_linear_value_are_tweedies(stale):
    """Its gradient is the same at every step: no direction is out of date."""
    x, value = noise(20, 2, 2), qsteer.value(linear)
    for field in (qsteer.field(MIXTURE.velocity), qsteer.field(Gaussian(SLOPE, SLOPE.abs()).velocity)):
        for settings in ({"clip": None}, {"clip": None, "scaling": "raw"}):
            tweedie, forward = (
                qsteer.sample(field, value, x, rule=rule)
                for rule in (
                    qsteer.Tweedie(0.3, **settings),
                    qsteer.ForwardTweedie(0.3, stale=stale, **settings),
                )
            )
            torch.testing.assert_close(forward, tweedie, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(forward, qsteer.sample(field, None, x), atol=1e-2)


def test_a_stale_direction_is_that_of_the_step_before():
    """The chain by hand: J(x_i) applied to the value's gradient at D(x_{i-1})."""
    x, alpha = noise(3, 2, 2), 0.05
    got = qsteer.sample(BASE, VALUE, x, rule=qsteer.ForwardTweedie(alpha, stale=True, **RAW))
    before = None
    for i in range(10):
        t = float(np.float32(i / 10))
        push = torch.zeros_like(x)
        if i > 0:
            slope = slope_at_denoised(nonlinear, x, t)
            along = slope if before is None else before
            push = torch.einsum("bij,bj->bi", jacobian(nonlinear, x, t), along).view_as(x)
            before = slope
        x = x + 0.1 * (nonlinear(x, fixed_times(t, 3)) + alpha * push)
    torch.testing.assert_close(got, x.detach(), rtol=1e-5, atol=1e-5)
    exact = qsteer.sample(BASE, VALUE, noise(3, 2, 2), rule=qsteer.ForwardTweedie(alpha, **RAW))
    assert not torch.allclose(exact, got, atol=1e-3)


@pytest.mark.parametrize("sampler", [qsteer.Euler(), qsteer.BestOfN(3), qsteer.KeepBest()], ids=repr)
def test_a_rule_remembers_nothing_of_another_action(sampler):
    rule, others = qsteer.ForwardTweedie(0.3, stale=True), noise(2, 2, 2, seed=5)
    results = []
    for first in (None, others, noise(5, 2, 2)):
        if first is not None:
            qsteer.sample(BASE, VALUE, first, rule=rule, sampler=sampler)
        torch.manual_seed(0)
        results.append(qsteer.sample(BASE, VALUE, noise(2, 2, 2), rule=rule, sampler=sampler))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert rule == qsteer.ForwardTweedie(0.3, stale=True) and hash(rule) == hash(replace(rule))
    assert "_last" not in repr(rule)


def test_a_steered_field_begins_each_chain_anew():
    steered, euler = qsteer.ForwardTweedie(0.3, stale=True)(BASE, VALUE), qsteer.Euler()
    with torch.no_grad():
        first, _, again = (euler(steered, VALUE, noise(n, 2, 2)) for n in (2, 3, 2))
    assert torch.equal(first, again)
    calls = [steered(noise(n, 2, 2), fixed_times(0.5, n)) for n in (2, 3)]  # no chain: other rows, no memory
    expected = qsteer.ForwardTweedie(0.3)(BASE, VALUE)(noise(3, 2, 2), fixed_times(0.5, 3))
    assert calls[0].shape == (2, 2, 2) and torch.equal(calls[1], expected)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("members", [1, 3])
def test_cost_of_an_action_is_what_the_docstring_says(steps, members):
    sampler = qsteer.Euler(steps) if members == 1 else qsteer.BestOfN(members, qsteer.Euler(steps))
    n, once = 2 * members, [2 * members]
    expected = {False: once * (2 * steps - 1), True: once * min(steps, 1)}
    if steps > 1:
        expected[True] = once * 3 + [2 * n] * (steps - 2)
    for stale, rows in expected.items():
        field, value = CountingField(nonlinear), CountingValue(bumpy)
        rule = qsteer.ForwardTweedie(0.2, stale=stale)
        qsteer.sample(field, value, noise(2, 2, 2), rule=rule, sampler=sampler)
        assert field.tally.rows == rows
        assert field.tally.backwards == 0
        assert value.tally.rows == [n] * (steps - 1 + (members > 1))
        assert value.tally.backwards == steps - 1


def test_a_velocity_without_a_gradient_is_enough():
    field = qsteer.field(torch.no_grad()(MIXTURE.velocity))
    x = noise(5, 2, 2)
    for stale in (False, True):
        rule = qsteer.ForwardTweedie(0.3, stale=stale)
        expected = qsteer.sample(qsteer.field(MIXTURE.velocity), VALUE, x, rule=rule)
        assert torch.equal(qsteer.sample(field, VALUE, x, rule=rule), expected)


@pytest.mark.parametrize("stale", [False, True])
def test_observations_are_repeated_with_the_second_row(stale):
    obs, x = noise(3, 1, 1), noise(3, 2, 2)
    field = qsteer.field(lambda x, t, o: o * nonlinear(x, t), obs)
    value = qsteer.value(lambda a, o: o[:, 0, 0] * bumpy(a), obs)
    rule = qsteer.ForwardTweedie(0.3, stale=stale)
    together = qsteer.sample(field, value, x, rule=rule)
    for i in range(3):
        here = slice(i, i + 1)
        alone = qsteer.sample(
            replace(field, context=obs[here]), replace(value, context=obs[here]), x[here], rule=rule
        )
        torch.testing.assert_close(together[here], alone, rtol=1e-5, atol=1e-5)


def test_a_flat_value_pushes_nowhere():
    flat, x = qsteer.value(lambda a: 0.0 * a.flatten(1).sum(1)), noise(3, 2, 2)
    for stale in (False, True):
        rule, trace = qsteer.ForwardTweedie(0.5, stale=stale), qsteer.Trace(steps=False)
        assert torch.equal(qsteer.sample(BASE, flat, x, rule=rule, trace=trace), qsteer.sample(BASE, None, x))
        assert trace.fallbacks == 0


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "gradient"])
@pytest.mark.parametrize("stale", [False, True])
def test_rows_without_a_finite_value_recover(kind, stale):
    """One step falls back: a stale gradient that is not finite does its harm at the next step alone."""
    calls, bad, x = [], torch.tensor([False, True, False]), noise(3, 2, 2)

    def value(a, flags):
        calls.append(len(calls) + 1)
        return spoiled(bumpy, kind)(a, flags & (calls[-1] == 3))

    rule, trace = qsteer.ForwardTweedie(0.3, stale=stale), qsteer.Trace(steps=False)
    out = qsteer.sample(BASE, qsteer.value(value, bad), x, rule=rule, trace=trace)
    assert trace.fallbacks == 1
    assert out.isfinite().all()
    assert torch.equal(out[~bad], qsteer.sample(BASE, VALUE, x, rule=rule)[~bad])


def test_an_automatic_strength_is_tweedies_where_the_jacobian_is_symmetric():
    x, field = noise(20, 2, 2), qsteer.field(MIXTURE.velocity)
    for auto in ("auto", qsteer.Auto(trust=0.3, largest=10.0)):
        tweedie, forward = (
            guidance(rule(auto), field, VALUE, x, 0.5) for rule in (qsteer.Tweedie, qsteer.ForwardTweedie)
        )
        torch.testing.assert_close(forward, tweedie, rtol=1e-4, atol=1e-5)
        assert (norms(forward) > 0).any()
        value = qsteer.value(linear)
        chains = [
            qsteer.sample(field, value, x, rule=rule)
            for rule in (qsteer.Tweedie(auto), qsteer.ForwardTweedie(auto, stale=True))
        ]
        torch.testing.assert_close(*chains, rtol=1e-4, atol=1e-4)


def test_negated_and_gated_compose():
    x, rule = noise(4, 2, 2), qsteer.ForwardTweedie(0.3)
    up, down = (guidance(r, BASE, VALUE, x, 0.5) for r in (rule, qsteer.Negated(rule)))
    torch.testing.assert_close(down, -up)
    open_gate = qsteer.sample(BASE, VALUE, x, rule=qsteer.Gated(replace(rule, stale=True), 0.0))
    assert torch.equal(open_gate, qsteer.sample(BASE, VALUE, x, rule=replace(rule, stale=True)))


@pytest.mark.parametrize("stale", [False, True])
def test_the_trace_shows_its_strength(stale):
    trace = qsteer.Trace()
    qsteer.sample(BASE, VALUE, noise(3, 2, 2), rule=qsteer.ForwardTweedie(0.25, stale=stale), trace=trace)
    assert trace.arrays()["strength"] == pytest.approx(np.full((3, 9), 0.25), rel=1e-5)


class Network(torch.nn.Module, qsteer.Field):
    """A velocity computed in another dtype than it is asked in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first, second, last = (torch.nn.Linear(i, o) for i, o in ((4, 64), (64, 64), (64, 4)))
        self.net = torch.nn.Sequential(first, torch.nn.SiLU(), second, torch.nn.SiLU(), last).to(dtype)
        self.net.requires_grad_(False)
        for weight in (first.weight, second.weight, last.weight):
            weight *= 3.0

    @property
    def dtype(self) -> torch.dtype:
        return self.net[0].weight.dtype

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.net(x.flatten(1).to(self.dtype)).to(x.dtype).view_as(x)

    def repeat(self, k: int) -> "Network":
        return self

    __call__ = torch.nn.Module.__call__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_perturbation_is_chosen_by_what_the_field_computes_in(dtype):
    """``2 sqrt(u)`` has about the least error; a tenth or ten times of it has more."""
    x, field = noise(100, 2, 2), Network(dtype)
    j, slope = jacobian(Network(dtype).double(), x, 0.5), slope_at_denoised(Network(dtype).double(), x, 0.5)
    true = torch.einsum("bij,bj->bi", j, slope).view_as(x)
    best = 2 * torch.finfo(dtype).eps ** 0.5

    def error(eps):
        with torch.enable_grad():
            rule = qsteer.ForwardTweedie(1.0, eps=eps, **RAW)
            g = rule.ascent(field, VALUE, x, fixed_times(0.5, 100)).gradient
        return (norms(g - true) / norms(true)).median()

    assert error(None) == error(best)
    assert error(None) < 0.6 * torch.stack([error(best / 10), error(best * 10)]).min()
    assert error(None) < 2 * best


def test_the_perturbations_size_is_eps_whatever_the_values_scale_and_mask():
    asked = []

    def velocity(x, t):
        asked.append(x)
        return nonlinear(x, t)

    x, mask = noise(4, 2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    for scale in (1e-3, 1.0, 1e6):
        value = qsteer.value(lambda a, s=scale: s * bumpy(a[:, mask.bool()][..., None]), mask=mask)
        guidance(qsteer.ForwardTweedie(0.3, eps=0.01, clip=None), qsteer.field(velocity), value, x, 0.5)
        moved = asked[1] - asked[0]
        assert (moved[:, mask == 0] == 0).all()
        size = moved[:, mask == 1].square().mean(1).sqrt()
        torch.testing.assert_close(size, torch.full_like(size, 0.01), rtol=1e-4, atol=0)
        asked.clear()


@pytest.mark.parametrize("eps", [0.0, -1e-3, math.inf, math.nan])
def test_perturbations_out_of_range_are_refused(eps):
    with as_installed(), pytest.raises(ValueError, match="eps: expected a finite positive number, got"):
        qsteer.ForwardTweedie(eps=eps)

"""What all guidance rules share: strengths, costs, clipped actions, callers' autograd modes, and errors."""

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    CURVATURE,
    DOUBLE,
    GAUSSIAN,
    TARGET,
    VALUE,
    CountingField,
    CountingValue,
    Ensemble,
    Gaussian,
    as_installed,
    bumpy,
    euler,
    fixed_times,
    guidance,
    noise,
    nonlinear,
    norms,
    quadratic,
    spread,
    total,
)
from guidance_rules import ALL, BY_VALUE, by_name

import qsteer


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_clip_moves_where_the_value_is_asked_and_lets_the_gradient_through(t):
    base, x = Gaussian(2 * GAUSSIAN.mean, GAUSSIAN.std), 2 * noise(20, 1, 3)
    times = fixed_times(t, 20)
    d = base.denoised(x, times)
    assert (d.abs() > 1).any(1).any() and (d.abs() < 1).any(1).any()
    jacobian = t * base.std**2 / spread(t, base.std) ** 2
    slope = lambda a: -CURVATURE * (a - TARGET)  # noqa: E731
    field, value = qsteer.field(base.velocity), qsteer.value(quadratic)
    for clip in (None, (-1.0, 1.0), (-0.2, 0.5)):
        a, noisy = (d, x) if clip is None else (d.clamp(*clip), x.clamp(*clip))
        for rule, expected in (
            (qsteer.Tweedie, jacobian * slope(a)),
            (qsteer.QGF, slope(a)),
            (qsteer.NoisyGradient, slope(noisy)),
        ):
            got = guidance(rule(1.0, scaling="raw", clip=clip), field, value, x, t)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", ["match_norm", "clip_norm", "raw", "sigma"])
@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_rows_do_not_feel_each_other(rule, scaling):
    """Norms are per row: an action does not depend on what else is in the batch."""
    x = noise(5, 3, 2) * torch.tensor([0.1, 1.0, 2.0, 5.0, 0.5], dtype=DOUBLE)[:, None, None]
    rule = rule(0.05, scaling=scaling)
    together = qsteer.sample(BASE, VALUE, x, rule=rule)
    alone = torch.cat([qsteer.sample(BASE, VALUE, row[None], rule=rule) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_a_flat_value_pushes_nowhere():
    flat = qsteer.value(lambda a: 0.0 * total(a))
    x = noise(3, 2, 2)
    for rule in (
        qsteer.Tweedie(0.5),
        qsteer.QGF(0.5, scaling="match_norm"),
        qsteer.Tweedie(0.5, scaling="clip_norm"),
    ):
        assert torch.equal(qsteer.sample(BASE, flat, x, rule=rule), qsteer.sample(BASE, None, x))


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_strength_zero_is_the_field_itself_at_no_cost(rule):
    field, value, x = CountingField(nonlinear), CountingValue(bumpy), noise(3, 2, 2, dtype=torch.float32)
    state = torch.get_rng_state()
    for zero in (rule(0.0), qsteer.Negated(rule(0.0)), rule(0.0, scaling="sigma")):
        assert zero(field, value) is field
        assert torch.equal(qsteer.sample(field, value, x, rule=zero), euler(nonlinear, x))
    assert value.tally.calls == value.tally.backwards == field.tally.backwards == 0
    assert torch.equal(state, torch.get_rng_state())


def test_strength_bends_the_action_the_more_the_larger_it_is():
    x = noise(20, 2, 2)
    base = qsteer.sample(BASE, None, x)
    moved = [
        norms(qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie(a)) - base).mean()
        for a in (0.05, 0.1, 0.2, 0.4)
    ]
    assert 0 < moved[0] < moved[1] < moved[2] < moved[3]


def test_defaults_are_the_papers():
    assert qsteer.Tweedie() == qsteer.Tweedie(0.2, scaling="match_norm", clip="policy", start=0.0, stop=1.0)
    assert qsteer.QGF() == qsteer.QGF(0.02, scaling="raw", clip="policy")
    for rule in (qsteer.NoisyGradient, qsteer.ThroughTime, qsteer.RandomDirection):
        assert rule() == rule(0.2, scaling="match_norm", clip="policy", start=0.0, stop=1.0)


def through_time_sum(k: int) -> int:
    return sum(k - i for i in range(1, k))


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("rule", "forwards", "backwards", "critic"),
    [
        (lambda k: qsteer.Tweedie(0.2), lambda k: k, lambda k: k - 1, lambda k: k - 1),
        (lambda k: qsteer.QGF(), lambda k: k, lambda k: 0, lambda k: k),
        (lambda k: qsteer.NoisyGradient(), lambda k: k, lambda k: 0, lambda k: k - 1),
        (
            lambda k: qsteer.ThroughTime(steps=k),
            lambda k: 1 + through_time_sum(k),
            through_time_sum,
            lambda k: k - 1,
        ),
        (lambda k: qsteer.RandomDirection(), lambda k: k, lambda k: 0, lambda k: 0),
        (lambda k: qsteer.Negated(qsteer.Tweedie()), lambda k: k, lambda k: k - 1, lambda k: k - 1),
        (lambda k: None, lambda k: k, lambda k: 0, lambda k: 0),
    ],
    ids=["Tweedie", "QGF", "NoisyGradient", "ThroughTime", "RandomDirection", "Negated", "none"],
)
def test_cost_of_an_action_is_what_the_docstring_says(rule, forwards, backwards, critic, steps, members):
    """Also inside best-of-n: the same number of calls, each on n rows per observation."""
    sampler = qsteer.Euler(steps) if members == 1 else qsteer.BestOfN(members, qsteer.Euler(steps))
    field, value = CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(field, value, noise(2, 2, 2), rule=rule(steps), sampler=sampler)
    assert field.tally.rows == [2 * members] * forwards(steps)
    assert field.tally.backwards == backwards(steps)
    assert value.tally.rows == [2 * members] * (critic(steps) + (members > 1))
    assert value.tally.backwards == critic(steps)
    assert value.tally.members == 0


# --------------------------------------------------------------------------- autograd modes, dtypes, networks


class Network(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4)).to(
            dtype
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        return (
            self.layers(x.flatten(1)).reshape(x.shape) if t is not None else self.layers(x.flatten(1)).sum(1)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ALL, **by_name)
def test_steering_leaves_the_networks_and_the_noise_as_they_were(rule, dtype):
    policy, critic, x = Network(dtype), Network(dtype), noise(3, 2, 2, dtype=dtype)
    before = [p.clone() for net in (policy, critic) for p in net.parameters()]
    kept = x.clone()
    out = qsteer.sample(qsteer.field(policy), qsteer.value(critic), x, rule=rule(0.3))
    after = [p for net in (policy, critic) for p in net.parameters()]
    assert all(
        p.grad is None and p.requires_grad and torch.equal(p, q) for p, q in zip(after, before, strict=True)
    )
    assert torch.equal(x, kept) and not x.requires_grad and x.grad is None
    assert out.dtype == dtype and not out.requires_grad and out.grad_fn is None
    assert not torch.allclose(out, qsteer.sample(qsteer.field(policy), None, x))


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_float32_agrees_with_float64(rule):
    if rule is qsteer.RandomDirection:  # its directions are drawn in the chunk's dtype
        pytest.skip("another stream")
    x = noise(3, 2, 2)
    single, double = (qsteer.sample(BASE, VALUE, x.to(d), rule=rule(0.2)) for d in (torch.float32, DOUBLE))
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_autograd_mode_of_the_caller_does_not_matter(rule):
    x, policy, critic = noise(3, 2, 2, dtype=torch.float32), Network(torch.float32), Network(torch.float32)
    field, value = qsteer.field(policy), qsteer.value(critic)
    plain = qsteer.sample(field, value, x, rule=rule(0.3))
    with torch.no_grad():
        assert torch.equal(qsteer.sample(field, value, x, rule=rule(0.3)), plain)
    with torch.inference_mode():
        made_inside = x + 0.0
        assert made_inside.is_inference()
        inside = qsteer.sample(field, value, made_inside, rule=rule(0.3))
        assert torch.is_inference_mode_enabled()
    assert torch.equal(inside, plain) and not inside.is_inference()
    assert torch.equal(qsteer.sample(field, value, x.clone().requires_grad_(), rule=rule(0.3)), plain)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sampler", [qsteer.Euler(), qsteer.BestOfN(3), qsteer.TrustRegion()], ids=repr)
def test_observations_made_in_inference_mode_can_be_steered_on(sampler):
    with torch.inference_mode():
        obs = noise(3, 1, 1) + 0.0
        field = qsteer.field(lambda x, t, o: o["a"] * torch.sin(x), {"a": obs})
        value = qsteer.value(lambda a, o: (o * a * a).flatten(1).sum(1), obs)
        torch.manual_seed(0)
        inside = qsteer.sample(field, value, noise(3, 2, 2), rule=qsteer.Tweedie(), sampler=sampler)
    obs = noise(3, 1, 1)
    field = qsteer.field(lambda x, t, o: o["a"] * torch.sin(x), {"a": obs})
    value = qsteer.value(lambda a, o: (o * a * a).flatten(1).sum(1), obs)
    torch.manual_seed(0)
    assert torch.equal(
        inside, qsteer.sample(field, value, noise(3, 2, 2), rule=qsteer.Tweedie(), sampler=sampler)
    )


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_a_steered_field_is_a_field_and_repeats_as_one(rule):
    obs = noise(3, 1, 1)
    field = qsteer.field(lambda x, t, o: o * nonlinear(x, t), obs)
    value = Ensemble((lambda a, o: o[:, 0, 0] * bumpy(a),), obs, mask=torch.tensor([[1, 1], [1, 0]]))
    x, t = noise(3, 2, 2), fixed_times(float(np.float32(0.5)), 3)
    for made in (rule(0.3), qsteer.Negated(rule(0.3))):
        steered = made(field, value)
        assert isinstance(steered, qsteer.Field) and steered.base is field
        many = steered.repeat(2)(x.repeat_interleave(2, 0), t.repeat_interleave(2, 0))
        torch.testing.assert_close(many, steered(x, t).repeat_interleave(2, 0), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("rule", ALL, **by_name)
@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strengths_out_of_range_are_refused_and_point_to_negated(rule, strength):
    with (
        as_installed(),
        pytest.raises(ValueError, match=r"finite strength of at least 0, got.*qsteer\.Negated\(rule\)"),
    ):
        rule(strength)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"scaling": "matchnorm"}, "expected one of match_norm, raw, clip_norm, sigma, got 'matchnorm'"),
        ({"start": -0.1}, r"expected 0 <= start <= stop <= 1 in paper time \(0 is noise\), got -0.1"),
        ({"start": 0.7, "stop": 0.3}, "expected 0 <= start <= stop <= 1.*got 0.7, 0.3"),
        ({"stop": 1.5}, "expected 0 <= start <= stop <= 1"),
        ({"start": float("nan")}, "expected 0 <= start <= stop <= 1"),
        (
            {"clip": (1.0, -1.0)},
            r"clip: expected \(low, high\) with low < high, \"policy\" for the policy's own, "
            r"or None for none, got \(1.0, -1.0\)",
        ),
        ({"clip": (0.0, 0.0)}, "low < high"),
        ({"clip": (-1.0, 0.0, 1.0)}, "low < high"),
        ({"clip": (float("nan"), 1.0)}, "low < high"),
        ({"clip": 1.0}, "low < high"),
    ],
)
@pytest.mark.parametrize("rule", ALL, **by_name)
def test_arguments_out_of_range_are_refused_with_what_was_expected(rule, bad, message):
    with as_installed(), pytest.raises(ValueError, match=message):
        rule(**bad)


@pytest.mark.parametrize("rule", BY_VALUE, **by_name)
def test_values_without_a_gradient_are_refused_and_point_to_best_of_n(rule):
    for fn in (lambda a: total(a.detach()), lambda a: torch.zeros(len(a))):
        with pytest.raises(
            ValueError, match=r"differentiable in the action.*detach\(\) or no_grad\(\).*qsteer\.BestOfN"
        ):
            qsteer.sample(BASE, qsteer.value(fn), noise(2, 2, 2), rule=rule(0.1))


@pytest.mark.parametrize("rule", ALL, **by_name)
def test_rules_are_immutable_and_compare_by_what_they_do(rule):
    with pytest.raises(AttributeError):
        rule().start = 0.5
    assert rule(0.1) == rule(0.1) != rule(0.2)
    assert hash(rule(0.1)) == hash(rule(0.1))

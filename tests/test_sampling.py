"""The bare entry: what it accepts, what it refuses, and that it computes what its parts say."""

import pytest
import torch
from fields import (
    BASE,
    VALUE,
    CountingField,
    CountingValue,
    Host,
    as_installed,
    bumpy,
    euler,
    noise,
    nonlinear,
)

import qsteer


def test_sampling_is_the_sampler_on_the_steered_field():
    x, rule, sampler = noise(3, 2, 2), qsteer.Tweedie(0.3), qsteer.Euler(7, clip=(-1.0, 1.0))
    with torch.no_grad():
        expected = sampler(rule(BASE, VALUE), VALUE, x)
    assert torch.equal(qsteer.sample(BASE, VALUE, x, rule=rule, sampler=sampler), expected)


def test_without_a_rule_nothing_asks_the_value():
    field, value, x = CountingField(nonlinear), CountingValue(bumpy), noise(3, 2, 2)
    assert torch.equal(qsteer.sample(field, value, x), euler(nonlinear, x))
    assert torch.equal(qsteer.sample(field, None, x), euler(nonlinear, x))
    assert value.tally.calls == 0 and field.tally.rows == [3] * 20


def test_any_function_of_field_and_value_is_a_rule_and_of_field_value_and_noise_a_sampler():
    x = noise(3, 2, 2)
    doubled = qsteer.sample(BASE, VALUE, x, rule=lambda f, v: qsteer.field(lambda x, t: 2 * f(x, t)))
    assert torch.equal(doubled, euler(lambda x, t: 2 * nonlinear(x, t), x))
    one_step = qsteer.sample(
        BASE, VALUE, x, sampler=lambda f, v, n: n + f(n, torch.zeros(len(n), dtype=n.dtype))
    )
    assert torch.equal(one_step, x + nonlinear(x, torch.zeros(3, dtype=x.dtype)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 2), (4, 1, 7)])
def test_actions_have_the_shape_of_the_noise(shape):
    for sampler in (
        qsteer.Euler(),
        qsteer.BestOfN(3),
        qsteer.RandomOfN(3),
        qsteer.TrustRegion(),
        qsteer.KeepBest(),
    ):
        assert (
            qsteer.sample(BASE, VALUE, noise(*shape), rule=qsteer.Tweedie(), sampler=sampler).shape == shape
        )


def test_the_same_call_gives_the_same_action():
    x = noise(3, 2, 2, dtype=torch.float32)
    rule = qsteer.Tweedie()
    assert torch.equal(qsteer.sample(BASE, VALUE, x, rule=rule), qsteer.sample(BASE, VALUE, x, rule=rule))


def test_actions_carry_no_graph_and_grad_mode_comes_back_after_an_error():
    def broken(x, t):
        raise RuntimeError("host")

    x = noise(1, 2, 2).requires_grad_()
    assert not qsteer.sample(BASE, VALUE, x, rule=qsteer.Tweedie()).requires_grad
    with pytest.raises(RuntimeError, match="host"):
        qsteer.sample(qsteer.field(broken), VALUE, x, rule=qsteer.QGF())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="host"):
            qsteer.sample(qsteer.field(broken), VALUE, x, rule=qsteer.QGF())
        assert torch.is_inference_mode_enabled()


def test_fields_and_values_are_recognised_by_what_they_can_do():
    assert all(isinstance(f, qsteer.Field) for f in (BASE, Host(nonlinear), CountingField(nonlinear)))
    assert all(isinstance(v, qsteer.Value) for v in (VALUE, CountingValue(bumpy)))
    assert isinstance(qsteer.Tweedie(), qsteer.Rule) and isinstance(qsteer.BestOfN(2), qsteer.Sampler)


X = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: qsteer.sample(nonlinear, VALUE, X),
            TypeError,
            r"expected a Field, got function.*qsteer\.field\(fn\)",
        ),
        (
            lambda: qsteer.sample(BASE, bumpy, X),
            TypeError,
            r"expected a Value, got function.*critic\.bind\(obs\).*qsteer\.value\(fn\)",
        ),
        (
            lambda: qsteer.sample(BASE, VALUE, X[0]),
            ValueError,
            r"\(B, H, A\), got \(2, 2\); add a batch axis: noise\[None\]",
        ),
        (
            lambda: qsteer.sample(BASE, VALUE, X.numpy()),
            TypeError,
            r"floating-point tensor, got ndarray; use torch\.randn",
        ),
        (lambda: qsteer.sample(BASE, VALUE, X.int()), TypeError, r"floating-point tensor, got torch\.int32"),
        (
            lambda: qsteer.sample(BASE, None, X, rule=qsteer.Tweedie()),
            ValueError,
            r"expected a value for the rule to follow, got None; pass critic\.bind\(obs\)",
        ),
        (
            lambda: qsteer.sample(BASE, VALUE, X, rule=qsteer.BestOfN(2)),
            TypeError,
            "got BestOfN and Euler; swap them",
        ),
        (
            lambda: qsteer.sample(BASE, VALUE, X, sampler=qsteer.QGF()),
            TypeError,
            "got NoneType and QGF; swap them",
        ),
        (
            lambda: qsteer.sample(BASE, VALUE, X, rule=0.3),
            TypeError,
            r"rule: expected an object such as qsteer\.Tweedie\(\)",
        ),
        (lambda: qsteer.sample(BASE, VALUE, X, rule=qsteer.Tweedie), TypeError, "pass an instance"),
        (lambda: qsteer.sample(BASE, VALUE, X, trace=True), TypeError, r"pass trace=qsteer\.Trace"),
        (lambda: qsteer.sample(BASE, VALUE, X, sampler=qsteer.Euler), TypeError, "pass an instance"),
        (
            lambda: qsteer.sample(BASE, VALUE, X, sampler=None),
            TypeError,
            r"sampler: expected.*qsteer\.Euler\(\), got None",
        ),
        (lambda: qsteer.sample(BASE, VALUE, X, sampler=10), TypeError, "sampler: expected.*got 10"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_do(call, error, message):
    with as_installed(), pytest.raises(error, match=message):
        call()

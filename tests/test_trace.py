"""What a trace records: shapes, meanings, bounds on memory, and no cost when it is off."""

import contextvars
import threading

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    VALUE,
    CountingField,
    CountingValue,
    Ensemble,
    Host,
    as_installed,
    bumpy,
    fixed_times,
    guidance,
    noise,
    nonlinear,
    norms,
    spoiled,
    total,
)

import qsteer

STATISTICS = ("strength", "gradient_norm", "value", "value_std")


def traced(rule=None, value=VALUE, field=BASE, rows=3, actions=1, trace=None, **kwargs):
    trace = qsteer.Trace() if trace is None else trace
    for seed in range(actions):
        qsteer.sample(field, value, noise(rows, 2, 2, seed=seed), rule=rule, trace=trace, **kwargs)
    return trace


def test_arrays_have_one_row_per_action_row_and_one_column_per_guided_step():
    data = traced(qsteer.Tweedie(), actions=4).arrays()
    assert set(data) == {"t", *STATISTICS, "displacement"} and data["displacement"].shape == (12,)
    np.testing.assert_allclose(data["t"], np.arange(1, 10) / 10, atol=1e-7)
    assert all(data[name].shape == (12, 9) for name in STATISTICS)
    assert all(np.isfinite(data[name]).all() for name in STATISTICS)


def test_actions_follow_each_other_in_order():
    both = traced(qsteer.Tweedie(), actions=2).arrays()
    second = qsteer.Trace()
    qsteer.sample(BASE, VALUE, noise(3, 2, 2, seed=1), rule=qsteer.Tweedie(), trace=second)
    np.testing.assert_array_equal(both["value"][3:], second.arrays()["value"])


def test_qgf_is_recorded_at_noise_too_and_mirrored_hosts_in_paper_time():
    np.testing.assert_allclose(traced(qsteer.QGF()).arrays()["t"], np.arange(10) / 10, atol=1e-7)
    host = Host(lambda x, u: -nonlinear(x, 1 - u.to(x.dtype)))
    np.testing.assert_allclose(
        traced(qsteer.Tweedie(), field=host).arrays()["t"], np.arange(1, 10) / 10, atol=1e-7
    )


@pytest.mark.parametrize("alpha", [0.1, 2.0])
@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 0], [1, 1]])])
@pytest.mark.parametrize(
    "rule",
    [qsteer.Tweedie, qsteer.NoisyGradient, qsteer.ThroughTime, qsteer.RandomDirection],
    ids=lambda r: r.__name__,
)
def test_strength_is_alpha_under_match_norm(rule, alpha, mask):
    for made in (rule(alpha), qsteer.Negated(rule(alpha))):
        strength = traced(made, qsteer.value(bumpy, mask=mask)).arrays()["strength"]
        np.testing.assert_allclose(strength, alpha, rtol=1e-6)


@pytest.mark.parametrize("rule", [qsteer.Tweedie, qsteer.QGF, qsteer.NoisyGradient], ids=lambda r: r.__name__)
def test_statistics_are_those_of_the_step(rule):
    """|guidance|/|v|, the raw gradient's norm, the members' mean and std where the critic was asked."""
    value = Ensemble((bumpy, total, lambda a: a.flatten(1).square().sum(1)))
    x, t = 2 * noise(3, 2, 2), float(np.float32(0.5))
    resting = qsteer.field(
        lambda x, t: (t >= 0.5)[:, None, None] * nonlinear(x, t)
    )  # so that x is there at 0.5
    trace, only = qsteer.Trace(), rule(0.3, scaling="raw", start=0.5, stop=0.5)
    qsteer.sample(resting, value, x, rule=only, trace=trace)
    data = {name: column[:, 0] for name, column in trace.arrays().items() if column.ndim == 2}
    v = nonlinear(x, fixed_times(t, 3))
    raw = norms(guidance(rule(1.0, scaling="raw"), BASE, value, x, t))
    asked = (x if rule is qsteer.NoisyGradient else x + 0.5 * v).clamp(-1, 1)
    members = value.members(asked)
    assert (asked.abs() == 1).any()
    for name, expected in (
        ("strength", 0.3 * raw / norms(v)),
        ("gradient_norm", raw),
        ("value", members.mean(0)),
        ("value_std", members.std(0, unbiased=False)),
    ):
        np.testing.assert_allclose(data[name], expected, rtol=1e-5, err_msg=name)


def test_value_climbs_along_a_steered_chain_more_than_along_an_unsteered_one():
    value = qsteer.value(lambda a: -(a - 0.5).square().flatten(1).sum(1))
    last = [
        traced(qsteer.Tweedie(a), value, rows=50).arrays()["value"][:, -1].mean() for a in (1e-6, 0.2, 0.5)
    ]
    assert last[0] < last[1] < last[2]


def test_candidates_are_rows():
    data = traced(qsteer.Tweedie(), sampler=qsteer.BestOfN(4)).arrays()
    assert data["strength"].shape == (12, 9)


def test_keep_best_records_its_steered_chain_alone():
    assert traced(qsteer.Tweedie(), sampler=qsteer.KeepBest()).arrays()["strength"].shape == (3, 9)


def test_memory_is_bounded_by_keep_and_the_latest_actions_stay():
    trace = traced(qsteer.Tweedie(), actions=7, trace=qsteer.Trace(keep=3))
    assert len(trace.actions) == 3
    np.testing.assert_array_equal(
        trace.arrays()["value"], traced(qsteer.Tweedie(), actions=7).arrays()["value"][-9:]
    )
    parts = [part for action in trace.actions for step in action for part in vars(step).values()]
    assert not any(part.requires_grad for part in parts if isinstance(part, torch.Tensor))


def test_actions_guided_at_other_times_than_the_last_are_left_out_of_the_arrays():
    trace = traced(qsteer.Tweedie(), actions=2)
    traced(qsteer.Tweedie(start=0.5), actions=1, trace=trace)
    assert trace.arrays()["strength"].shape == (3, 5) and len(trace.actions) == 3


@pytest.mark.parametrize(
    "rule", [qsteer.Tweedie, qsteer.QGF, qsteer.RandomDirection], ids=lambda r: r.__name__
)
@pytest.mark.parametrize("off", [None, qsteer.Trace(steps=False)], ids=["none", "fallbacks only"])
def test_tracing_costs_nothing_when_it_is_off_and_changes_nothing_when_it_is_on(rule, off):
    field, value, x = CountingField(nonlinear), CountingValue(bumpy), noise(3, 2, 2)
    plain = qsteer.sample(field, value, x, rule=rule(), trace=off)
    assert value.tally.members == 0 and (off is None or not off.actions)
    calls = field.tally.calls
    assert torch.equal(qsteer.sample(field, value, x, rule=rule(), trace=qsteer.Trace()), plain)
    assert value.tally.members == (10 if rule is qsteer.QGF else 9)  # one critic evaluation per guided step
    assert field.tally.calls == 2 * calls + 10  # and one chain for the displacement


@pytest.mark.parametrize("trace", [qsteer.Trace(), qsteer.Trace(steps=False)])
def test_arrays_of_a_trace_without_steps_are_empty(trace):
    for rule in (None, qsteer.Tweedie(0.0)):
        traced(rule, trace=trace)
    data = trace.arrays()
    assert data["t"].shape == (0,) and all(data[name].shape == (0, 0) for name in STATISTICS)
    assert str(trace).startswith(f"{len(trace.actions)} actions, 0 fallbacks")


@pytest.mark.filterwarnings("ignore:steering met non-finite")
def test_summary_has_one_line_per_guided_step_with_medians_over_finite_rows():
    bad = torch.tensor([False, True, False])
    value = qsteer.value(spoiled(bumpy, "nan"), bad)
    lines = str(traced(qsteer.Tweedie(0.2), value)).splitlines()
    assert lines[0] == "1 actions, 9 fallbacks" and len(lines) == 2 + 9 + 1
    assert lines[1].split() == ["t", "strength", "|gradient|", "value", "spread"]
    assert [line.split()[:2] for line in lines[2:-1]] == [[f"{i / 10:.2f}", "0.2000"] for i in range(1, 10)]


def test_a_trace_hears_of_its_own_calls_alone():
    first, second = qsteer.Trace(), qsteer.Trace()

    def nested(f, v, n):
        qsteer.sample(BASE, VALUE, n, rule=qsteer.Tweedie(), trace=second)
        return qsteer.Euler(5)(f, v, n)

    traced(qsteer.Tweedie(), trace=first, sampler=nested)
    assert first.arrays()["strength"].shape == (3, 4) and second.arrays()["strength"].shape == (3, 9)
    qsteer.Tweedie()(BASE, VALUE)(noise(3, 2, 2), fixed_times(0.5, 3))  # outside of any call
    assert len(first.actions) == len(second.actions) == 1 and len(first.actions[0]) == 4


def test_threads_do_not_mix_their_traces():
    """A server samples from several threads: each call's steps go to the trace which that call was given."""
    traces = [qsteer.Trace() for _ in range(4)]
    threads = [
        threading.Thread(
            target=contextvars.copy_context().run,
            args=(traced, qsteer.Tweedie(), VALUE, BASE, k + 1, 3, trace),
        )
        for k, trace in enumerate(traces)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [t.arrays()["strength"].shape for t in traces] == [(3 * (k + 1), 9) for k in range(4)]


def test_an_error_ends_the_recording():
    trace = qsteer.Trace()

    def broken(x, t):
        if float(t[0]) > 0.45:
            raise RuntimeError("host")
        return nonlinear(x, t)

    with pytest.raises(RuntimeError, match="host"):
        traced(qsteer.Tweedie(), field=qsteer.field(broken), trace=trace)
    recorded = len(trace.actions[0])
    qsteer.Tweedie()(BASE, VALUE)(noise(3, 2, 2), fixed_times(0.5, 3))
    assert recorded == len(trace.actions[0]) == 4
    assert traced(qsteer.Tweedie(), trace=trace).arrays()["strength"].shape == (3, 9)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_trace_that_keeps_nothing_is_refused_with_a_remedy(keep):
    with (
        as_installed(),
        pytest.raises(ValueError, match=f"keep: expected at least 1 action, got {keep}; use steps=False"),
    ):
        qsteer.Trace(keep=keep)


def test_threads_may_share_a_trace():
    trace, meet = qsteer.Trace(), threading.Barrier(2)

    def act(rows):
        def velocity(x, t):
            meet.wait(timeout=30)
            return torch.tanh(x)

        value = qsteer.value(lambda a: a.flatten(1).sum(1))
        qsteer.sample(
            qsteer.field(velocity), value, torch.randn(rows, 3, 2), rule=qsteer.Tweedie(), trace=trace
        )

    threads = [threading.Thread(target=act, args=(rows,)) for rows in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted({len(step.value) for step in action}.pop() for action in trace.actions) == [1, 2]
    assert all(
        len(action) == 9 and len({len(step.value) for step in action}) == 1 for action in trace.actions
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampler", [qsteer.BeamSearch(2, 3, 2), qsteer.BestOfN(3), qsteer.KeepBest()], ids=str
)
def test_any_sampler_and_number_format_can_be_printed(sampler, dtype):
    field, trace = qsteer.field(lambda x, t: torch.sin(x) - 0.5), qsteer.Trace()
    value = qsteer.value(lambda a: a.flatten(1).sum(1))
    for _ in range(2):
        x = torch.randn(2, 3, 2).to(dtype)
        qsteer.sample(field, value, x, rule=qsteer.Tweedie(), sampler=sampler, trace=trace)
    rows = {qsteer.BeamSearch: 2 * 2 * 2, qsteer.BestOfN: 2 * 2 * 3, qsteer.KeepBest: 2 * 2}[type(sampler)]
    assert trace.arrays()["strength"].shape == (rows, 9)
    assert len(str(trace).splitlines()) == 2 + 9 + 1


MASK = torch.tensor([[1, 0], [1, 1]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("clip", [None, (-0.2, 0.2)], ids=str)
def test_displacement_is_that_from_the_same_chain_unsteered(mask, clip):
    value, x, sampler = qsteer.value(bumpy, mask=mask), noise(5, 2, 2), qsteer.Euler(clip=clip)
    trace, rule = qsteer.Trace(), qsteer.Tweedie(0.5)
    off = qsteer.sample(BASE, value, x, rule=rule, sampler=sampler, trace=trace) - qsteer.sample(
        BASE, value, x, sampler=sampler
    )
    seen = torch.ones(2, 2) if mask is None else mask
    expected = (off.square() * seen).flatten(1).sum(1).div(seen.sum()).sqrt()
    assert (expected > 0).any()
    np.testing.assert_allclose(trace.arrays()["displacement"], expected, rtol=1e-5)


def test_displacement_of_a_projection_is_its_radius_and_of_no_rule_zero():
    value = qsteer.value(bumpy)
    projected = traced(None, value, sampler=qsteer.TrustRegion(0.3)).arrays()["displacement"]
    np.testing.assert_allclose(projected, 0.3 / 4**0.5, rtol=1e-5)  # four entries
    assert (traced(None, value).arrays()["displacement"] == 0).all()
    assert (traced(qsteer.Tweedie(0.0), value).arrays()["displacement"] == 0).all()


def test_directions_that_cancel_have_strength_but_less_displacement():
    once, redrawn = (
        traced(qsteer.RandomDirection(0.3, redraw=redraw), rows=200).arrays() for redraw in (False, True)
    )
    np.testing.assert_allclose(once["strength"], redrawn["strength"], rtol=1e-5)
    assert redrawn["displacement"].mean() < 0.6 * once["displacement"].mean()


def test_displacement_alone_costs_no_critic_and_is_off_without_a_trace():
    asked = []
    value = qsteer.value(lambda a: asked.append(1) or a.flatten(1).sum(1))
    trace = qsteer.Trace(steps=False, displacement=True)
    traced(qsteer.Tweedie(), value, actions=2, trace=trace)
    assert len(asked) == 2 * 9 and not trace.actions and trace.arrays()["displacement"].shape == (6,)
    assert not traced(qsteer.Tweedie(), trace=qsteer.Trace(steps=False)).displacements
    assert not traced(qsteer.Tweedie(), trace=qsteer.Trace(displacement=False)).displacements


def test_displacement_is_said():
    text = str(traced(qsteer.Tweedie()))
    assert "moved from the unsteered action by 0." in text and "10 to 90 %" in text

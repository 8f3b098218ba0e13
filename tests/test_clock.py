"""Clocks: the host's own float32 times, and the same actions in both conventions."""

import numpy as np
import pytest
import torch
from fields import DOUBLE, Gaussian, Host, as_installed, noise, nonlinear, total

import qsteer
from qsteer.clock import MIRRORED, PAPER, Clock
from qsteer.flow import expand_time
from qsteer.types import Field

STEPS = range(1, 51)
RULES = [
    qsteer.Tweedie(0.3),
    qsteer.Tweedie(0.3, scaling="sigma", clip=None),
    qsteer.QGF(0.1),
    qsteer.QGF(0.1, scaling="sigma"),  # guides t = 0, where sigma is clamped
    qsteer.NoisyGradient(0.3),
    qsteer.ThroughTime(0.3),
    qsteer.Negated(qsteer.Tweedie(0.3)),
]


def host_velocity(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """noise - action, at host time u = 1 (noise) ... 0 (action)."""
    return torch.sin(3.0 * x.roll(1, dims=2)) + u[:, None, None] * x - u[:, None, None] ** 2


def host_loop(w, x: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loop of openpi and lerobot (`euler_integrate`), verbatim but for names."""
    dt, times = -1.0 / steps, []
    for step in range(steps):
        time = 1.0 + step * dt
        times.append(torch.tensor(time, dtype=torch.float32).expand(x.shape[0]))
        x = x + dt * w(x, times[-1])
    return x, times


@pytest.mark.parametrize("steps", STEPS)
def test_mirrored_chain_is_the_hosts_own_loop_bit_for_bit(steps):
    x = noise(3, 4, 2, seed=steps, dtype=torch.float32)
    field = Host(host_velocity)
    expected, times = host_loop(host_velocity, x, steps)
    assert torch.equal(qsteer.sample(field, None, x, sampler=qsteer.Euler(steps)), expected)
    assert [t.dtype for t in field.times] == [torch.float32] * steps
    assert all(torch.equal(a, b) for a, b in zip(field.times, times, strict=True))


@pytest.mark.parametrize("steps", STEPS)
def test_paper_chain_is_a_forward_loop_bit_for_bit(steps):
    x, dt = noise(3, 4, 2, seed=steps, dtype=torch.float32), 1.0 / steps
    expected, times, seen = x, [], []
    for step in range(steps):
        times.append(torch.full((3,), step * dt, dtype=torch.float32))
        expected = expected + dt * nonlinear(expected, times[-1])
    field = qsteer.field(lambda x, t: (seen.append(t), nonlinear(x, t))[1])
    assert torch.equal(qsteer.sample(field, None, x, sampler=qsteer.Euler(steps)), expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, times, strict=True))


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.0, 1000.0), (999.0, 0.0), (-1.0, 1.0)])
def test_any_clock_gives_the_host_its_own_float32_times(start, end):
    clock = Clock(noise=start, action=end)
    x = torch.zeros(2, 1, 1)
    for steps in STEPS:
        got = torch.stack([expand_time(clock.to_host(t), x, torch.float32) for t, _ in clock.grid(steps)])
        expected = np.float32([start + i * ((end - start) / steps) for i in range(steps)])
        assert torch.equal(got, torch.from_numpy(expected)[:, None].expand(-1, 2))


@pytest.mark.parametrize("clock", [PAPER, MIRRORED])
def test_grid_runs_from_exactly_zero_in_equal_steps(clock):
    for steps in STEPS:
        times, widths = zip(*clock.grid(steps), strict=True)
        assert widths == (1.0 / steps,) * steps
        assert np.signbit(times[0]) == 0 and times[0] == 0.0  # -0.0 would turn sigma's 1/t into -inf
        np.testing.assert_allclose(times, np.arange(steps) / steps, atol=6e-8)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 4, 10, 30])
def test_steered_actions_are_the_same_in_both_conventions(rule, steps):
    if isinstance(rule, qsteer.ThroughTime):
        rule = qsteer.ThroughTime(0.3, steps=steps)
    x = noise(3, 4, 2, seed=steps)
    value = qsteer.value(lambda a: -(a - 0.7).square().flatten(1).sum(1))
    mirrored = Host(lambda x, u: -nonlinear(x, 1.0 - u.to(DOUBLE)))
    ours = [
        qsteer.sample(f, value, x, rule=rule, sampler=qsteer.Euler(steps))
        for f in (qsteer.field(nonlinear), mirrored)
    ]
    unsteered = qsteer.sample(mirrored, None, x, sampler=qsteer.Euler(steps))
    torch.testing.assert_close(*ours, rtol=0, atol=1e-5)  # the grids differ by float32 rounding of time
    assert steps == 1 or not torch.allclose(ours[1], unsteered, atol=1e-2)


@pytest.mark.parametrize("rule", [qsteer.Tweedie(0.5), qsteer.QGF(0.2), qsteer.NoisyGradient(0.5)], ids=repr)
@pytest.mark.parametrize("clock", [PAPER, MIRRORED])
def test_ascent_raises_the_value_and_negated_lowers_it_in_both_conventions(rule, clock):
    g = Gaussian(torch.zeros(2, 2, dtype=DOUBLE), torch.full((2, 2), 0.5, dtype=DOUBLE))
    sign = clock.sign
    field = Host(
        lambda x, u: sign * g.velocity(x, (u.to(DOUBLE) - clock.noise) / (clock.action - clock.noise)), clock
    )
    x, value = noise(50, 2, 2), qsteer.value(total)
    up, base, down = (
        total(qsteer.sample(field, value, x, rule=r)) for r in (rule, None, qsteer.Negated(rule))
    )
    assert (up > base).all() and (base > down).all()


@pytest.mark.parametrize("clock", [PAPER, MIRRORED])
@pytest.mark.parametrize("steps", [10, 7, 50])
def test_guided_window_includes_both_its_edges(clock, steps):
    """An edge named in decimals must not be missed because the host's float32 time is an ulp beside it."""
    for first in range(1, steps - 1):
        last = first + 1
        rule = qsteer.Tweedie(start=first / steps, stop=last / steps)
        guided = [rule.guides(t) for t, _ in clock.grid(steps)]
        assert [i for i, g in enumerate(guided) if g] == [first, last]


class Plain(Field):
    def __call__(self, x, t):
        return x

    def repeat(self, k):
        return self


def test_fields_without_a_clock_run_on_the_papers():
    assert qsteer.field(nonlinear).clock == PAPER == Clock() == Clock(0.0, 1.0, 1, 10)
    assert Plain().clock == PAPER
    assert qsteer.field(nonlinear, clock=MIRRORED).clock == MIRRORED


def test_steered_and_repeated_fields_keep_the_hosts_clock():
    field, value = qsteer.field(nonlinear, clock=MIRRORED), qsteer.value(total)
    steered = qsteer.Tweedie()(field, value)
    assert steered.clock == steered.repeat(3).clock == field.repeat(3).clock == MIRRORED


def test_number_of_steps_is_the_samplers_else_the_clocks():
    for sampler, expected in ((qsteer.Euler(), 4), (qsteer.Euler(7), 7)):
        field = Host(lambda x, u: -x, Clock(1.0, 0.0, -1, steps=4))
        qsteer.sample(field, None, torch.zeros(1, 1, 1), sampler=sampler)
        assert len(field.times) == expected


@pytest.mark.parametrize("bad", [{"noise": 1.0}, {"sign": 0}, {"sign": 2}, {"steps": 0}])
def test_impossible_clocks_are_refused_with_an_example(bad):
    with (
        as_installed(),
        pytest.raises(ValueError, match=r"expected noise and action at different.*Clock\(noise=1\.0"),
    ):
        Clock(**bad)

"""Losses of flow maps against closed forms and finite differences; targets and radii of trust."""

import math

import pytest
import torch
from fields import DOUBLE, GAUSSIAN, fixed_times, noise, norms, uniform
from small_maps import NETWORKS, features, small

import qsteer
from qsteer.maps import (
    FlowMap,
    adaptive,
    diagonal_loss,
    direct_loss,
    eulerian_loss,
    fmq_target,
    lagrangian_loss,
    progressive_loss,
    semigroup_loss,
    trust_radius,
)


def spread_times(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """r < w < t, the last rows at the ends and on the diagonal."""
    r, w, t = uniform(n, 3).sort(1).values.unbind(1)
    r[-2:], w[-2:], t[-2:] = torch.tensor([[0.0, 0.4], [0.7, 0.4], [1.0, 0.4]], dtype=DOUBLE)
    return r, w, t


def euler_step(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Right on the diagonal, wrong off it."""
    return GAUSSIAN.velocity(x, r)


DISTILLATION = {
    "lagrangian": lambda u, x, r, t, w: lagrangian_loss(u, x, r, t),
    "eulerian": lambda u, x, r, t, w: eulerian_loss(u, x, r, t),
    "eulerian-convex": lambda u, x, r, t, w: eulerian_loss(u, x, r, t, stop="velocity"),
    "eulerian-teacher": lambda u, x, r, t, w: eulerian_loss(u, x, r, t, GAUSSIAN.velocity(x, r)),
    "progressive": progressive_loss,
    "semigroup": semigroup_loss,
    "semigroup-target": lambda u, x, r, t, w: semigroup_loss(u, x, r, t, w, GAUSSIAN.average_velocity),
}


@pytest.mark.parametrize("loss", DISTILLATION.values(), ids=DISTILLATION)
def test_losses_vanish_at_the_true_flow_map_and_only_there(loss):
    x, (r, w, t) = noise(40, 1, 3), spread_times(40)
    right = loss(GAUSSIAN.average_velocity, x, r, t, w)
    wrong = loss(euler_step, x, r, t, w)
    assert right.shape == (40,) and (right < 1e-20).all()
    inside = (t - w > 0.05) & (w - r > 0.05)
    assert inside.sum() > 15 and (wrong[inside] > 1e-7).all() and wrong.mean() > 1e-2
    assert (wrong[-1] < 1e-20).all(), "on the diagonal the Euler step is right"


def test_progressive_legs_swapped_would_not_vanish():
    """The two jumps' weights are their shares of the time, not the other's."""
    x, (r, w, t) = noise(40, 1, 3), spread_times(40)
    u, share = GAUSSIAN.average_velocity, ((w - r) / (t - r))[:-1, None, None]
    first, second = u(x, r, w), u(GAUSSIAN.jump(x, r, w), w, t)
    legs = (share * first[:-1] + (1 - share) * second[:-1], (1 - share) * first[:-1] + share * second[:-1])
    right, swapped = (norms(u(x, r, t)[:-1] - leg) for leg in legs)
    assert (right < 1e-10).all() and swapped.mean() > 0.05


def test_diagonal_loss_is_minimal_at_the_velocity():
    """Its gradient, in a gain and an offset of the true velocity, vanishes within 4 standard errors."""
    n, t = 20000, 0.4
    x0, x1 = noise(n, 1, 3), GAUSSIAN.mean + GAUSSIAN.std * noise(n, 1, 3, seed=1)
    for offset, gain, stationary in ((0.0, 1.0, True), (0.1, 1.0, False), (0.0, 1.1, False)):
        at = torch.tensor([offset, gain], dtype=DOUBLE).expand(n, 2).clone().requires_grad_()

        def u(x, r, t, at=at):
            return at[:, :1, None] + at[:, 1:, None] * GAUSSIAN.velocity(x, t)

        slope = torch.autograd.grad(diagonal_loss(u, x0, x1, fixed_times(t, n)).sum(), at)[0]
        z = slope.mean(0) / (slope.std(0) / math.sqrt(n))
        assert (z.abs() < 4).all() if stationary else (z.abs() > 6).any()


def test_diagonal_loss_takes_a_teachers_velocity():
    x0, x1, t = noise(6, 1, 3), noise(6, 1, 3, seed=1), uniform(6)
    x = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    exact = diagonal_loss(GAUSSIAN.average_velocity, x0, x1, t, GAUSSIAN.velocity(x, t))
    assert (exact < 1e-25).all()
    data = diagonal_loss(GAUSSIAN.average_velocity, x0, x1, t)
    torch.testing.assert_close(data, norms(GAUSSIAN.velocity(x, t) - (x1 - x0)) ** 2)


def average(flow_map: FlowMap, network: str):
    z = flow_map.net.encode(features(network))
    return lambda x, r, t: flow_map.average_velocity(z, x, r, t)


def slopes(loss: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    grads = torch.autograd.grad(loss.sum(), list(module.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("network", NETWORKS)
def test_eulerian_loss_with_the_data_velocity_has_the_gradient_of_mean_flow_training(network):
    """|| u - sg(v + (t - r) du/dr) ||² (FMQ A.2), the total derivative by central differences."""
    flow_map, h = small(network), 1e-5
    u = average(flow_map, network)
    x0, x1 = noise(3, 2, 2), noise(3, 2, 2, seed=1)
    r, t = torch.tensor([[0.1, 0.3, 0.5], [0.9, 0.4, 1.0]], dtype=DOUBLE)
    x, v, span = qsteer.flow.interpolate(x0, x1, r), x1 - x0, (t - r)[:, None, None]
    total = (u(x + h * v, r + h, t) - u(x - h * v, r - h, t)) / (2 * h)
    losses = {
        "target": norms(u(x, r, t) - (v + span * total).detach()) ** 2,
        "velocity": norms(u(x, r, t) - (v + span * total)) ** 2,
    }
    grads = {}
    for stop, expected in losses.items():
        loss = eulerian_loss(u, x, r, t, v, stop=stop)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
        grads[stop] = slopes(loss, flow_map)
        torch.testing.assert_close(grads[stop], slopes(expected, flow_map), rtol=1e-5, atol=1e-7)
    assert (grads["target"] - grads["velocity"]).norm() > 0.05 * grads["target"].norm()
    own = eulerian_loss(u, x, r, t)
    torch.testing.assert_close(own, eulerian_loss(u, x, r, t, u(x, r, r).detach()))


def test_direct_loss_is_the_distance_to_the_teachers_own_steps():
    """It vanishes for the average over the same steps, and at the true map to the order of Euler's steps."""
    x, (r, _, t) = noise(40, 1, 3), spread_times(40)

    def steps_of(n):
        def average(x, r, t):
            y = x
            for k in range(n):
                h = (t - r)[:, None, None] / n
                y = y + h * GAUSSIAN.velocity(y, r + k * (t - r) / n)
            return torch.where(
                (t > r)[:, None, None], (y - x) / (t - r)[:, None, None], GAUSSIAN.velocity(x, r)
            )

        return average

    same = direct_loss(steps_of(10), x, r, t, GAUSSIAN.velocity, 10)
    assert same.shape == (40,) and (same < 1e-20).all()
    true = [direct_loss(GAUSSIAN.average_velocity, x, r, t, GAUSSIAN.velocity, n).mean() for n in (20, 40)]
    assert (true[0] / true[1]).sqrt() == pytest.approx(2, rel=0.1)
    assert (direct_loss(euler_step, x, r, t, GAUSSIAN.velocity, 10) > 1e-7)[t - r > 0.1].all()


@pytest.mark.parametrize("network", NETWORKS)
def test_direct_loss_weighs_by_time_and_its_teacher_carries_no_gradient(network):
    flow_map, x = small(network), noise(3, 2, 2)
    u = average(flow_map, network)
    r, t = torch.tensor([[0.1, 0.3, 0.5], [0.9, 0.35, 1.0]], dtype=DOUBLE)
    scale = torch.ones((), dtype=DOUBLE, requires_grad=True)
    loss = direct_loss(u, x, r, t, lambda x, r: scale * x, 1)
    assert not torch.autograd.grad(loss.sum(), scale, retain_graph=True, allow_unused=True)[0]
    expected = (t - r) * norms(u(x, r, t) - x) ** 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slopes(loss, flow_map), slopes(expected, flow_map))


@pytest.mark.parametrize("network", NETWORKS)
def test_lagrangian_loss_is_the_finite_difference_in_the_last_time(network):
    flow_map, h, x = small(network), 1e-5, noise(3, 2, 2)
    u = average(flow_map, network)
    r, t = torch.tensor([[0.1, 0.3, 0.5], [0.9, 0.4, 1.0]], dtype=DOUBLE)

    def jump(t):
        return x + (t - r)[:, None, None] * u(x, r, t)

    expected = norms((jump(t + h) - jump(t - h)) / (2 * h) - u(jump(t), t, t).detach()) ** 2
    loss = lagrangian_loss(u, x, r, t)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    # the teacher's state carries no gradient either
    teacher = u(jump(t).detach(), t, t).detach()
    by_hand = norms((jump(t + h) - jump(t - h)) / (2 * h) - teacher) ** 2
    torch.testing.assert_close(slopes(loss, flow_map), slopes(by_hand, flow_map), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", [progressive_loss, semigroup_loss])
def test_teachers_of_two_jumps_carry_no_gradient(network, loss):
    flow_map, x = small(network), noise(3, 2, 2)
    u = average(flow_map, network)
    r, w, t = torch.tensor([[0.1, 0.3, 0.5], [0.4, 0.35, 0.9], [0.9, 0.4, 1.0]], dtype=DOUBLE)
    frozen, span = u(x, r, t).detach(), (t - r)[:, None, None]
    residual = loss(lambda *at: u(*at).detach(), x, r, t, w).sqrt()
    scale = torch.ones_like(span) if loss is progressive_loss else span
    # d/dtheta ||scale u - c||² = 2 scale (scale u - c) du/dtheta: of the right norm, and along u alone
    got = slopes(loss(u, x, r, t, w), flow_map)
    second = u(x + (w - r)[:, None, None] * u(x, r, w), w, t)
    g = ((w - r) / (t - r))[:, None, None]
    teacher = (g * u(x, r, w) + (1 - g) * second).detach()
    torch.testing.assert_close(residual, norms(scale * (frozen - teacher)), rtol=1e-9, atol=1e-12)
    expected = slopes(norms(scale * (u(x, r, t) - teacher)) ** 2, flow_map)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_semigroup_loss_asks_the_target_for_the_two_jumps():
    x, (r, w, t) = noise(10, 1, 3), spread_times(10)
    asked = []

    def target(x, r, t):
        asked.append((r, t))
        return euler_step(x, r, t)

    loss = semigroup_loss(GAUSSIAN.average_velocity, x, r, t, w, target)
    y = x + (w - r)[:, None, None] * GAUSSIAN.velocity(x, r)
    y = y + (t - w)[:, None, None] * GAUSSIAN.velocity(y, w)
    torch.testing.assert_close(loss, norms(GAUSSIAN.jump(x, r, t) - y) ** 2)
    assert [(a is r, b is t, a is w, b is w) for a, b in asked] == [(1, 0, 0, 1), (0, 1, 1, 0)]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_adaptive_weight_carries_no_gradient(power):
    loss = torch.tensor([0.0, 0.5, 100.0], dtype=DOUBLE, requires_grad=True)
    out = adaptive(loss, power)
    torch.testing.assert_close(out, loss / (loss + 0.01) ** power)
    slope = torch.autograd.grad(out.sum(), loss)[0]
    torch.testing.assert_close(slope, (loss.detach() + 0.01) ** -power)


@pytest.mark.parametrize("eta", [0.3, torch.tensor([0.1, 1.0, 0.0, 2.0], dtype=DOUBLE)], ids=["one", "each"])
def test_fmq_target_is_the_best_velocity_in_the_ball_for_the_linearised_critic(eta):
    u, g = noise(4, 2, 3), noise(4, 2, 3, seed=1)
    best = fmq_target(u, g, eta)
    radius = torch.as_tensor(eta, dtype=DOUBLE).expand(4)
    torch.testing.assert_close(norms(best - u), radius, rtol=1e-6, atol=0)
    others = noise(5000, 4, 2, 3, seed=2)
    others = others / others.flatten(2).norm(dim=2)[..., None, None] * radius[:, None, None]
    gains = ((others * g).flatten(2).sum(2), ((best - u) * g).flatten(1).sum(1))
    assert (gains[0] <= gains[1] + 1e-12).all()
    assert (gains[0].amax(0) >= 0.8 * gains[1]).all(), "the ball was searched"


def test_fmq_target_without_a_gradient_is_the_reference():
    u = noise(4, 2, 3)
    assert torch.equal(fmq_target(u, torch.zeros_like(u), 0.3), u)


# --------------------------------------------------------------------------------------------- radii of trust


def test_radius_is_the_same_for_an_ensemble_and_for_that_ensemble_twice():
    q = noise(5, 7)
    torch.testing.assert_close(trust_radius(0.3, q, 0.5), trust_radius(0.3, q.repeat(2, 1), 0.5))


def test_an_ensemble_that_agrees_keeps_its_radius():
    assert torch.equal(trust_radius(0.3, noise(1, 7).expand(4, 7), 2.0), torch.full((7,), 0.3, dtype=DOUBLE))

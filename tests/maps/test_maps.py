"""GLASS, flow maps, their losses and networks, against closed forms; and small maps that really learn.

For x1 ~ N(m, s²) the endpoint posterior is N(D, P), so that the inner flow is the flow of a Gaussian again,
whose velocity is known: a derivation of GLASS without its formula. A mixture's posterior is a mixture.
"""

import math

import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    CountingField,
    Gaussian,
    Host,
    Mixture,
    as_installed,
    bumpy,
    differences,
    fixed_times,
    noise,
    nonlinear,
    norms,
)

import qsteer
from qsteer.clock import MIRRORED, PAPER
from qsteer.maps import (
    EulerMap,
    FlowMap,
    GlassPosterior,
    MapConfig,
    MetaFlowMap,
    MetaMapConfig,
    adaptive,
    diagonal_loss,
    eulerian_loss,
    fmq_target,
    glass_velocity,
    lagrangian_loss,
    progressive_loss,
    semigroup_loss,
)
from qsteer.maps.glass import glass

GAUSSIAN = Gaussian(
    torch.tensor([[0.5, -1.0, 0.2]], dtype=DOUBLE), torch.tensor([[0.3, 0.7, 1.5]], dtype=DOUBLE)
)
MIXTURE = Mixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=DOUBLE),
    noise(3, 2, 2, seed=7),
    torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE),
)
MODES = Mixture(
    torch.tensor([0.3, 0.7], dtype=DOUBLE),
    torch.tensor([[[-1.0]], [[1.0]]], dtype=DOUBLE),
    torch.tensor([0.15, 0.15], dtype=DOUBLE),
)


def uniform(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ------------------------------------------------------------------------------------------------------ GLASS


def test_glass_velocity_is_the_published_formula():
    x, xbar = noise(50, 2, 2), noise(50, 2, 2, seed=1)
    t, u = uniform(50), uniform(50, seed=2)
    a, b = t[:, None, None], u[:, None, None]
    r = (a**2 * (1 - b) ** 2 + (1 - a) ** 2 * b**2).sqrt()
    q = (1 - a) * (1 - b)
    star = r / (r + q)
    v = nonlinear(star * ((1 - b) ** 2 * a * x + (1 - a) ** 2 * b * xbar) / r**2, star.flatten())
    outer, answer = a * (1 - b) / (r * (r + q)), (1 - a) / (r + q)
    inner = (b * (1 - a) ** 2 - a**2 * (1 - b) - r * (1 - a)) / (r * (r + q))
    torch.testing.assert_close(
        glass_velocity(BASE, x, t, xbar, u), outer * x + inner * xbar + answer * v, rtol=1e-11, atol=1e-11
    )


def test_glass_velocity_is_the_velocity_of_the_flow_to_a_gaussian_posterior():
    x, xbar, t, u = noise(50, 1, 3), noise(50, 1, 3, seed=1), uniform(50), uniform(50, seed=2)
    posterior = Gaussian(GAUSSIAN.denoised(x, t), GAUSSIAN.variance(x, t).sqrt())
    got = glass_velocity(qsteer.field(GAUSSIAN.velocity), x, t, xbar, u)
    torch.testing.assert_close(got, posterior.velocity(xbar, u), rtol=1e-9, atol=1e-9)


def posterior_of(base: Mixture, x: torch.Tensor, t: torch.Tensor) -> Mixture:
    """The mixture of one row's endpoint posterior."""
    means = torch.stack([g.denoised(x, t)[0] for g in base.parts()])
    variances = torch.stack([g.variance(x, t).flatten()[0] for g in base.parts()])
    return Mixture(base.posterior(x, t)[:, 0, 0, 0], means, variances.sqrt())


@pytest.mark.parametrize("t", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("u", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_glass_velocity_is_the_velocity_of_the_flow_to_a_mixture_posterior(t, u):
    x, xbar = noise(1, 2, 2), noise(30, 2, 2, seed=1)
    posterior = posterior_of(MIXTURE, x, fixed_times(t, 1))
    got = glass_velocity(
        qsteer.field(MIXTURE.velocity),
        x.expand(30, 2, 2),
        fixed_times(t, 30),
        xbar,
        fixed_times(u, 30),
    )
    torch.testing.assert_close(got, posterior.velocity(xbar, fixed_times(u, 30)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("u", [0.0, 1e-6, 0.5, 1.0])
def test_glass_velocity_at_outer_time_zero_is_the_base_flow_whatever_the_outer_state(u, dtype):
    x, xbar = noise(5, 2, 2, dtype=dtype), noise(5, 2, 2, seed=1, dtype=dtype)
    times = fixed_times(u, 5, dtype)
    got = glass_velocity(BASE, x, fixed_times(0.0, 5, dtype), xbar, times)
    torch.testing.assert_close(got, nonlinear(xbar, times))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("t", [1e-6, 0.5, 1 - 1e-6])
def test_glass_velocity_at_inner_time_zero_points_to_the_denoised_action(t, dtype):
    x, xbar = noise(5, 2, 2, dtype=dtype), noise(5, 2, 2, seed=1, dtype=dtype)
    times = fixed_times(t, 5, dtype)
    got = glass_velocity(BASE, x, times, xbar, fixed_times(0.0, 5, dtype))
    expected = qsteer.flow.denoise(x, nonlinear(x, times), times) - xbar
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("t", [0.0, 1e-6, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("u", [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
def test_glass_velocity_is_finite_at_every_corner_and_asks_once_within_the_policys_time(t, u, dtype):
    asked = []

    def velocity(x, t):
        asked.append(t)
        return nonlinear(x, t)

    x, xbar = noise(4, 2, 2, dtype=dtype), noise(4, 2, 2, seed=1, dtype=dtype)
    v = glass_velocity(qsteer.field(velocity), x, fixed_times(t, 4, dtype), xbar, fixed_times(u, 4, dtype))
    assert torch.isfinite(v).all() and v.dtype == dtype
    assert len(asked) == 1 and (asked[0] >= max(t, u) - 1e-6).all() and (asked[0] <= 1).all()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_glass_samples_have_a_gaussian_posteriors_mean_and_its_std_at_first_order_in_the_steps(t):
    """Samples are affine in the noise, entry by entry: three noises give mean and std without sampling error.

    The mean runs along a straight line, on which Euler is exact.
    """
    x, times = noise(4, 1, 3), fixed_times(t, 4)
    eps = torch.tensor([0.0, 1.0, -2.0], dtype=DOUBLE)[:, None, None, None].expand(3, 4, 1, 3)
    mean, std = GAUSSIAN.denoised(x, times), GAUSSIAN.variance(x, times).sqrt()
    errors = []
    for steps in (50, 100, 200):
        zero, one, minus_two = GlassPosterior(qsteer.field(GAUSSIAN.velocity), steps)(eps, x, times)
        torch.testing.assert_close(minus_two - zero, -2 * (one - zero), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(zero, mean, rtol=1e-9, atol=1e-9)
        errors.append((one - zero - std).abs().mean())
    assert errors[-1] < 0.01
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6])
def test_glass_samples_have_a_mixture_posteriors_mode_weights_and_moments(t):
    """4 standard errors, and 0.01 for 60 steps."""
    n, x, times = 4000, torch.tensor([[[-0.1]], [[0.05]], [[0.3]]], dtype=DOUBLE), fixed_times(t, 3)
    x1 = GlassPosterior(qsteer.field(MODES.velocity), 60)(noise(n, 3, 1, 1), x, times)[..., 0, 0]
    weight = MODES.posterior(x, times)[1, :, 0, 0]
    assert ((0.02 < weight) & (weight < 0.98)).all()
    error = (weight * (1 - weight) / n).sqrt()
    assert (((x1 > 0).double().mean(0) - weight).abs() < 4 * error + 0.01).all()
    mean, variance = MODES.denoised(x, times)[:, 0, 0], MODES.covariance(x, times)[:, 0, 0]
    assert ((x1.mean(0) - mean).abs() < 4 * (variance / n).sqrt() + 0.01).all()
    square = (x1 - mean) ** 2
    assert ((square.mean(0) - variance).abs() < 4 * square.std(0) / math.sqrt(n) + 0.01).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("field", [BASE, Host(nonlinear)], ids=["paper", "mirrored"])
def test_glass_samples_are_the_same_when_the_first_velocity_is_known(field, steps):
    x, eps, times = noise(3, 2, 2), noise(4, 3, 2, 2, seed=1), fixed_times(0.4, 3)
    posterior = GlassPosterior(field, steps)
    got = posterior.given(field(x, times), eps, x, times)
    torch.testing.assert_close(got, posterior(eps, x, times), rtol=1e-6, atol=1e-6)
    if steps == 1:
        denoised = qsteer.flow.denoise(x, field(x, times), times)
        torch.testing.assert_close(got, denoised.expand(4, 3, 2, 2))
    else:
        assert (got.std(0) > 1e-3).all()


def test_glass_samples_of_a_mirrored_host_are_those_of_the_paper():
    x, eps = noise(3, 2, 2), noise(4, 3, 2, 2, seed=1)
    host = Host(lambda x, u: -MIXTURE.velocity(x, 1 - u.to(x.dtype)))
    got, expected = (
        GlassPosterior(field, 7)(eps, x, fixed_times(0.4, 3))
        for field in (host, qsteer.field(MIXTURE.velocity))
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_glass_costs_steps_forwards_on_all_samples_and_one_less_inside_a_rule(steps):
    field, x, eps, times = CountingField(nonlinear), noise(3, 2, 2), noise(5, 3, 2, 2), fixed_times(0.4, 3)
    posterior = GlassPosterior(field, steps)
    posterior(eps, x, times)
    assert field.tally.rows == [15] * steps
    field.tally.rows.clear()
    posterior.given(noise(3, 2, 2), eps, x, times)
    assert field.tally.rows == [15] * (steps - 1)


@pytest.mark.parametrize("known", [False, True])
def test_glass_samples_are_differentiable_in_the_outer_state(known):
    eps, times = noise(3, 4, 2, 2, seed=1), fixed_times(0.4, 4)

    def score(x):
        posterior = GlassPosterior(BASE, 3)
        x1 = posterior.given(BASE(x, times), eps, x, times) if known else posterior(eps, x, times)
        return sum(bumpy(sample) for sample in x1)

    x = noise(4, 2, 2).requires_grad_()
    g = torch.autograd.grad(score(x).sum(), x)[0]
    torch.testing.assert_close(g, differences(score, x.detach()), rtol=1e-6, atol=1e-6)


def test_glass_samples_of_a_batch_are_those_of_each_observation_alone():
    goals = torch.tensor([-3.0, 0.0, 5.0], dtype=DOUBLE)[:, None, None]
    x, eps, times = noise(3, 2, 2), noise(4, 3, 2, 2, seed=1), torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE)

    def field(rows):
        return qsteer.field(lambda x, t, o: o + nonlinear(x, t), goals[rows])

    got = GlassPosterior(field(slice(None)), 3)(eps, x, times)
    for b in range(3):
        rows = slice(b, b + 1)
        alone = GlassPosterior(field(rows), 3)(eps[:, rows], x[rows], times[rows])
        torch.testing.assert_close(got[:, rows], alone, rtol=1e-12, atol=1e-12)


def test_glass_without_steps_or_policy_is_refused():
    with as_installed(), pytest.raises(ValueError, match="expected at least 1 step, got 0"):
        GlassPosterior(BASE, 0)
    with pytest.raises(ValueError, match=r"expected a policy to sample from.*Posterior\(GlassPosterior"):
        GlassPosterior()(noise(1, 1, 2, 2), noise(1, 2, 2), fixed_times(0.5, 1))


# -------------------------------------------------------------------------------------------------- EulerMap


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("steps", [3, 7, 10])
@pytest.mark.parametrize("field", [BASE, Host(nonlinear)], ids=["paper", "mirrored"])
def test_euler_map_from_noise_to_action_is_the_policys_chain_bit_for_bit(field, steps, dtype):
    x = noise(4, 2, 2, dtype=dtype)
    for ends in ((0.0, 1.0), (fixed_times(0.0, 4), fixed_times(1.0, 4))):
        got = EulerMap(field, steps)(x, *ends)
        assert torch.equal(got, qsteer.Euler(steps)(field, None, x))
        if steps == 10:
            assert torch.equal(got, EulerMap(field)(x, *ends))


@pytest.mark.parametrize("clock", [PAPER, MIRRORED], ids=["paper", "mirrored"])
@pytest.mark.parametrize(
    ("r", "t", "steps", "calls"),
    [(0.0, 1.0, 10, 10), (0.6, 1.0, 10, 4), (0.55, 1.0, 10, 5), (0.3, 0.31, 10, 1), (0.7, 1.0, 100, 30)],
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_part_of_the_chain_takes_its_share_of_the_steps(clock, r, t, steps, calls, dtype):
    x = noise(3, 2, 2, dtype=dtype)
    for ends in ((r, t), (fixed_times(r, 3, dtype), fixed_times(t, 3, dtype))):
        field = CountingField(nonlinear, clock=clock)
        EulerMap(field, steps)(x, *ends)
        assert field.tally.rows == [3] * calls


@pytest.mark.parametrize("w", [0.2, 0.5, 0.9])
def test_euler_maps_compose_on_the_grid(w):
    x, jump = noise(4, 2, 2), EulerMap(BASE, 10)
    zero, middle, one = (fixed_times(t, 4) for t in (0.0, w, 1.0))
    torch.testing.assert_close(
        jump(jump(x, zero, middle), middle, one), jump(x, zero, one), rtol=1e-6, atol=1e-6
    )


def test_every_row_of_an_euler_map_has_its_own_times():
    """The longest jump says how many steps all rows take."""
    x, r, t = noise(3, 2, 2), torch.tensor([0.0, 0.3, 0.9]), torch.tensor([0.5, 0.5, 1.0])
    r, t = r.double(), t.double()
    expected, field = x, CountingField(nonlinear)
    for i in range(5):
        expected = expected + ((t - r) / 5)[:, None, None] * nonlinear(expected, r + i * (t - r) / 5)
    torch.testing.assert_close(EulerMap(field, 10)(x, r, t), expected, rtol=1e-6, atol=1e-6)
    assert field.tally.calls == 5


def test_euler_map_converges_to_the_flow_map_of_a_gaussian():
    x, r, t = noise(50, 1, 3), uniform(50) * 0.5, 0.5 + uniform(50, seed=2) * 0.5
    exact = GAUSSIAN.jump(x, r, t)
    torch.testing.assert_close(x + (t - r)[:, None, None] * GAUSSIAN.average_velocity(x, r, t), exact)
    field = qsteer.field(GAUSSIAN.velocity)
    errors = [norms(EulerMap(field, k)(x, r, t) - exact).mean() for k in (50, 100, 200)]
    assert errors[-1] < 0.01
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


def test_euler_map_repeats_observations_and_needs_a_step():
    goals = torch.tensor([-3.0, 5.0], dtype=DOUBLE)[:, None, None]
    field = qsteer.field(lambda x, t, o: o + 0 * x, goals)
    x = noise(6, 2, 2)
    got = EulerMap(field).repeat(3)(x, fixed_times(0.25, 6), fixed_times(0.75, 6))
    torch.testing.assert_close(got, x + 0.5 * goals.repeat_interleave(3, 0))
    with as_installed(), pytest.raises(ValueError, match="EulerMap: expected at least 1 step, got 0"):
        EulerMap(BASE, 0)


# ---------------------------------------------------------------------------------------------------- losses


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


NETWORKS = ["mlp", "transformer"]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()


def features(network: str) -> object:
    """Of three observations."""
    return noise(3, 4, seed=8) if network == "mlp" else (noise(3, 4, 4, seed=8), MASK)


def small(network: str, kind: type = FlowMap, config: type = MapConfig, **more: object) -> torch.nn.Module:
    """A small network in double precision with no parameter at zero."""
    shape = {"horizon": 2, "action_dim": 2, "features": 4, "hidden": (16, 16), "harmonics": 2}
    torch.manual_seed(0)
    out = kind(config(**shape, network=network, width=16, depth=2, heads=2, **more)).double()
    for p in out.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return out


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


# -------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("network", NETWORKS)
def test_bound_maps_jump_by_the_average_velocity_and_keep_observations_apart(network):
    flow_map, x = small(network), noise(3, 2, 2)
    r, t = torch.tensor([[0.1, 0.3, 0.5], [0.9, 0.4, 1.0]], dtype=DOUBLE)
    bound = flow_map.bind(features(network))
    whole = bound(x, r, t)
    u = flow_map.average_velocity(bound.z, x, r, t)
    torch.testing.assert_close(whole, x + (t - r)[:, None, None] * u)
    for b in range(3):
        rows = slice(b, b + 1)
        one = features(network)
        one = one[rows] if network == "mlp" else (one[0][rows], one[1][rows])
        torch.testing.assert_close(flow_map.bind(one)(x[rows], r[rows], t[rows]), whole[rows])
    twice = bound.repeat(2)(*(part.repeat_interleave(2, 0) for part in (x, r, t)))
    torch.testing.assert_close(twice, whole.repeat_interleave(2, 0))


def test_masked_tokens_are_not_seen():
    flow_map, x, one = small("transformer"), noise(3, 2, 2), fixed_times(1.0, 3)
    tokens, mask = features("transformer")
    spoiled = torch.where(mask[..., None], tokens, 100.0)
    got, other = (flow_map.bind((part, mask))(x, 0 * one, one) for part in (tokens, spoiled))
    torch.testing.assert_close(got, other)
    assert norms(flow_map.bind((spoiled, torch.ones_like(mask)))(x, 0 * one, one) - got)[1:].min() > 1e-4


@pytest.mark.parametrize("network", NETWORKS)
def test_a_residual_meta_map_starts_as_glass_and_its_samples_as_the_denoised_action(network):
    meta = small(network, MetaFlowMap, MetaMapConfig)
    meta.net.start_at_zero()
    x, xbar, t, u = noise(3, 2, 2), noise(3, 2, 2, seed=1), uniform(3), uniform(3, seed=2)
    z = meta.net.encode(features(network))
    got = meta.velocity(z, xbar, u, torch.ones_like(u), x, t, glass(BASE, x, t, xbar, u))
    torch.testing.assert_close(got, glass_velocity(BASE, x, t, xbar, u))
    samples = meta.bind(features(network), BASE)(noise(5, 3, 2, 2), x, t)
    expected = qsteer.flow.denoise(x, nonlinear(x, t), t).expand(5, 3, 2, 2)
    torch.testing.assert_close(samples, expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("residual", [True, False])
def test_meta_samples_are_the_jump_from_inner_time_zero_to_one(network, residual):
    meta = small(network, MetaFlowMap, MetaMapConfig, residual=residual)
    x, eps, t = noise(3, 2, 2), noise(5, 3, 2, 2, seed=1), torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)
    posterior = meta.bind(features(network), BASE)
    samples, zero, one = posterior(eps, x, t), fixed_times(0.0, 3), fixed_times(1.0, 3)
    z = meta.net.encode(features(network))
    for sample, xbar in zip(samples, eps, strict=True):
        base = glass(BASE, x, t, xbar, zero) if residual else None
        torch.testing.assert_close(sample, xbar + meta.velocity(z, xbar, zero, one, x, t, base))
    assert (samples.std(0) > 1e-3).all()
    if residual:
        torch.testing.assert_close(posterior.given(nonlinear(x, t), eps, x, t), samples)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_residual_flow_map_starts_as_one_euler_step(network):
    flow_map = small(network, residual=True)
    flow_map.net.start_at_zero()
    x, r, t = noise(3, 2, 2), uniform(3), 1 + uniform(3, seed=2)
    jump = flow_map.bind(features(network), BASE)
    torch.testing.assert_close(jump(x, r, t), x + (t - r)[:, None, None] * nonlinear(x, r))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_residual_flow_map_adds_to_the_policy_of_each_observation(network):
    flow_map, x, shift = small(network, residual=True), noise(3, 2, 2), noise(3, 1, 1, seed=5)
    r, t = uniform(3), 1 + uniform(3, seed=2)
    field = qsteer.field(lambda x, t, c: nonlinear(x, t) + c, context=shift)
    jump = flow_map.bind(features(network), field)
    v, z = nonlinear(x, r) + shift, flow_map.net.encode(features(network))
    whole = x + (t - r)[:, None, None] * (v + flow_map.net(z, (x, v), (r, t)))
    torch.testing.assert_close(jump(x, r, t), whole)
    twice = jump.repeat(2)(*(part.repeat_interleave(2, 0) for part in (x, r, t)))
    torch.testing.assert_close(twice, whole.repeat_interleave(2, 0))


@pytest.mark.parametrize(("kind", "config"), [(MetaFlowMap, MetaMapConfig), (FlowMap, MapConfig)])
def test_a_residual_map_without_a_policy_is_refused(kind, config):
    with pytest.raises(ValueError, match=r"expected the field of the policy.*on\(field\)"):
        small("mlp", kind, config, residual=True).bind(features("mlp"))


# ------------------------------------------------------------------------------------------ maps that learn


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean over 16 directions of W1; a, b of shape (N, B, D)."""
    d = torch.nn.functional.normalize(noise(a.shape[-1], 16, seed=9, dtype=a.dtype), dim=0)
    return ((a @ d).sort(0).values - (b @ d).sort(0).values).abs().mean()


PLANE = Mixture(
    torch.tensor([0.3, 0.4, 0.3]),
    torch.tensor([[[-1.0, 0.5]], [[1.0, 0.5]], [[0.0, -1.0]]]),
    torch.tensor([0.2, 0.2, 0.2]),
)


def test_a_meta_map_distilled_from_the_exact_field_approaches_glass():
    torch.manual_seed(0)
    field = qsteer.field(PLANE.velocity)
    meta = MetaFlowMap(MetaMapConfig(horizon=1, action_dim=2, features=1, hidden=(64, 64), harmonics=2))
    optimiser = torch.optim.Adam(meta.parameters(), 4e-3)
    observed = torch.zeros(256, 1)
    x = qsteer.flow.interpolate(noise(64, 1, 2, dtype=torch.float32), PLANE.draw(64), torch.rand(64) ** 2)
    t, eps = torch.linspace(0.05, 0.7, 64), torch.randn(256, 64, 1, 2)
    truth = GlassPosterior(field, 25)(eps, x, t)[:, :, 0]

    def distance():
        with torch.no_grad():
            samples = meta.bind(observed[:64], field)(torch.randn(256, 64, 1, 2), x, t)
        return float(sliced_wasserstein(samples[:, :, 0], truth))

    before = distance()
    for step in range(300):
        z = meta.net.encode(observed)
        t_, x1 = torch.rand(256) ** 2, PLANE.draw(256, seed=step + 1)
        x_ = qsteer.flow.interpolate(torch.randn(256, 1, 2), x1, t_)
        u, w = torch.rand(256, 2).sort(1).values.unbind(1)

        def velocity(xbar, u, w, z=z, x_=x_, t_=t_):
            return meta.velocity(z, xbar, u, w, x_, t_, glass(field, x_, t_, xbar, u))

        noise_ = torch.randn(256, 1, 2)
        xbar = qsteer.flow.interpolate(noise_, x1, u)
        diagonal = diagonal_loss(velocity, noise_, x1, u, glass_velocity(field, x_, t_, xbar, u))
        consistency = semigroup_loss(velocity, xbar, u, w, u + torch.rand(256) * (w - u))
        loss = (adaptive(diagonal, 0.5) + 0.5 * adaptive(consistency, 1.0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = distance()
    floor = float(sliced_wasserstein(GlassPosterior(field, 25)(torch.randn_like(eps), x, t)[:, :, 0], truth))
    print(f"sliced W1 to GLASS: untrained {before:.3f}, trained {after:.3f}, GLASS again {floor:.3f}")
    assert after < before / 2


def test_a_one_step_flow_map_learns_what_200_euler_steps_do():
    torch.manual_seed(0)
    field = qsteer.field(PLANE.velocity)
    flow_map = FlowMap(MapConfig(horizon=1, action_dim=2, features=1, hidden=(64, 64), harmonics=2))
    optimiser, observed = torch.optim.Adam(flow_map.parameters(), 4e-3), torch.zeros(256, 1)
    x = torch.randn(256, 1, 2)
    truth = qsteer.sample(field, None, x, sampler=qsteer.Euler(200))

    def error():
        with torch.no_grad():
            out = flow_map.bind(observed)(x, torch.zeros(256), torch.ones(256))
        return float(norms(out - truth).square().mean().sqrt())

    def step(progress):
        z = flow_map.net.encode(observed)
        x0, x1 = torch.randn(256, 1, 2), PLANE.draw(256, seed=int(torch.randint(10**6, ())))
        r, t = torch.rand(256, 2).sort(1).values.unbind(1)
        t = r + progress * (t - r)
        xr = qsteer.flow.interpolate(x0, x1, r)
        u = lambda x, r, t: flow_map.average_velocity(z, x, r, t)  # noqa: E731
        loss = diagonal_loss(u, x0, x1, r, PLANE.velocity(xr, r))
        return (loss + progressive_loss(u, xr, r, t, r + torch.rand(256) * (t - r))).mean()

    before = error()
    for i in range(700):
        optimiser.zero_grad()
        step(min(1.0, i / 300)).backward()
        optimiser.step()
    after = error()
    one_euler = float(norms(x + PLANE.velocity(x, torch.zeros(256)) - truth).square().mean().sqrt())
    print(
        f"rms to 200 Euler steps: untrained {before:.3f}, trained {after:.3f}, 1 Euler step {one_euler:.3f}"
    )
    assert after < 0.4 and after < 0.4 * one_euler

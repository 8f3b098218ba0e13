"""Flow maps: the policy's own chain, and learnt ones."""

import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    GAUSSIAN,
    PLANE,
    CountingField,
    Host,
    as_installed,
    fixed_times,
    noise,
    nonlinear,
    norms,
    uniform,
)
from small_maps import NETWORKS, features, small

import qsteer
from qsteer.clock import MIRRORED, PAPER
from qsteer.maps import (
    EulerMap,
    FlowMap,
    MapConfig,
    MetaFlowMap,
    MetaMapConfig,
    diagonal_loss,
    progressive_loss,
)

# --------------------------------------------------------------------------------------------------- EulerMap


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
    with as_installed(), pytest.raises(ValueError, match=r"EulerMap.steps: expected at least 1, got 0"):
        EulerMap(BASE, 0)


# ------------------------------------------------------------------------------------------------ learnt maps


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

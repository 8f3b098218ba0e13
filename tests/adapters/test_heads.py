"""Multi-task DiT and VLA-JEPA beyond the laws: clocks, configurations, critics of what executes first."""

import hosts
import pytest
import torch
from torch import Tensor

import qsteer
from qsteer.adapters import contract_of, host_of
from qsteer.clock import Clock, whole_steps

NORMALISED = {
    "groot": "identity",
    "eo1": "mean_std",
    "xvla": "identity",
    "molmoact2": "quantiles",
    "wall_x": "mean_std",
}


@pytest.mark.parametrize("name", hosts.ALL_HEADS)
def test_the_chain_runs_from_noise_to_action(name):
    """Its last denoised action is the action, and its first what the policy thinks of noise."""
    policy, seen = hosts.build(name), []
    with qsteer.steer(policy, hosts.Target(), sampler=hosts.Spy(seen)):
        action = hosts.chunk(policy, 1)
    field, _, x = seen[0]
    field = field.chain(None)
    for t, dt in field.clock.grid():
        v = field(x, t)
        last, x = (x, t), field.advance(x, v, t, dt)
    first = host_of(policy).begins(policy)
    torch.testing.assert_close(x[:, first : first + action.shape[1], :3], action[..., :3])
    torch.testing.assert_close(qsteer.flow.denoise(last[0], field(*last), last[1]), x, rtol=1e-4, atol=1e-5)
    normalised = NORMALISED.get(name, "min_max")
    assert field.bounds == ((-1.0, 1.0) if normalised == "min_max" else None)
    assert contract_of(policy).action_normalisation == normalised


@pytest.mark.parametrize("steps", [1, 4, 10, 50, 100])
def test_linspace_is_torchs(steps):
    spaced = torch.linspace(0, 1, steps + 1)
    for i, (t, dt) in enumerate(Clock(count="linspace").grid(steps)):
        assert (t, dt) == (spaced[i].item(), (spaced[i + 1] - spaced[i]).item())


def test_a_dits_chunk_is_executed_from_its_last_observation_on():
    """Of two observations: the critic sees steps 1 to 4 of 6, and the push acts there."""
    policy, seen = hosts.build("multi_task_dit"), []
    with qsteer.steer(policy, hosts.Target(), sampler=hosts.Spy(seen)):
        hosts.chunk(policy, 1)
    field, value, x = seen[0]
    assert value.mask[:, 0].tolist() == [0, 1, 1, 1, 1, 0]
    push = qsteer.QGF(1.0, clip=None)(field, value)(x, 0.5) - field(x, 0.5)
    assert push[0].abs().amax(1).gt(0).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "diffusion"}, r"got objective='diffusion'; train it with objective='flow_matching'"),
        ({"integration_method": "rk4"}, r"got integration_method='rk4'; set it to 'euler'"),
        ({"sigma_min": 0.1}, r"got sigma_min=0.1, whose paths do not end at the action"),
    ],
)
def test_a_dit_that_is_no_euler_chain_is_refused(change, message):
    policy = hosts.build("multi_task_dit")
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG):
        for name, value in change.items():
            setattr(policy.config, name, value)
        with pytest.raises(TypeError, match=message):
            hosts.chunk(policy)
    with pytest.raises(TypeError, match=message):
        qsteer.steer(policy, hosts.Target(), hosts.STRONG)


@pytest.mark.parametrize("steps", [1, 3, 10, 32])
def test_evo1_without_a_push_is_itself_bit_for_bit(steps):
    """Of frozen parameters: steering freezes them, and torch's attention then rounds differently."""
    policy = hosts.build("evo1").requires_grad_(False)
    hosts.set_steps(policy, steps)
    base, before = hosts.chunk(policy), dict(vars(policy.model.action_head))
    for method in (qsteer.Euler(), qsteer.Tweedie(0.0), qsteer.QGF(0.0), qsteer.BestOfN(1)):
        with qsteer.steer(policy, hosts.Target(), method):
            assert torch.equal(hosts.chunk(policy), base)
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG):
        assert torch.equal(hosts.chunk(policy), base) == (steps == 1)
    assert torch.equal(hosts.chunk(policy), base)
    assert vars(policy.model.action_head) == before


def test_evo1s_gradient_is_the_true_one(monkeypatch):
    """Against central differences in double precision, through the loop's own function."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    policy, seen = hosts.build("evo1").double(), []
    batch = {key: v.double() if isinstance(v, Tensor) else v for key, v in hosts.observe(policy).items()}
    with qsteer.steer(policy, hosts.Target().double(), sampler=hosts.Spy(seen)):
        hosts.plan(policy, batch)
    field, value, x = seen[0]
    push = qsteer.Tweedie(1.0, scaling="raw", clip=None)(field, value)(x, 0.5) - field(x, 0.5)
    for i, j in ((0, 0), (2, 1), (3, 2)):
        nudge = torch.zeros_like(x)
        nudge[0, i, j] = 1e-5
        up, down = (value(qsteer.flow.denoise(y, field(y, 0.5), 0.5)) for y in (x + nudge, x - nudge))
        torch.testing.assert_close(push[0, i, j], (up - down)[0] / 2e-5, rtol=1e-6, atol=1e-9)
    assert torch.equal(push[..., 3:], torch.zeros_like(push[..., 3:]))


def test_evo1s_candidates_begin_as_its_noise_does():
    """Uniform in [-1, 1], and nothing where the robot has no dimension; each is what it would be alone."""
    policy, seen = hosts.build("evo1"), []
    with qsteer.steer(policy, hosts.Target(), sampler=hosts.Spy(seen)):
        hosts.chunk(policy)
    field, _, noise = seen[0]
    more = field.draws(noise, 200)
    assert more.shape == (2, 200, 6, 5) and more.abs().max() <= 1 and more[..., :3].std() > 0.5
    assert torch.equal(more[..., 3:], torch.zeros_like(more[..., 3:]))
    x = more[:, :3].flatten(0, 1)
    alone = torch.stack([field(x.unflatten(0, (2, 3))[:, i], 0.3) for i in range(3)], 1).flatten(0, 1)
    torch.testing.assert_close(field.repeat(3)(x, 0.3), alone)
    torch.testing.assert_close(field.repeat(3)(x, torch.full((6,), 0.3)), alone)


@pytest.mark.parametrize("count", [999, 1000])
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 32, 50, 100])
def test_tables_of_times_are_read_as_the_loops_do(steps, count):
    t = torch.tensor([i / steps for i in range(steps)], dtype=torch.float32)
    assert whole_steps(t, count).tolist() == [int(i / steps * count) for i in range(steps)]


def test_evo1s_own_chunking_is_refused():
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = hosts.build("evo1")
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG):
        policy.config.rtc_config = RTCConfig()
        with pytest.raises(RuntimeError, match="expected real-time chunking to be off"):
            hosts.chunk(policy)


def test_groots_own_chunking_is_refused():
    policy = hosts.build("groot")
    given = {"inference_delay": 1, "prev_chunk_left_over": torch.ones(1, 4, 3)}
    batch = hosts.observe(policy)
    base = policy.predict_action_chunk(batch, **given)
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG):
        with pytest.raises(RuntimeError, match="expected no former chunk, got prev_chunk_left_over"):
            policy.predict_action_chunk(batch, **given)
    assert policy.predict_action_chunk(batch, **given).shape == base.shape


@pytest.mark.parametrize("name", hosts.ALL_HEADS)
def test_select_action_is_steered(name):
    policy = hosts.build(name)

    def first() -> Tensor:
        torch.manual_seed(0)
        policy.reset()
        return policy.select_action(hosts.observe(policy, 2))

    base = first()
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG):
        assert not torch.equal(first(), base)
    assert torch.equal(first(), base)

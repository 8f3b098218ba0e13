"""Multi-task DiT and VLA-JEPA beyond the laws: clocks, configurations, critics of what executes first."""

import hosts
import pytest
import torch
from torch import Tensor

import qsteer
from qsteer.adapters import contract_of, host_of
from qsteer.clock import Clock


@pytest.mark.parametrize("name", hosts.HEADS)
def test_the_chain_runs_from_noise_to_action(name):
    """Its last denoised action is the action, and its first what the policy thinks of noise."""
    policy, seen = hosts.build(name), []
    with qsteer.steer(policy, hosts.Target(), sampler=hosts.Spy(seen)):
        action = hosts.chunk(policy, 1)
    field, _, x = seen[0]
    for t, dt in field.clock.grid():
        last, x = (x, t), x + dt * field(x, t)
    first = host_of(policy).begins(policy)
    torch.testing.assert_close(x[:, first : first + action.shape[1], :3], action)
    torch.testing.assert_close(qsteer.flow.denoise(last[0], field(*last), last[1]), x, rtol=1e-4, atol=1e-5)
    assert field.bounds == (None if name == "groot" else (-1.0, 1.0))
    assert contract_of(policy).action_normalisation == ("identity" if name == "groot" else "min_max")


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


def test_groots_own_chunking_is_refused():
    policy = hosts.build("groot")
    given = {"inference_delay": 1, "prev_chunk_left_over": torch.ones(1, 4, 3)}
    batch = hosts.observe(policy)
    base = policy.predict_action_chunk(batch, **given)
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG):
        with pytest.raises(RuntimeError, match="expected no former chunk, got prev_chunk_left_over"):
            policy.predict_action_chunk(batch, **given)
    assert policy.predict_action_chunk(batch, **given).shape == base.shape


@pytest.mark.parametrize("name", hosts.HEADS)
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

"""Critics of a steered host: what they are bound to, and which entries they see."""

from dataclasses import replace
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from hosts import STRONG, chunk
from torch import nn

import qsteer
from qsteer.critics import Critic, CriticConfig
from qsteer.steering.handle import steer


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_critic_of_qsteers(policy: nn.Module):
    torch.manual_seed(0)
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(32, 32)))
    base = chunk(policy)
    value = critic.bind(hosts.observe(policy, 2))
    with steer(policy, critic, STRONG) as handle:
        assert (value(chunk(policy)[:, :4]) > value(base[:, :4])).all()
        handle.swap(rule=None, sampler=qsteer.BestOfN(4))
        assert (value(chunk(policy)[:, :4]) >= value(base[:, :4]) - 1e-5).all()


def test_a_critic_that_sees_fewer_steps(policy: nn.Module):
    seen: list = []
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=2, hidden=(32,)))
    with steer(policy, critic, STRONG, sampler=hosts.Spy(seen)):
        chunk(policy)
    mask = seen[0][1].mask
    assert mask.sum() == 2 * 3
    assert mask[:2, :3].all()


def test_a_mask_of_the_values_own_is_kept(policy: nn.Module):
    seen: list = []

    class Gripper(hosts.Target):
        def bind(self, obs: Any) -> qsteer.Value:
            return replace(super().bind(obs), mask=torch.tensor([[0.0, 0.0, 1.0]]).expand(4, 3))

    with steer(policy, Gripper(), STRONG, sampler=hosts.Spy(seen)):
        chunk(policy)
    assert seen[0][1].mask.nonzero().tolist() == [[h, 2] for h in range(4)]


def test_critic_inputs_translate_the_batch(policy: nn.Module):
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, observation_key="mine"))
    with steer(policy, critic, STRONG), pytest.raises(KeyError, match="mine") as error:
        chunk(policy)
    assert "critic_inputs" in error.value.__notes__[0]
    assert "observation.state" in error.value.__notes__[0]
    with steer(policy, critic, STRONG, critic_inputs=lambda batch: {"mine": batch["observation.state"]}):
        translated = chunk(policy)
    with steer(policy, Critic(replace(critic.config, observation_key="observation.state")), STRONG) as handle:
        handle.critic.load_state_dict(critic.state_dict())
        assert torch.equal(chunk(policy), translated)


def test_a_bind_that_returns_no_value(policy: nn.Module):
    class Scorer:
        def bind(self, obs: Any) -> Any:
            return lambda a: a.flatten(1).sum(1)

    with as_installed(), steer(policy, Scorer(), STRONG):
        with pytest.raises(TypeError, match=r"critic.bind: expected a Value, got function.*qsteer.value"):
            chunk(policy)

"""A steered host gives its critic what it made of the observation: once per action, beside other inputs."""

from collections.abc import Iterator

import hosts
import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.critics import FEATURES, Critic, CriticConfig, pooled

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
SIZE = 16


@pytest.fixture(params=hosts.LEROBOT)
def policy(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    policy = hosts.shared(request.param)
    hosts.set_steps(policy, 3)
    yield policy
    qsteer.unsteer(policy)


def spied(policy: nn.Module) -> Tensor:
    """The policy's pooled features of ``observe(policy, 2)``."""
    seen: list = []
    with qsteer.steer(policy, hosts.Target(), sampler=hosts.Spy(seen)):
        action(policy)
    return pooled(seen[0][0].features)


def action(policy: nn.Module) -> Tensor:
    return policy.predict_action_chunk(hosts.observe(policy, 2), noise=hosts.draw(policy, 2))


class Listening(Critic):
    """A critic that remembers what it was bound to, and may be deaf to the policy's features."""

    deaf = False

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        self.heard = obs
        return super().bind(obs | {FEATURES: torch.zeros_like(obs[FEATURES])} if self.deaf else obs)


def listening(features: Tensor, **changes: object) -> Listening:
    torch.manual_seed(0)
    shape = dict(obs_dim=4, action_dim=3, horizon=4, hidden=(16,), features=features.shape[1])
    return Listening(CriticConfig(**shape | changes))


def test_a_host_gives_its_features_once_per_action(
    policy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, base = spied(policy), action(policy)
    assert features.shape[0] == 2 and (features[0] - features[1]).abs().max() > 1e-3
    critic, calls = listening(features), []
    monkeypatch.setattr("qsteer.steering.opening.pooled", lambda given: calls.append(1) or pooled(given))
    with qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.5)):
        steered = action(policy)
        critic.deaf = True
        deaf = action(policy)
    assert len(calls) == 2, "two actions of three steps"
    assert torch.equal(critic.heard[FEATURES], features)
    assert critic.heard[STATE].shape == (2, 4)
    assert not torch.equal(steered, base) and not torch.equal(steered, deaf)


def test_views_of_the_hosts_own_batch_steer_it(policy: nn.Module) -> None:
    critic = listening(spied(policy), obs_dim=0, views=(TOP,), view_size=SIZE, channels=4)
    base = action(policy)
    with qsteer.steer(policy, critic, qsteer.QGF(weight=0.5)):
        assert not torch.equal(action(policy), base)


@pytest.mark.parametrize("alone", [False, True])
def test_features_go_with_what_critic_inputs_make(policy: nn.Module, alone: bool) -> None:
    def inputs(batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return batch[STATE] * 2 if alone else {"mine": batch[STATE] * 2}

    features = spied(policy)
    critic = listening(features, observation_key=STATE if alone else "mine")
    with qsteer.steer(policy, critic, qsteer.QGF(weight=0.5), critic_inputs=inputs):
        action(policy)
    assert critic.heard.keys() == {critic.config.observation_key, FEATURES}
    assert torch.equal(critic.heard[FEATURES], features)


def test_features_of_another_width_or_none_at_all(policy: nn.Module) -> None:
    width = spied(policy).shape[1]
    wrong = listening(torch.zeros(1, width + 1))
    with (
        qsteer.steer(policy, wrong, qsteer.Tweedie()),
        pytest.raises(ValueError, match=rf"\(B, {width + 1}\), got \(2, {width}\).*CriticConfig.features"),
    ):
        action(policy)
    plain = hosts.build("plain")
    with (
        qsteer.steer(plain, wrong, qsteer.Tweedie()),
        pytest.raises(ValueError, match=r"policy's features: expected.*got dict.*PlainPolicy offers its obs"),
    ):
        action(plain)


def test_a_plain_policys_features_are_its_observation() -> None:
    policy = PlainPolicy(lambda x, t, obs: obs[:, :3].mean(1)[:, None, None] - x, horizon=4, action_dim=3)
    obs, noise = torch.randn(2, 4), torch.randn(2, 4, 3)
    critic = listening(obs)
    with qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.5)):
        policy.predict_action_chunk(obs, noise=noise)
    assert torch.equal(critic.heard[FEATURES], obs) and torch.equal(critic.heard[STATE], obs)

"""Policies opened to learn: new critics of their shapes; what is kept of a decision is what was executed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from robots import STATE, requests_of, same

from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.critics.encoders import FEATURES
from qsteer.online.settings import OnlineTraining
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.serving import RobotLearning, open_served
from qsteer.serving.learning import ENDLESS
from qsteer.training.critic import CriticTraining

ROOT = Path(__file__).parents[2]
VLA = ROOT / "examples/checkpoints/metaworld"
LEARNS = CriticTraining(target="sarsa", hidden=(16,), members=3)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"obs_dim": 6, "action_dim": 3, "horizon": 4, "hidden": (8,)}
    FlowPolicy(FlowPolicyConfig(**shape)).save_pretrained(tmp_path / "policy")
    Critic(CriticConfig(**shape)).save_pretrained(tmp_path / "critic")
    return tmp_path / "policy"


def training(horizon: int) -> OnlineTraining:
    return OnlineTraining(
        critic=CriticTraining(target="sarsa", horizon=horizon),
        env_steps=ENDLESS,
        num_envs=2,
        row=horizon,
        capacity=100,
        evaluate_every=0,
    )


def test_a_new_critic_of_a_small_policy(policy: Path, tmp_path: Path) -> None:
    served = open_served(policy, None, "tweedie=0.2", learns=LEARNS)
    config = served.live.config
    assert (config.obs_dim, config.action_dim, config.horizon, config.members) == (6, 3, 4, 3)
    RobotLearning(served, tmp_path / "run", training(4)).close()
    again = open_served(policy, tmp_path / "run" / "last", "tweedie=0.2", learns=LEARNS)
    assert again.live.config.contract.discount == 0.99  # goes on with what was learnt


def test_a_critic_that_is_given_learns_on(policy: Path) -> None:
    learns = open_served(policy, policy.parent / "critic", "tweedie=0.2", learns=LEARNS)
    stays = open_served(policy, policy.parent / "critic", "tweedie=0.2")
    assert isinstance(learns.live, LiveCritic) and stays.live is None
    for a, b in zip(learns.act(requests_of(learns, 2)), stays.act(requests_of(stays, 2)), strict=True):
        same(a._replace(seen=None), b, bits=True)


def test_misuse(policy: Path) -> None:
    with pytest.raises(ValueError, match="critic: expected one, got none"):
        open_served(policy, None, "base")
    with pytest.raises(ValueError, match="features: expected none of a policy of states"):
        open_served(policy, None, "base", learns=LEARNS, features=True)


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_a_new_critic_of_a_vla(features: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lerobot")
    monkeypatch.chdir(ROOT)
    served = open_served(VLA / "policy", None, "tweedie=0.2", learns=LEARNS, features=features)
    config = served.live.config
    assert config.horizon == served.interface.horizon and (config.features > 0) == features
    for decision in served.act(requests_of(served, 2, twin=True)):
        assert decision.seen is not None and not np.array_equal(decision.actions, decision.unsteered_actions)
        observation, actions = decision.seen
        assert observation[STATE].shape == (1, config.obs_dim) and ((FEATURES in observation) == features)
        steps = [served.postprocess(step) for step in actions.unbind(1)]
        assert np.array_equal(torch.stack(steps, 1)[0].float().numpy(), decision.actions)
    settings = training(config.horizon)
    RobotLearning(served, tmp_path, settings).close()

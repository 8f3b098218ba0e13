"""Robots of a toy task that a server learns from: five steps, two a reply, so that the last is cut short."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bandit import Bandit

import qsteer
from qsteer.critics import LiveCritic
from qsteer.online.settings import OnlineTraining
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.serving import Input, Interface, RobotLearning, ServedStates
from qsteer.serving.learning import ENDLESS
from qsteer.serving.options import OWN
from qsteer.training.critic import CriticTraining, fresh_critic

STATE = "observation.state"
RULE = qsteer.QGF(weight=0.3, scaling="match_norm")
STEPS = 2
CRITIC = CriticTraining(
    target="sarsa", horizon=STEPS, gamma=0.9, ema=0.1, hidden=(32,), members=3, learning_rate=1e-2,
    batch_size=64,
)  # fmt: skip
TRAINING = OnlineTraining(
    critic=CRITIC, env_steps=ENDLESS, num_envs=2, row=STEPS, warmup=120, evaluate_every=0, log_every=100,
    checkpoint_every=100, capacity=4000,
)  # fmt: skip


class Walk(Bandit):
    """Five steps; every other episode is cut by a time limit; one near the goal is a success."""

    steps = 5
    episodes = 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.episodes += 1
        return super().reset(**options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, over, _, _ = super().step(action)
        limit = over and self.episodes % 2 == 0
        return obs, reward, over and not limit, limit, {"success": reward > -0.02}


def served(learns: bool = True, **options: Any) -> ServedStates:
    """An untrained policy: its actions are hardly more than the noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = FlowPolicy(FlowPolicyConfig(2, 1, STEPS, (8,))).requires_grad_(False)
    critic = fresh_critic(CRITIC.critic_config(2, 1), [0]).requires_grad_(False)
    interface = Interface({STATE: Input("numbers", (2,))}, {}, STEPS, 1)
    judge = LiveCritic(critic) if learns else critic
    return ServedStates(policy, judge, RULE, qsteer.Euler(clip="policy"), interface, **options)


def learning(out: Path, training: OnlineTraining = TRAINING, **options: Any) -> RobotLearning:
    """What learns from robots of such a policy."""
    return RobotLearning(served(), out, training, **options)


class Robot:
    """Makes the messages of a robot in its environment, and executes replies.

    Args:
        seeds: of its episodes; None: those of 0, 1, ...
    """

    def __init__(self, name: str = "", seeds: Any = None) -> None:
        self.env, self.name = Walk(), name
        self.seeds = itertools.count() if seeds is None else iter(seeds)
        self.count, self.over, self.told = 0, True, {}

    def ask(self, **own: Any) -> dict[str, Any]:
        """The next request, with what came of the last reply."""
        if self.over:
            self.obs, self.over = self.env.reset(seed=int(next(self.seeds)))[0], False
            self.count += 1
        message = {STATE: self.obs.astype(np.float32), OWN: {"episode": self.episode} | self.told | own}
        self.told = {}
        return message

    @property
    def episode(self) -> str:
        return f"{self.name}-{self.count}"

    def execute(self, actions: np.ndarray) -> dict[str, Any] | None:
        """Act; the message that ends the episode, if it ended."""
        rewards, success = [], False
        for action in actions:
            self.obs, reward, done, truncated, info = self.env.step(action.clip(-1, 1))
            rewards.append(reward)
            success |= bool(info["success"])
            if done or truncated:
                break
        self.told = {"rewards": rewards, "success": success}
        if not (done or truncated):
            return None
        told, self.told, self.over = self.told, {}, True
        return {OWN: {"episode": self.episode, **told, "done": done, "truncated": truncated}}

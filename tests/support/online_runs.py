"""Short online runs on a toy task: three steps, one near the goal is a success."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bandit import ThreeSteps

import qsteer
from qsteer.critics import Critic, LiveCritic
from qsteer.data import Episodes
from qsteer.online.actors import StateActor
from qsteer.online.run import train_online
from qsteer.online.settings import OnlineTraining
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training.critic import CriticTraining, fresh_critic

GOAL = 0.6
RULE = qsteer.QGF(weight=0.3, scaling="match_norm")
CRITIC = CriticTraining(
    target="sarsa", horizon=1, gamma=0.9, ema=0.1, hidden=(32,), members=3, learning_rate=1e-2, batch_size=64
)
TRAINING = OnlineTraining(
    critic=CRITIC, env_steps=400, num_envs=4, warmup=100, evaluate_every=200, episodes=20, log_every=50,
    checkpoint_every=100,
)  # fmt: skip
KILL = replace(TRAINING, env_steps=600, warmup=40, evaluate_every=0, log_every=40, checkpoint_every=40)
"""For a run that is killed again and again."""


def policy(seed: int = 0, horizon: int = 1) -> FlowPolicy:
    """An untrained policy: its actions are hardly more than the noise."""
    torch.manual_seed(seed)
    return FlowPolicy(FlowPolicyConfig(2, 1, horizon, (8,))).requires_grad_(False)


def parts(seeds: int = 1, settings: CriticTraining = CRITIC) -> tuple[StateActor, LiveCritic]:
    live = LiveCritic(fresh_critic(settings.critic_config(2, 1), range(seeds)))
    return StateActor([policy()], live), live


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def run(out: Path, training: OnlineTraining = TRAINING, seeds: int = 1, **options: Any) -> Critic:
    actor, live = parts(seeds, training.critic)
    options = {"rule": RULE, "make_env": ThreeSteps} | options
    make_env = options.pop("make_env")
    return train_online(make_env, actor, live, out, training, progress=False, **options)


def offline() -> Episodes:
    g = torch.Generator().manual_seed(0)
    actions = torch.rand(30, 1, generator=g)
    return Episodes(
        observations=torch.randn(30, 2, generator=g),
        next_observations=torch.randn(30, 2, generator=g),
        actions=actions,
        rewards=-(actions[:, 0] - GOAL).square(),
        terminals=torch.arange(30) % 3 == 2,
        ends=torch.arange(30) % 3 == 2,
    )

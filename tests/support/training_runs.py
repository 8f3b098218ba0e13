"""Short training runs of policies and critics, and a way to interrupt them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from play_data import H
from torch import Tensor

from qsteer.critics import Critic
from qsteer.data import Episodes
from qsteer.policies import FlowPolicy
from qsteer.training import CriticTraining, PolicyTraining, train_critic, train_policy
from qsteer.training.critic import ACTING, LEARNERS
from qsteer.training.policy import FlowMatching

POLICY = PolicyTraining(steps=12, batch_size=8, horizon=H, hidden=(8,), log_every=2, checkpoint_every=5)
CRITIC = CriticTraining(
    steps=12, batch_size=8, horizon=H, hidden=(8,), log_every=2, checkpoint_every=5, members=3, ema=0.1
)


def act(critic: Critic, obs: Tensor, noise: Tensor) -> Tensor:
    return noise.clamp(-1, 1)


def train(what: str, data: Episodes, out: Path) -> FlowPolicy | Critic:
    if what == "policy":
        return train_policy(data, out, POLICY, progress=False)
    settings = replace(CRITIC, target=what)
    return train_critic(data, out, settings, act=act if what in ACTING else None, progress=False)


def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Make the learner's ``calls + 1``-th loss raise, as a signal would."""
    learner, count = FlowMatching if what == "policy" else LEARNERS[what], 0
    loss = learner.loss

    def counted(self: object, generator: torch.Generator) -> object:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return loss(self, generator)

    monkeypatch.setattr(learner, "loss", counted)

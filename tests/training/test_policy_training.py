"""Behaviour cloning: the loss has its solution where it should, and the policy comes back from its file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from play_data import A, H, S, episodes
from torch import Tensor
from training_runs import train

from qsteer.data import Chunks
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training.policy import FlowMatching


class Exact(FlowPolicy):
    """The velocity of a policy that always does ``action``."""

    def __init__(self, action: float, sign: float) -> None:
        super().__init__(FlowPolicyConfig(S, A, H))
        self.action, self.sign = action, sign

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.sign * (self.action - x) / (1 - t)[:, None, None]


def test_flow_matching_is_solved_by_the_velocity_from_noise_to_action() -> None:
    data = replace(episodes(), actions=torch.full((40, A), 0.3))
    chunks = Chunks(data, H, 1.0, "actions")
    losses = [
        FlowMatching(Exact(0.3, sign), chunks, 64).loss(torch.Generator().manual_seed(0))[0]
        for sign in (1.0, -1.0)
    ]
    assert losses[0].item() < 1e-6
    assert losses[1].item() > 1


def test_a_policy_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    policy = train("policy", episodes(), tmp_path)
    again = FlowPolicy.from_pretrained(tmp_path)
    assert again.config == policy.config == FlowPolicyConfig(S, A, H, (8,), layer_norm=True)
    obs, x, t = torch.randn(4, S), torch.randn(4, H, A), torch.rand(4)
    assert torch.equal(again(obs, x, t), policy(obs, x, t))
    with pytest.raises(ValueError, match=r"\(B, 3\), got \(4, 5\)"):
        policy.field(torch.zeros(4, 5))

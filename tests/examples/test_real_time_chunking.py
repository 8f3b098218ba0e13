import json
import sys

import pytest
import torch

pytest.importorskip("ogbench")

import real_time_chunking

from qsteer.critics import Critic, CriticConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig


def test_the_study_of_one_delay(tmp_path, monkeypatch):
    """On untrained networks: the robot waits for its first chunk, and a held one has a smaller seam."""
    torch.manual_seed(0)
    FlowPolicy(FlowPolicyConfig(4, 2, 10, (8, 8))).save_pretrained(tmp_path / "policy")
    Critic(CriticConfig(4, 2, 10, (8, 8), 2)).save_pretrained(tmp_path / "critic")
    monkeypatch.setattr(real_time_chunking.ogbench, "make", Short)
    out = tmp_path / "out.json"
    options = f"--task pointmaze-medium --arms base tweedie=0.3 --delays 2 --episodes 2 --runs {tmp_path}"
    options += f" --out {out}"
    monkeypatch.setattr(sys, "argv", ["real_time_chunking.py", *options.split()])
    real_time_chunking.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["arm"], row["chunking"]) for row in rows] == [
        ("base", False),
        ("base", True),
        ("tweedie=0.3", False),
        ("tweedie=0.3", True),
    ]
    assert all(row["episodes"] == 2 and row["seam"] > 0 for row in rows)
    assert rows[1]["seam"] < rows[0]["seam"]


class Short:
    """20 steps in a plane."""

    def __init__(self, name: str) -> None:
        self.steps = 0

    def reset(self, seed: int):
        self.state = torch.randn(4, generator=torch.Generator().manual_seed(seed)).numpy()
        return self.state, {}

    def step(self, action):
        assert action.shape == (2,)
        self.steps += 1
        self.state = self.state * 0.9
        return self.state, 0.0, False, self.steps >= 20, {"success": False}

    def close(self) -> None:
        pass

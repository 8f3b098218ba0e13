"""Batches of the tiny pretrained policies with actions and prompts, as a teacher is given them."""

from typing import Any

import hosts
import torch
from torch import nn

H, A = 6, 5
SMALL = {"width": 16, "depth": 2, "heads": 2, "harmonics": 2}
"""Of the networks of maps."""


def batch(policy: nn.Module, rows: int, seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return hosts.observe(policy, rows, seed) | {
        "action": torch.randn(rows, H, 3, generator=draw),
        "task": ["put it there"] * rows,
    }

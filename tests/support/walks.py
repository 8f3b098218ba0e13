"""A toy environment of rollouts, an agent that acts in it, and their episodes one action at a time."""

import torch
from torch import Tensor
from walk import A

H = 3
SEED = 0  # chunks end full, and with one and with two actions; some episodes succeed


def follow(obs: Tensor, noise: Tensor) -> Tensor:
    """Depends on the observation, on each entry of the noise, and on no other row; within the bounds."""
    return torch.tanh(noise + 0.3 * obs[:, None, :A])

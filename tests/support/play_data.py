"""Random episodes of a small size, for tests of training."""

import torch

from qsteer.data import Episodes

S, A, H = 3, 2, 2


def episodes(seed: int = 0, rows: int = 40, length: int = 10) -> Episodes:
    g = torch.Generator().manual_seed(seed)
    ends = torch.arange(rows) % length == length - 1
    return Episodes(
        observations=torch.randn(rows, S, generator=g),
        next_observations=torch.randn(rows, S, generator=g),
        actions=torch.rand(rows, A, generator=g) * 2 - 1,
        rewards=-torch.ones(rows),
        terminals=ends & (torch.rand(rows, generator=g) < 0.5),
        ends=ends,
    )

"""GLASS on lerobot's own code."""

from collections.abc import Iterator

import hosts
import pytest
import torch
from map_hosts import lend, opened
from torch import nn

from qsteer.maps import GlassPosterior


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(name: str) -> Iterator[nn.Module]:
    yield from lend(name)


def test_glass_samples_are_single_runs(policy: nn.Module):
    """N rows on a repeated context equal N runs alone, each on its own observation."""
    field, _, x = opened(policy)
    eps, t = torch.randn(3, *x.shape), torch.tensor([0.3, 0.7], dtype=torch.float64)
    with torch.no_grad():
        together = GlassPosterior(field)(eps, x, t)
        known = GlassPosterior(field).given(field(x, t), eps, x, t)
        alone = torch.cat([GlassPosterior(field)(eps[n : n + 1], x, t) for n in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-6)
    torch.testing.assert_close(together, known, rtol=0, atol=5e-6)
    assert not torch.allclose(together[0], together[1])

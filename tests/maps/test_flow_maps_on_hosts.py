"""Maps on lerobot's own code: the host's chain, rows, and features."""

from collections.abc import Iterator
from dataclasses import replace

import hosts
import pytest
import torch
from fields import as_installed
from map_hosts import chunk, flow_map, lend, meta_map, opened
from torch import nn

from qsteer.maps import EulerMap


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(name: str) -> Iterator[nn.Module]:
    yield from lend(name)


def test_the_euler_map_is_the_hosts_chain_bit_for_bit(policy: nn.Module):
    times = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for steps in (3, 7, 10):
        hosts.set_steps(policy, steps)
        base = chunk(policy)
        field, _, noise = opened(policy)
        with torch.no_grad():
            assert torch.equal(EulerMap(field)(noise, *times)[..., : base.shape[-1]], base)
            three = noise.repeat_interleave(3, 0)
            rows = EulerMap(field).repeat(3)(three, *(t.repeat_interleave(3) for t in times))
        torch.testing.assert_close(rows[::3, :, : base.shape[-1]], base, rtol=0, atol=2e-6)


def test_rows_belong_to_their_observation(policy: nn.Module, name: str):
    """A batch of two gives what each gives alone; rows b*k .. b*k+k-1 of a repetition are observation b's."""
    batch = hosts.observe(policy, 2)
    x, t = hosts.draw(policy, 2), torch.tensor([0.3, 0.6], dtype=torch.float64)
    eps = torch.randn(3, *x.shape)
    both = opened(policy, batch)[0]
    single = [opened(policy, {k: v[b : b + 1] for k, v in batch.items()})[0] for b in range(2)]
    meta, jump = meta_map(name), flow_map(name)
    with torch.no_grad():
        samples = meta.on(both)(eps, x, t)
        alone = torch.cat([meta.on(f)(eps[:, [b]], x[[b]], t[[b]]) for b, f in enumerate(single)], 1)
        torch.testing.assert_close(samples, alone, rtol=0, atol=1e-5)
        swapped = meta.on(single[0])(eps[:, [1]], x[[1]], t[[1]])
        assert not torch.allclose(swapped, alone[:, [1]], rtol=0, atol=1e-3), "the observation matters"

        k_x, k_t = eps.transpose(0, 1).flatten(0, 1), t.repeat_interleave(3)
        alone = torch.cat(
            [
                jump.on(f).repeat(3)(k_x[3 * b : 3 * b + 3], *[k_t[3 * b : 3 * b + 3], torch.ones(3)])
                for b, f in enumerate(single)
            ]
        )
        for repeated in (jump.on(both).repeat(3), jump.on(both.repeat(3))):
            torch.testing.assert_close(repeated(k_x, k_t, torch.ones(6)), alone, rtol=0, atol=1e-5)


def test_features_that_no_map_can_read_are_refused():
    field, _, _ = opened(hosts.shared("plain"))
    with as_installed(), pytest.raises(ValueError, match=r"got HostField with dict.*Host.features"):
        meta_map("plain").on(field)
    mute = replace(field, host=replace(field.host, features=None))
    with as_installed(), pytest.raises(ValueError, match=r"got HostField without.*Host.features"):
        meta_map("plain").on(mute)

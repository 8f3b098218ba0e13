"""What learnt maps see of lerobot's hosts."""

from collections.abc import Iterator

import hosts
import pytest
import torch
from map_hosts import SIZES, lend, meta_map, opened
from torch import Tensor, nn


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(name: str) -> Iterator[nn.Module]:
    yield from lend(name)


def test_features_have_their_shapes(policy: nn.Module, name: str):
    features = opened(policy)[0].features
    if name == "plain":
        assert torch.equal(features, hosts.observe(policy, 2)["observation.state"])
        return
    tokens, mask = features
    assert tokens.shape == (2, *SIZES[name])
    assert mask.shape == tokens.shape[:2]
    assert mask.dtype == torch.bool
    assert mask.all()
    assert not tokens.requires_grad
    assert (tokens.flatten(0, 1).std(0) > 0.01).any()


def test_features_tell_observations_apart(policy: nn.Module, name: str):
    """Each part of the observation that the velocity follows, the learnt map can follow too."""
    batch = hosts.observe(policy, 2)
    idle = {"observation.state"} if name == "pi05" else set()  # pi0.5 reads the state as text
    x, t = hosts.draw(policy, 2), torch.full((2,), 0.5)
    eps, meta = x[None], meta_map(name, residual=False)
    with torch.no_grad():
        base = meta.on(opened(policy, batch)[0])(eps, x, t)
        for key in batch.keys() - {"observation.language.attention_mask"}:
            other = meta.on(opened(policy, batch | {key: batch[key].flip(0)})[0])(eps, x, t)
            assert torch.equal(other, base) == (key in idle), key


@pytest.mark.parametrize("name", ["pi0", "smolvla"])
def test_features_keep_the_scale_of_the_state(policy: nn.Module, name: str):
    batch = hosts.observe(policy, 2)
    batch["observation.state"][1] = 2 * batch["observation.state"][0]
    for key in batch.keys() - {"observation.state"}:
        batch[key][1] = batch[key][0]
    x, t = hosts.draw(policy, 1).expand(2, -1, -1), torch.full((2,), 0.5)
    with torch.no_grad():
        a, b = meta_map(name, residual=False).on(opened(policy, batch)[0])(x[None], x, t)[0]
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_padding_is_not_read(policy: nn.Module, name: str):
    batch = hosts.observe(policy, 2)
    words, present = "observation.language.tokens", "observation.language.attention_mask"
    batch[present][:, -2:] = False
    x, t = hosts.draw(policy, 2), torch.full((2,), 0.5)
    meta = meta_map(name, residual=False)

    def samples(word: int | None) -> Tensor:
        tokens = batch[words].clone()
        if word is not None:
            tokens[:, word] = (tokens[:, word] + 1) % 64
        field = opened(policy, batch | {words: tokens})[0]
        tokens, mask = field.features
        assert (~mask).sum(1).tolist() == [2, 2]
        with torch.no_grad():
            return meta.on(field)(x[None], x, t)

    base = samples(None)
    torch.testing.assert_close(samples(-1), base, rtol=0, atol=1e-6)
    assert not torch.allclose(samples(0), base, rtol=0, atol=1e-3)

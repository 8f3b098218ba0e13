"""Encoders: DrQ's network, its random shift, and the pooling of a policy's tokens."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qsteer.critics import Critic, CriticConfig, pooled
from qsteer.critics.encoders import shift_randomly

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"


def test_the_default_encoder_is_drqs() -> None:
    critic = Critic(CriticConfig(obs_dim=0, action_dim=1, horizon=1, views=(TOP,)))
    (encoder,) = critic.views
    assert [tuple(layer.weight.shape) for layer in encoder.layers] == [(32, 3, 3, 3)] + [(32, 32, 3, 3)] * 3
    assert [layer.stride for layer in encoder.layers] == [(2, 2), (1, 1), (1, 1), (1, 1)]
    assert encoder.trunk[0].weight.shape == (50, 32 * 25**2)  # 64 -> 31 -> 29 -> 27 -> 25
    image = torch.rand(2, 3, 64, 64)
    h = image - 0.5
    for layer in encoder.layers:
        h = F.relu(F.conv2d(h, layer.weight, layer.bias, layer.stride))
    linear = encoder.trunk[0]
    expected = torch.tanh(F.layer_norm(F.linear(h.flatten(1), linear.weight, linear.bias), (50,)))
    torch.testing.assert_close(critic.context({TOP: image}), expected)
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(50), atol=1e-4, rtol=0)


def crops(view: Tensor, pixels: int) -> Tensor:
    """All shifts of a view, made by hand: (2p+1, 2p+1, C, s, s)."""
    padded, size = F.pad(view[None], (pixels,) * 4, mode="replicate")[0], view.shape[-1]
    span = range(2 * pixels + 1)
    return torch.stack([torch.stack([padded[:, y : y + size, x : x + size] for x in span]) for y in span])


def test_a_random_shift_is_a_crop_of_the_replicated_image() -> None:
    view, found = torch.rand(400, 3, 8, 8), []
    shifted = shift_randomly(view, 2, torch.Generator().manual_seed(0))
    for before, after in zip(view, shifted, strict=True):
        hits = (crops(before, 2) == after).flatten(2).all(2).nonzero().tolist()
        assert len(hits) == 1
        found.append(tuple(hits[0]))
    counts = torch.tensor([found.count((y, x)) for y in range(5) for x in range(5)])
    assert counts.min() > 3, "every shift occurs, rows and columns independently"
    assert ((counts - 16) ** 2 / 16).sum() < 51  # chi-square of 24, p = 0.001


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_tokens_are_averaged_where_they_are(dtype: torch.dtype) -> None:
    tokens, mask = torch.randn(3, 5, 2), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0] * 5]).to(dtype)
    tokens[mask == 0] = torch.nan
    out = pooled((tokens, mask))
    torch.testing.assert_close(out[0], tokens[0, :2].mean(0))
    torch.testing.assert_close(out[1], tokens[1, [1, 3, 4]].mean(0))
    assert torch.equal(out[2], torch.zeros(2))


def test_pooling_is_done_in_single_precision_and_leaves_vectors_alone() -> None:
    tokens = (100 + torch.rand(1, 1000, 2)).bfloat16()
    out = pooled([tokens, torch.ones(1, 1000)])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, tokens.double().mean(1).float())
    assert pooled(tokens[0]) is not None and torch.equal(pooled(tokens[0]), tokens[0])


@pytest.mark.parametrize(
    ("features", "got"),
    [
        (None, "NoneType"),
        ({"a": torch.zeros(2, 3)}, "dict"),
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 4)), r"\[\(2, 3, 4\), \(2, 4\)\]"),
    ],
)
def test_what_cannot_be_pooled_says_so(features: object, got: str) -> None:
    with pytest.raises(ValueError, match=rf"policy's features: expected.*got {got}.*Host\.features"):
        pooled(features)

"""Networks of maps."""

import pytest
import torch
from fields import fixed_times, noise, norms
from small_maps import features, small
from torch.nn import functional as F


def test_masked_tokens_are_not_seen():
    flow_map, x, one = small("transformer"), noise(3, 2, 2), fixed_times(1.0, 3)
    tokens, mask = features("transformer")
    spoiled = torch.where(mask[..., None], tokens, 100.0)
    got, other = (flow_map.bind((part, mask))(x, 0 * one, one) for part in (tokens, spoiled))
    torch.testing.assert_close(got, other)
    assert norms(flow_map.bind((spoiled, torch.ones_like(mask)))(x, 0 * one, one) - got)[1:].min() > 1e-4


@pytest.mark.parametrize("layer_norm", [False, True])
def test_an_mlp_normalises_what_its_layers_read_if_it_is_told_to(layer_norm: bool):
    net, x = small("mlp", layer_norm=layer_norm).net, noise(3, 2, 2)
    seen, (r, t) = features("mlp"), torch.rand(2, 3, dtype=x.dtype)

    def activate(h: torch.Tensor) -> torch.Tensor:
        if layer_norm:
            h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return F.silu(h)

    angles = torch.pi * torch.stack([r, t], 1)[..., None] * torch.arange(1.0, 3.0)
    times = torch.cat([angles.sin(), angles.cos()], 2).flatten(1)
    h = net.features(seen) + net.first(torch.cat([x.flatten(1), times], 1))
    for layer in net.rest:
        h = layer(activate(h))
    torch.testing.assert_close(net(net.encode(seen), (x,), (r, t)), net.last(activate(h)).view_as(x))

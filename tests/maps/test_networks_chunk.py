"""Networks of maps."""

import torch
from fields import fixed_times, noise, norms
from small_maps import features, small


def test_masked_tokens_are_not_seen():
    flow_map, x, one = small("transformer"), noise(3, 2, 2), fixed_times(1.0, 3)
    tokens, mask = features("transformer")
    spoiled = torch.where(mask[..., None], tokens, 100.0)
    got, other = (flow_map.bind((part, mask))(x, 0 * one, one) for part in (tokens, spoiled))
    torch.testing.assert_close(got, other)
    assert norms(flow_map.bind((spoiled, torch.ones_like(mask)))(x, 0 * one, one) - got)[1:].min() > 1e-4

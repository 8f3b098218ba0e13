"""A flow policy's gradient through its last layers only."""

import pytest
import torch
from torch import Tensor, nn
from truncation import gradient_of

import qsteer
from qsteer.policies import FlowPolicy, FlowPolicyConfig


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_residual_flow_policy_is_cut_as_defined(last: int, layer_norm: bool):
    torch.manual_seed(0)
    config = FlowPolicyConfig(4, 3, 2, hidden=(8,) * 4, residual=True, layer_norm=layer_norm)
    policy = FlowPolicy(config).double().requires_grad_(False)
    obs, x, t = torch.randn(5, 4).double(), torch.randn(5, 2, 3).double(), torch.full((5,), 0.4).double()
    value = qsteer.value(lambda a, s: -(a - s[:, None, :3]).square().flatten(1).sum(1), obs)
    field = policy.field(obs)

    def gelu(h: Tensor) -> Tensor:
        return nn.functional.gelu(nn.functional.layer_norm(h, (8,)) if layer_norm else h)

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        z = policy.encode(obs)
        angles = t[:, None] * policy.frequencies
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1)
        h = z + features @ policy.first.weight[:, 4:].T
        added = [torch.zeros_like(h)]
        for layer in policy.rest[:-1]:
            added.append(layer(gelu(h + sum(added))))
        e, early = h, sum(added[: 4 - last]).detach()
        h = e + early
        for layer in policy.rest[3 - last : 3]:
            h = h + layer(gelu(h))
        return policy.rest[-1](gelu(h)).view_as(x)

    torch.testing.assert_close(field.truncated(last)(x, t), field(x, t), rtol=0, atol=0)
    torch.testing.assert_close(by_hand(x, t), field(x, t))
    got = gradient_of(field.truncated(last), value, x, t)
    torch.testing.assert_close(got, gradient_of(by_hand, value, x, t))
    whole = gradient_of(field, value, x, t)
    assert torch.equal(got, whole) if last == 3 else not torch.allclose(got, whole, rtol=1e-3)
    twice = field.truncated(last).repeat(2)
    got = gradient_of(twice, value.repeat(2), x.repeat_interleave(2, 0), t.repeat_interleave(2))
    torch.testing.assert_close(got[::2], gradient_of(field.truncated(last), value, x, t))


def test_layers_of_a_plain_flow_policy_are_refused():
    policy = FlowPolicy(FlowPolicyConfig(obs_dim=4, action_dim=3, horizon=2, hidden=(8, 8)))
    with pytest.raises(ValueError, match="expected 1 to 0"):
        policy.field(torch.zeros(1, 4)).truncated(1)
    with pytest.raises(ValueError, match="one width"):
        FlowPolicyConfig(obs_dim=4, action_dim=3, horizon=2, hidden=(8, 9), residual=True)

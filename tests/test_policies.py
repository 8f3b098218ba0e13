"""The small flow policy: its field encodes once, and its network is what its docstring says."""

import pytest
import torch
from play_data import A, H, S

from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.types import Field


def test_a_policys_field_is_its_velocity_with_the_observation_encoded_once() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy(FlowPolicyConfig(S, A, H, (8, 8)))
    policy.normalizer.fit(torch.randn(20, S) * 2 + 1)
    obs, x, t = torch.randn(4, S), torch.randn(8, H, A), torch.rand(8)
    field = policy.field(obs)
    assert isinstance(field, Field)
    policy.encode = lambda obs: pytest.fail("encoded again")  # type: ignore[method-assign]
    v = field.repeat(2)(x, t)
    del policy.encode
    torch.testing.assert_close(v, policy(obs.repeat_interleave(2, dim=0), x, t))
    assert (policy(obs, x[:4], t[:4]) - policy(obs, x[:4], t[:4] / 2)).abs().max() > 1e-4  # sees the time


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_policys_first_layer_is_linear_in_observation_action_and_time(layer_norm: bool) -> None:
    torch.manual_seed(0)
    policy = FlowPolicy(FlowPolicyConfig(S, A, H, (8,), harmonics=2, layer_norm=layer_norm))
    obs, x, t = torch.randn(4, S), torch.randn(4, H, A), torch.rand(4)
    angles = torch.pi * t[:, None] * torch.tensor([1.0, 2.0])
    inputs = torch.cat([obs, x.flatten(1), angles.sin(), angles.cos()], dim=1)
    h = policy.first(inputs)
    if layer_norm:
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = policy.rest[0](torch.nn.functional.gelu(h))
    torch.testing.assert_close(policy(obs, x, t).flatten(1), expected)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="harmonics: expected"):
        FlowPolicyConfig(S, A, H, harmonics=0)

"""A policy of one's own by the plain adapter."""

import hosts
import pytest
import torch
from hosts import STRONG
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.clock import MIRRORED
from qsteer.steering.handle import steer


def test_one_field_in_both_conventions_acts_alike():
    """A field written as noise - action in u = 1 - t is steered to the same actions."""
    net = nn.Sequential(nn.Linear(6 + 1 + 4, 16), nn.Tanh(), nn.Linear(16, 6)).double()

    def paper(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return net(torch.cat([x.flatten(1), t[:, None].to(x), obs], 1)).view_as(x)

    def mirrored(x: Tensor, u: Tensor, obs: Tensor) -> Tensor:
        return -paper(x, 1 - u, obs)

    noise, obs = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    class Pull:
        def bind(self, obs: Tensor) -> qsteer.Value:
            return qsteer.value(lambda a, s: -(a - s[:, None, :2]).square().flatten(1).sum(1), obs)

    here = PlainPolicy(paper, horizon=3, action_dim=2, steps=8)
    there = PlainPolicy(mirrored, horizon=3, action_dim=2, steps=8, clock=MIRRORED)
    x = noise
    for i in range(8):
        x = x + paper(x, torch.full((2,), i / 8), obs) / 8
    assert torch.equal(here.predict_action_chunk(obs, noise=noise), x), "Euler's method, no more"
    for method in (
        qsteer.Euler(),
        STRONG,
        qsteer.QGF(weight=0.1),
        qsteer.ThroughTime(),
        qsteer.TrustRegion(),
    ):
        actions = []
        for policy in (here, there):
            with steer(policy, Pull(), method):
                actions.append(policy.predict_action_chunk(obs, noise=noise))
        torch.testing.assert_close(actions[0], actions[1], rtol=1e-12, atol=1e-12)
        assert torch.equal(actions[0], x) == (method == qsteer.Euler())


def test_a_plain_policy_draws_its_own_noise():
    policy, batch = hosts.build("plain"), {"observation.state": torch.randn(3, 4)}
    torch.manual_seed(0)
    drawn = policy.predict_action_chunk(batch)
    torch.manual_seed(0)
    assert torch.equal(drawn, policy.predict_action_chunk(batch, noise=torch.randn(3, 5, 3)))


def test_plain_sizes_are_checked():
    with pytest.raises(ValueError, match="executed=6, horizon=5"):
        PlainPolicy(torch.nn.Identity(), horizon=5, action_dim=2, executed=6)
    with pytest.raises(ValueError, match="steps=0"):
        PlainPolicy(torch.nn.Identity(), horizon=5, action_dim=2, steps=0)

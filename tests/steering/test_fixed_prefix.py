"""A policy trained with real-time chunking is given the first steps of its chunk, at the action's time."""

import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.clock import MIRRORED, PAPER
from qsteer.flow import expand_time

GIVEN = torch.linspace(-1, 1, 30).view(2, 5, 3)


class Velocity(nn.Module):
    """Of the noisy chunk and a time for each of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(15 + 5 + 4, 32), nn.Tanh(), nn.Linear(32, 15))

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        each = t if t.ndim == 2 else t[:, None].expand(-1, 5)
        return self.net(torch.cat([x.flatten(1), each, obs], 1)).view_as(x)


class Trained(PlainPolicy):
    """Its loop is that of lerobot's main branch, ``euler_integrate(hard_prefix=, hard_prefix_mask=)``."""

    def sample_actions(self, obs, noise=None, num_steps=None):
        x, steps = noise, 0 if not hasattr(self, "delay") else self.delay
        mask = torch.zeros(len(x), 5, dtype=torch.bool)
        mask[:, :steps] = True
        mask[1:, : getattr(self, "other", steps)] = True
        for t, dt in self.clock.grid(self.steps):
            time = expand_time(self.clock.to_host(t), x, torch.float32)
            if mask.any():
                x = torch.where(mask[..., None], GIVEN, x)
                time = time[:, None].expand(-1, 5).clone()
                time[mask] = self.clock.action
            x = x + dt * self.clock.velocity(self.denoise_step(x_t=x, timestep=time, obs=obs))
            x = torch.where(mask[..., None], GIVEN, x)
        return x

    def denoise_step(self, x_t, timestep, obs):
        return self.velocity(x_t, timestep, obs)


def value(a: Tensor) -> Tensor:
    return -(a - 0.3).square().flatten(1).sum(1)


class Critic(nn.Module):
    def bind(self, obs: Tensor) -> qsteer.Value:
        return qsteer.value(value)


@pytest.fixture(params=[PAPER, MIRRORED], ids=["paper", "mirrored"])
def policy(request: pytest.FixtureRequest) -> Trained:
    torch.manual_seed(0)
    return Trained(Velocity(), horizon=5, action_dim=3, clock=request.param)


def act(policy: Trained) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    obs, noise = torch.randn(2, 4, generator=draw), torch.randn(2, 5, 3, generator=draw)
    return policy.predict_action_chunk(obs, noise=noise)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_without_a_push_it_is_the_hosts_bit_for_bit(policy, delay):
    policy.delay = delay
    base = act(policy)
    for method in (qsteer.Euler(), qsteer.Tweedie(0.0), qsteer.BestOfN(1)):
        with qsteer.steer(policy, Critic(), method):
            assert torch.equal(act(policy), base)


@pytest.mark.parametrize(
    "method",
    [
        qsteer.Tweedie(0.3),
        qsteer.QGF(0.2),
        qsteer.BestOfN(4),
        qsteer.TrustRegion(0.5),
        qsteer.BeamSearch(2, 2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_is_given_stays_and_the_rest_is_steered(policy, method):
    policy.delay = 2
    base = act(policy)
    torch.manual_seed(3)
    with qsteer.steer(policy, Critic(), method):
        steered = act(policy)
    torch.testing.assert_close(steered[:, :2], GIVEN[:, :2])
    assert not torch.allclose(steered[:, 2:], base[:, 2:])
    assert (value(steered) >= value(base) - 1e-4).all()


def test_the_fast_path_flow_maps_and_stochastic_steps_are_refused(policy):
    policy.delay = 2
    with qsteer.steer(policy, Critic(), qsteer.Tweedie(0.3), compile="static"):
        with pytest.raises(RuntimeError, match="compile: expected real-time chunking to be off"):
            act(policy)
    with qsteer.steer(policy, Critic(), qsteer.BeamSearch(2, 2, flow_map=lambda x, r, t: x)):
        with pytest.raises(ValueError, match="leave flow_map out"):
            act(policy)
    with qsteer.steer(policy, Critic(), qsteer.FeynmanKac(2)):
        with pytest.raises(ValueError, match="take another sampler"):
            act(policy)


def test_rows_of_different_delays_are_refused(policy):
    policy.delay, policy.other = 1, 2
    with qsteer.steer(policy, Critic(), qsteer.Tweedie(0.3)):
        with pytest.raises(ValueError, match=r"the same steps of a chunk.* in all rows, got \[1, 2\]"):
            act(policy)

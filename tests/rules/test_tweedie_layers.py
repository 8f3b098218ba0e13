"""Tweedie through the last layers only, on lerobot's hosts and on a residual network written by hand."""

from dataclasses import replace
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from guidance_rules import RAW
from hosts import STRONG, chunk
from torch import Tensor, nn
from truncation import bound, hooks

import qsteer
from qsteer.adapters import Host, PlainPolicy
from qsteer.bench.counting import count
from qsteer.steering.handle import steer


@pytest.fixture(params=hosts.LEROBOT)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_guidance_through_the_last_layer_still_raises_the_value(policy: nn.Module):
    critic, batch = hosts.Target(), hosts.observe(policy, 4)
    value, base = critic.bind(batch), chunk(policy, rows=4)
    with steer(policy, critic, replace(STRONG, layers=1)):
        assert (value(chunk(policy, rows=4)[:, :4, :3]) > value(base[:, :4, :3])).all()


def test_cost_is_counted_as_tweedies(policy: nn.Module):
    with bound(policy) as (field, value, x, _):
        costs = [count(field, value, x, replace(STRONG, layers=n)) for n in (None, 1)]
    assert costs[0] == costs[1]
    assert costs[0].field.backwards == 9


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pi05"])
@pytest.mark.parametrize(
    "rule", [replace(STRONG, layers=1), qsteer.ForwardTweedie(0.3, stale=True)], ids=repr
)
def test_cheaper_rules_act_on_a_device_as_on_the_cpu(name: str, rule: qsteer.Rule):
    actions = []
    for device in ("cpu", "cuda"):
        policy = hosts.build(name).to(device)
        policy.config.device = device
        batch = {key: value.to(device) for key, value in hosts.observe(policy, 2).items()}
        with steer(policy, hosts.Target().to(device), rule):
            actions.append(policy.predict_action_chunk(batch, noise=hosts.draw(policy, 2).to(device)).cpu())
    torch.testing.assert_close(*actions, rtol=0, atol=5e-3)


# --------------------------------------------------------------------------------- a residual network by hand


class Block(nn.Module):
    """``h + B tanh(A h)``, A inside a module by which alone the stream is read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.write(torch.tanh(self.read(h)))


class Residual(nn.Module):
    """Three blocks between two linear maps; the Jacobian of each is written down below."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 6)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        h = self.enter(x.flatten(1)) + obs + t[:, None].to(x.dtype)
        for block in self.blocks:
            h = block(h)
        return self.leave(h).view_as(x)

    def jacobian(self, x: Tensor, t: Tensor, obs: Tensor, last: int) -> Tensor:
        """dv/dx of the first row with the identity in place of the first blocks' Jacobians."""
        h = self.enter(x.flatten(1)) + obs + t[:, None].to(x.dtype)
        product = torch.eye(8, dtype=x.dtype)
        for i, block in enumerate(self.blocks):
            slope = 1 - torch.tanh(block.read(h[0])) ** 2
            if i >= len(self.blocks) - last:
                own = torch.eye(8, dtype=x.dtype) + block.write.weight @ (slope[:, None] * block.read.weight)
                product = own @ product
            h = block(h)
        return self.leave.weight @ product @ self.enter.weight


class Own(PlainPolicy):
    """A policy of one's own that says where its layers are."""

    reads: tuple[str, ...] = ("read",)

    @property
    def __qsteer_host__(self) -> Host:
        return replace(super().__qsteer_host__, layers="velocity.blocks", reads=self.reads)


class Sum(nn.Module):
    def bind(self, obs: Tensor) -> qsteer.Value:
        return qsteer.value(
            lambda a: (a * torch.linspace(-1, 2, 6, dtype=a.dtype).view(3, 2)).flatten(1).sum(1)
        )


def own(**changes: Any) -> tuple[Own, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Own(Residual().double(), horizon=3, action_dim=2)
        obs, noise = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    for key, value in changes.items():
        setattr(policy, key, value)
    return policy, obs, noise


@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_truncated_gradient_by_hand(last: int):
    policy, obs, x = own()
    seen: list = []
    with steer(policy, Sum(), replace(STRONG, layers=last), sampler=hosts.Spy(seen)):
        policy.predict_action_chunk(obs, noise=x)
    steered, value, _ = seen[0]
    t = torch.full((1,), 0.4, dtype=torch.float64)
    with torch.enable_grad():
        got = qsteer.Tweedie(layers=last, **RAW).ascent(steered.base, value, x.clone(), t)
    slope = torch.linspace(-1, 2, 6, dtype=x.dtype)
    jacobian = torch.eye(6, dtype=x.dtype) + 0.6 * policy.velocity.jacobian(x, t, obs, last)
    torch.testing.assert_close(got.gradient.flatten(), jacobian.T @ slope)
    torch.testing.assert_close(got.velocity, policy.velocity(x, t, obs))


def test_a_record_that_names_modules_which_are_not_called_is_found_out():
    policy, obs, x = own(reads=("write", "unused"))
    for block in policy.velocity.blocks:
        block.unused = nn.Linear(8, 8)
    with steer(policy, Sum(), replace(STRONG, layers=1)):
        with pytest.raises(RuntimeError, match=r"call all 4 modules.*got 2; correct the layers and reads"):
            policy.predict_action_chunk(obs, noise=x)
    assert hooks(policy) == 0


@pytest.mark.parametrize("layers", [4, 100])
def test_more_layers_than_there_are(layers: int):
    policy, obs, x = own()
    with steer(policy, Sum(), replace(STRONG, layers=layers)):
        with pytest.raises(
            ValueError, match=rf"layers: expected 1 to 3, which PlainPolicy has, got {layers}"
        ):
            policy.predict_action_chunk(obs, noise=x)


def test_fields_without_layers_say_so():
    x, rule = torch.randn(1, 3, 2), qsteer.Tweedie(layers=2)
    value = qsteer.value(lambda a: a.flatten(1).sum(1))
    with pytest.raises(ValueError, match=r"layers=2: expected.*got FunctionField; name them in.*Host record"):
        qsteer.sample(qsteer.field(lambda x, t: -x), value, x, rule=rule)
    plain = hosts.build("plain")
    with steer(plain, hosts.Target(), rule):
        with pytest.raises(ValueError, match=r"host PlainPolicy: expected a record that names.*layers=None"):
            chunk(plain)


@pytest.mark.parametrize("layers", [0, -1, 2.5])
def test_no_layers_at_all_are_refused(layers: float):
    with (
        as_installed(),
        pytest.raises(ValueError, match=rf"at least 1 layer.*got {layers}; None goes through all"),
    ):
        qsteer.Tweedie(layers=layers)

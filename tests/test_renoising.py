"""A loop that predicts the clean action and renoises it: its steps, its velocity, what is executed of it."""

import pytest
import torch
from torch import Tensor, nn

from qsteer.clock import Clock
from qsteer.flow import denoise, value
from qsteer.renoising import DecodedValue, Renoising

CLOCK = Clock(noise=1.0, action=0.0)


class Network(nn.Module):
    """A clean action that depends on the noisy one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x.flatten(1), t[:, None]], 1)).view_as(x)


def loop(net: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """X-VLA's, with its own variables."""
    action = torch.zeros_like(noise)
    for i in range(steps, 0, -1):
        t = torch.full((len(noise),), i / steps, dtype=noise.dtype)
        action = net(noise * t.view(-1, 1, 1) + action * (1 - t).view(-1, 1, 1), t)
    return action


def walk(net: nn.Module, noise: Tensor, steps: int, push: Tensor | float = 0.0) -> Tensor:
    """By velocities, of which each is pushed."""
    memory, x = Renoising(CLOCK, steps), noise
    for t, _ in CLOCK.grid(steps):
        action = net(x, torch.full((len(x),), CLOCK.to_host(t), dtype=x.dtype))
        v = (action - x) / (1 - t)
        memory.remember(x, t, v, action)
        x = memory.step(x, v + push, t)
        assert x is not None
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_without_a_push_it_is_the_loop_bit_for_bit(dtype):
    net = Network().to(dtype)
    noise = torch.randn(5, 2, 3, dtype=dtype)
    for steps in [*range(1, 33), 50, 100]:
        if dtype == torch.float32:
            assert torch.equal(walk(net, noise, steps), loop(net, noise, steps)), steps
        else:  # times are float32 here
            torch.testing.assert_close(walk(net, noise, steps), loop(net, noise, steps), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_rows_that_are_not_pushed_stay_bit_for_bit():
    net, noise = Network(), torch.randn(4, 2, 3)
    push = torch.tensor([0.0, 0.1, 0.0, 0.1])[:, None, None]
    base, bent = loop(net, noise, 10), walk(net, noise, 10, push)
    assert torch.equal(base[::2], bent[::2])
    assert (base[1::2] - bent[1::2]).abs().amin() > 1e-4


@torch.no_grad()
def test_its_first_step_is_eulers_and_the_others_are_not():
    net, noise = Network(), torch.randn(4, 2, 3)
    memory, x, apart = Renoising(CLOCK, 4), noise, []
    for t, dt in CLOCK.grid(4):
        v = (net(x, torch.full((4,), 1 - t)) - x) / (1 - t)
        euler, x = x + dt * v, memory.step(x, v, t)
        apart.append(float((x - euler).abs().max()))
    assert apart[0] < 1e-6 < 1e-3 < min(apart[1:3])
    assert apart[3] < 1e-6, "the last step is the prediction"


@torch.no_grad()
def test_steps_of_another_chain_are_left_to_euler():
    x, memory = torch.randn(2, 2, 3), Renoising(CLOCK, 4)
    assert memory.step(x, x, 0.5) is None, "it did not see the noise"
    memory.step(x, x, 0.0)
    assert memory.step(x, x, 0.3) is None, "no time of this chain"
    assert memory.step(x, x, torch.full((2,), 0.5)) is None, "a time of each row"
    assert memory.step(x, x, 0.5) is not None


def test_gradients_go_through_a_step():
    """d next / dx is that of the formula, though the action was kept."""
    memory, noise = Renoising(CLOCK, 2), torch.randn(1, 1, 3)
    with torch.no_grad():
        memory.step(noise, noise, 0.0)
    x = torch.randn(1, 1, 3, requires_grad=True)
    v = x.sin()
    memory.remember(x, 0.5, v, denoise(x, v, 0.5))
    following = memory.step(x, v, 0.5)
    assert following is not None
    (found,) = torch.autograd.grad(following.sum(), x)
    torch.testing.assert_close(found, (1 + 0.5 * x.cos()).detach())


def test_a_decoded_value_is_asked_for_what_is_executed():
    context = torch.tensor([1.0, 2.0])
    own = value(lambda a, c: c * a.flatten(1).sum(1), context, mask=torch.ones(1, 2))
    decoded, a = DecodedValue(own, torch.sigmoid), torch.randn(2, 1, 2, requires_grad=True)
    expected = context * a.sigmoid().flatten(1).sum(1)
    torch.testing.assert_close(decoded(a), expected)
    torch.testing.assert_close(decoded.members(a), expected[None])
    assert decoded.mask is own.mask
    twice = a.repeat_interleave(2, 0)
    torch.testing.assert_close(decoded.repeat(2)(twice), expected.repeat_interleave(2))
    (g,) = torch.autograd.grad(decoded(a).sum(), a)
    torch.testing.assert_close(g, context[:, None, None] * a.sigmoid() * (1 - a.sigmoid()))

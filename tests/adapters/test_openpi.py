"""openpi's PyTorch models, alone and in its Policy, as a stand-in with their interface."""

import copy

import hosts
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qsteer

pytest.importorskip("lerobot")
import openpi

DIM, STEPS = 3, 4
STRONG = qsteer.Tweedie(0.3)


class Robot(nn.Module):
    """The critic of a robot with 3 of the model's 5 padded dimensions, 4 of 6 steps of which are executed."""

    config = qsteer.CriticConfig(obs_dim=6, action_dim=DIM, horizon=STEPS)

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        assert obs["observation.images.base_0_rgb"].ndim == 4
        return qsteer.value(self.score, obs["observation.state"])

    def score(self, a: Tensor, state: Tensor) -> Tensor:
        assert a.shape[1:] == (STEPS, DIM)
        return -(a - state[:, None, :DIM].tanh()).square().flatten(1).sum(1)


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def model(request: pytest.FixtureRequest) -> openpi.PI0Pytorch:
    return openpi.PI0Pytorch(pi05=request.param).eval()


def noise(rows: int = 2) -> Tensor:
    return torch.randn(rows, 6, 5, generator=torch.Generator().manual_seed(1))


def act(model: openpi.PI0Pytorch, rows: int = 2, **given: object) -> Tensor:
    return model.sample_actions("cpu", openpi.observe(rows), noise=noise(rows), **given)


@pytest.mark.parametrize("steps", [1, 7, 10, 13])
def test_without_a_push_it_is_openpis_chain_bit_for_bit(model, steps):
    base = act(model, num_steps=steps)
    with qsteer.steer(model, Robot(), qsteer.Euler()):
        assert torch.equal(act(model, num_steps=steps), base)
    with qsteer.steer(model, Robot(), STRONG) as handle:
        if steps > 1:
            assert not torch.equal(act(model, num_steps=steps), base)
        assert repr(handle).startswith("Handle(PI0Pytorch")
    assert torch.equal(act(model, num_steps=steps), base)


def test_the_chain_raises_the_value(model):
    critic, base = Robot(), act(model, 8)
    value = critic.bind(qsteer.adapters.openpi.observe({"observation": openpi.observe(8)}))
    worth = value(base[:, :STEPS, :DIM])
    with qsteer.steer(model, critic, STRONG):
        steered = act(model, 8)
    assert (value(steered[:, :STEPS, :DIM]) > worth).all()
    with qsteer.steer(model, critic, qsteer.BestOfN(4)):
        assert (value(act(model, 8)[:, :STEPS, :DIM]) >= worth).all()


def test_the_gradient_is_the_true_one(model):
    field, value, x = qsteer.open_action(
        model, {"device": "cpu", "observation": openpi.observe(1), "noise": noise(1)}, Robot()
    )
    x.mul_(0.5)
    tweedie = qsteer.Tweedie(1.0, scaling="raw", clip=None)(field, value)
    push = tweedie(x, 0.5) - field(x, 0.5)
    direction = torch.where(value.mask.bool(), torch.randn_like(x), 0.0)
    up, down = (
        value(qsteer.flow.denoise(y, field(y, 0.5), 0.5))
        for y in (x + 1e-2 * direction, x - 1e-2 * direction)
    )
    torch.testing.assert_close((push * direction).sum(), (up - down)[0] / 2e-2, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_steered_through_its_policy(compiled):
    policy = openpi.Policy(openpi.PI0Pytorch(compiled=compiled), {"num_steps": 5})
    kept, drawn = policy._sample_actions, noise(1)[0].numpy()
    base = policy.infer(openpi.request(), noise=drawn)["actions"]
    with qsteer.steer(policy, Robot(), STRONG) as handle:
        steered = policy.infer(openpi.request(), noise=drawn)["actions"]
        assert handle.policy is policy._model
        assert "PI0Pytorch in Policy" in repr(handle)
        assert not np.array_equal(steered, base)
        handle.swap(rule=None)
        np.testing.assert_array_equal(policy.infer(openpi.request(), noise=drawn)["actions"], base)
    assert policy._sample_actions is kept
    np.testing.assert_array_equal(policy.infer(openpi.request(), noise=drawn)["actions"], base)


def test_a_copy_of_the_policy_is_steered_on_its_own():
    policy = openpi.Policy(openpi.PI0Pytorch())
    drawn = noise(1)[0].numpy()
    base = policy.infer(openpi.request(), noise=drawn)["actions"]
    with qsteer.steer(policy, Robot(), STRONG):
        steered = policy.infer(openpi.request(), noise=drawn)["actions"]
        twin = copy.deepcopy(policy)
    np.testing.assert_array_equal(twin.infer(openpi.request(), noise=drawn)["actions"], steered)
    qsteer.unsteer(twin)
    np.testing.assert_array_equal(twin.infer(openpi.request(), noise=drawn)["actions"], base)


def test_a_critic_must_say_which_dimensions_are_the_robots(model):
    with pytest.raises(
        ValueError, match=r"config.action_dim says how many of PI0Pytorch's 5 padded dimensions"
    ):
        qsteer.steer(model, hosts.Target(), STRONG)


def test_lerobots_class_of_the_same_name_is_another():
    with pytest.raises(TypeError, match="got PI0Pytorch"):
        qsteer.steer(hosts.shared("pi0").model, Robot(), STRONG)

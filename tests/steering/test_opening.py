"""Opening an action: what a policy has encoded before its first step, and a policy left as it was."""

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from torch import nn

import qsteer
from qsteer.adapters import Host, PlainPolicy
from qsteer.critics import FEATURES, Critic, CriticConfig

NAMES = pytest.mark.parametrize("name", hosts.HOSTS)


def placed(policy: nn.Module) -> list[dict[str, Any]]:
    """What lies on the instances which steering touches."""
    return [dict(vars(policy)), dict(vars(hosts.loop(policy)))]


@NAMES
def test_it_is_what_steer_gives_its_sampler(policy: nn.Module) -> None:
    seen: list[Any] = []
    batch = hosts.observe(policy, 2)
    torch.manual_seed(0)
    with qsteer.steer(policy, hosts.Target(), hosts.Spy(seen)):
        policy.predict_action_chunk(batch)
    torch.manual_seed(0)
    opened = qsteer.open_action(policy, batch, hosts.Target())
    (field, value, noise), t = seen[0], 0.4
    assert torch.equal(opened.noise, noise) and opened.field.clock == field.clock
    with torch.no_grad():
        assert torch.equal(opened.field(noise, t), field(noise, t))
    assert opened.value is not None and torch.equal(opened.value(noise), value(noise))
    assert torch.equal(opened.value.mask, value.mask)


@NAMES
def test_sampling_from_it_is_the_policys_own_action(policy: nn.Module) -> None:
    batch = hosts.observe(policy, 2)
    torch.manual_seed(0)
    chunk = policy.predict_action_chunk(batch)
    torch.manual_seed(0)
    field, value, noise = qsteer.open_action(policy, batch)
    assert value is None
    action = qsteer.sample(field, None, noise)[..., : chunk.shape[-1]]
    assert torch.equal(action, chunk)


@NAMES
def test_the_policy_is_left_as_it_was(policy: nn.Module) -> None:
    before, grads = placed(policy), [p.requires_grad for p in policy.parameters()]
    qsteer.open_action(policy, hosts.observe(policy))
    assert placed(policy) == before and grads == [p.requires_grad for p in policy.parameters()]
    with pytest.raises((ValueError, StopIteration)):  # the host's own
        qsteer.open_action(policy, {})
    assert placed(policy) == before


@NAMES
def test_a_steered_policy_stays_steered(policy: nn.Module) -> None:
    batch, strong = hosts.observe(policy), qsteer.Tweedie(alpha=2.0)
    with qsteer.steer(policy, hosts.Target(), strong):
        torch.manual_seed(0)
        steered = policy.predict_action_chunk(batch)
        torch.manual_seed(0)
        opened = qsteer.open_action(policy, batch)
        torch.manual_seed(0)
        assert torch.equal(policy.predict_action_chunk(batch), steered)
    assert not isinstance(opened.field, qsteer.rules.Steered)


@NAMES
def test_under_inference_mode_it_can_be_differentiated(policy: nn.Module) -> None:
    critic = hosts.Target()
    with torch.inference_mode():
        field, value, noise = qsteer.open_action(policy, hosts.observe(policy), critic)
    x = noise.clone().requires_grad_()
    assert value is not None
    (gradient,) = torch.autograd.grad(value(x + 0.5 * field(x, 0.5)).sum(), x)
    assert gradient.isfinite().all() and gradient.any()


def test_a_critic_sees_what_it_asks_for() -> None:
    policy = hosts.shared("pi05")
    width = policy.model.paligemma_with_expert.gemma_expert.model.layers[0].self_attn.v_proj.out_features
    critic = Critic(CriticConfig(obs_dim=0, action_dim=3, horizon=4, features=3 * width))
    given: list[Any] = []
    bind = critic.bind
    critic.bind = lambda obs: given.append(obs) or bind(obs)  # type: ignore[method-assign, assignment]
    opened = qsteer.open_action(policy, hosts.observe(policy), critic, critic_inputs=lambda batch: {})
    assert isinstance(given[0], Mapping) and list(given[0]) == [FEATURES]
    assert opened.value is not None and opened.value(opened.noise).shape == (1,)


def test_errors_are_those_of_steer_and_name_what_was_missing() -> None:
    policy = PlainPolicy(lambda x, t, obs: -x, horizon=3, action_dim=2)
    with as_installed():
        with pytest.raises(TypeError, match="expected an object with bind"):
            qsteer.open_action(policy, torch.zeros(1), critic=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"PlainPolicy.*__qsteer_host__"):
            qsteer.open_action(nn.Linear(1, 1), torch.zeros(1))

    class Elsewhere(PlainPolicy):
        def predict_action_chunk(self, obs: Any, *_: Any) -> Any:
            return torch.zeros(len(obs), 3, 2)

    with pytest.raises(RuntimeError, match=r"predict_action_chunk: expected it to call sample_actions"):
        qsteer.open_action(Elsewhere(lambda x, t, obs: -x, horizon=3, action_dim=2), torch.zeros(1))


def test_a_record_that_names_another_step() -> None:
    policy = PlainPolicy(lambda x, t, obs: -x, horizon=3, action_dim=2)
    record = policy.__qsteer_host__
    assert isinstance(record, Host)

    class Unused(PlainPolicy):
        def sample_actions(self, obs: Any, **_: Any) -> Any:
            return torch.zeros(len(obs), 3, 2)

    with pytest.raises(RuntimeError, match=r"sample_actions: expected it to call denoise_step.*Host record"):
        qsteer.open_action(Unused(lambda x, t, obs: -x, horizon=3, action_dim=2), torch.zeros(1))


@NAMES
def test_threads_open_actions_of_one_policy(policy: nn.Module) -> None:
    before, opened = placed(policy), []

    def open_one(seed: int) -> None:
        opened.append(qsteer.open_action(policy, hosts.observe(policy, seed + 1)))

    threads = [threading.Thread(target=open_one, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(action.noise) for action in opened) == [1, 2, 3, 4] and placed(policy) == before


def test_a_critic_may_ask_the_policy_itself() -> None:
    policy = PlainPolicy(lambda x, t, obs: obs[:, :, None] - x, horizon=3, action_dim=2)

    class Asking:
        def bind(self, obs: torch.Tensor) -> qsteer.Value:
            goal = policy.predict_action_chunk(obs)
            return qsteer.value(lambda a, goal: -(a - goal).square().flatten(1).sum(1), goal)

    value = qsteer.open_action(policy, torch.ones(2, 1), Asking()).value
    assert value is not None and value(torch.zeros(2, 3, 2)).shape == (2,)


@pytest.mark.parametrize("config", [object(), {}, SimpleNamespace(horizon=None), None], ids=range(4))
def test_a_critics_configuration_may_lack_our_names(config: Any) -> None:
    policy = PlainPolicy(lambda x, t, obs: -x, horizon=3, action_dim=2)
    critic = hosts.Target()
    critic.config = config
    critic.bind = lambda obs: qsteer.value(lambda a: a.flatten(1).sum(1))  # type: ignore[method-assign]
    with qsteer.steer(policy, critic, qsteer.QGF(1.0)):
        assert policy.predict_action_chunk(torch.zeros(2, 1)).shape == (2, 3, 2)

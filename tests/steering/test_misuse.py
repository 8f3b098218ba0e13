"""Wrappers, compilers, queues, copies, sizes: a steered policy acts as the handle says, or says why not."""

import warnings
from copy import deepcopy
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from hosts import STRONG, chunk
from torch import nn

import qsteer
from qsteer.critics import Critic, CriticConfig, LiveCritic

NAMES = pytest.mark.parametrize("name", hosts.HOSTS)
LEROBOT = pytest.mark.parametrize("name", hosts.LEROBOT)
PLAIN = pytest.mark.parametrize("name", ["plain"])


def call(method: Any, policy: nn.Module) -> torch.Tensor:
    return method(hosts.observe(policy, 2), noise=hosts.draw(policy, 2))


@pytest.mark.parametrize(
    "name", ["plain", "pi05", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pi0", "smolvla"))]
)
@as_installed()  # torch.compile cannot trace the checks of types that tests install
def test_compiling_a_policys_methods_changes_nothing(policy: nn.Module, name: str):
    base, before = chunk(policy), torch.compile(policy.predict_action_chunk, backend="eager")
    if name == "plain":  # tracing a whole transformer takes minutes
        assert torch.allclose(call(before, policy), base, atol=1e-5)
    with qsteer.steer(policy, hosts.Target(), STRONG):
        steered = chunk(policy)
        assert not torch.equal(steered, base)
        after = torch.compile(policy.predict_action_chunk, backend="eager")
        module = torch.compile(policy, backend="eager")
        for method in (after, after, module.predict_action_chunk):
            assert torch.equal(call(method, policy), steered)
        try:
            assert torch.equal(call(before, policy), steered)
        except RuntimeError as error:  # it goes past what was put in its place
            assert "looked up or compiled after steering" in str(error)
    if name == "plain":
        assert torch.allclose(call(after, policy), base, atol=1e-5), "also what was compiled while steered"
    torch._dynamo.reset()


class PeftModel(nn.Module):
    """Hands on attributes as PEFT's does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def lora(policy: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    kinds = (n for n, m in policy.named_modules() if isinstance(m, nn.Linear) and min(m.weight.shape) > 3)
    config = peft.LoraConfig(target_modules=[next(kinds)], init_lora_weights=False)
    return peft.get_peft_model(policy, config)


def distributed(policy: nn.Module) -> nn.Module:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(policy)


WRAPPERS = {
    "OptimizedModule": lambda policy: torch.compile(policy, backend="eager"),
    "PeftModel": PeftModel,
    "PeftModel in OptimizedModule": lambda policy: torch.compile(PeftModel(policy), backend="eager"),
    "DistributedDataParallel": distributed,
    "lora": lora,
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("name", ["plain", "pi05"])
def test_the_policy_inside_a_wrapper_is_steered_and_given_back(name: str, kind: str):
    policy = hosts.build(name)
    wrapper = WRAPPERS[kind](policy)
    try:
        base, before = chunk(policy), [p.requires_grad for p in wrapper.parameters()]
        places = dict(vars(policy)), dict(vars(wrapper))
        outer = getattr(wrapper, "predict_action_chunk", policy.predict_action_chunk)
        assert torch.equal(call(outer, policy), base)
        handle = qsteer.steer(wrapper, hosts.Target(), STRONG)
        assert handle.policy is policy
        if kind != "lora":
            assert f"{type(policy).__name__.replace('Plain', 'PlainPolicy')[:10]}" in repr(handle)
            assert f" in {kind}, " in repr(handle)
        steered = chunk(policy)
        assert not torch.equal(steered, base)
        outer = getattr(wrapper, "predict_action_chunk", policy.predict_action_chunk)
        assert torch.equal(call(outer, policy), steered)
        with as_installed(), pytest.raises(RuntimeError, match="not steered, got Handle"):
            qsteer.steer(policy, hosts.Target(), STRONG)
        qsteer.unsteer(wrapper)
        assert (dict(vars(policy)), dict(vars(wrapper))) == places
        assert [p.requires_grad for p in wrapper.parameters()] == before
        assert torch.equal(chunk(policy), base)
        assert qsteer.open_action(wrapper, hosts.observe(policy)).field.policy is policy
    finally:
        if kind == "DistributedDataParallel":
            torch.distributed.destroy_process_group()


@LEROBOT
def test_queued_actions_of_another_method_are_dropped(policy: nn.Module):
    batch = hosts.observe(policy)

    def act() -> torch.Tensor:
        torch.manual_seed(0)
        return policy.select_action(batch)

    policy.reset()
    base = act()
    handle = qsteer.steer(policy, hosts.Target(), STRONG)
    steered = act()
    handle.swap(rule=None)
    swapped = act()
    handle.swap(rule=STRONG)
    assert torch.equal(act(), steered)
    handle.remove()
    after, second = act(), policy.select_action(batch)
    handle.remove()
    third = policy.select_action(batch)
    policy.reset()
    fresh = [act(), policy.select_action(batch), policy.select_action(batch)]
    policy.reset()
    assert not torch.equal(steered, base) and torch.equal(swapped, base) and torch.equal(after, base)
    assert [torch.equal(*pair) for pair in zip((after, second, third), fresh, strict=True)] == [True] * 3


@NAMES
def test_more_steps_are_steered_where_more_are_executed(policy: nn.Module, name: str):
    steps = {"plain": 5}.get(name, 6)
    rule = qsteer.QGF(weight=0.5, clip=None)

    def critic(horizon: int) -> Critic:
        return Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=horizon, hidden=(16,)))

    for executed, wrong in ((0, ValueError), (steps + 1, ValueError), (True, TypeError), (2.5, TypeError)):
        with as_installed(), pytest.raises(wrong, match="executed: expected"):
            qsteer.steer(policy, critic(steps), rule, executed=executed)
    with as_installed(), pytest.raises(ValueError, match=rf"all {steps} executed steps.*horizon of 4"):
        qsteer.steer(policy, critic(4), rule, executed=steps)
    with as_installed(), pytest.raises(ValueError, match=r"at most the 2 executed.*executed=2"):
        qsteer.steer(policy, critic(4), rule, executed=2)
    seen: list = []
    with qsteer.steer(policy, critic(steps), rule, sampler=hosts.Spy(seen), executed=steps) as handle:
        assert f"steers the first {steps} of {steps} steps, 3 dimensions" in repr(handle)
        chunk(policy)
        with as_installed(), pytest.raises(ValueError, match=r"horizon of 4"):
            handle.swap(critic=critic(4))
    assert seen[0][1].mask[:, :3].all()
    with qsteer.steer(policy, critic(4), rule) as handle:
        assert f"steers the first 4 of {steps} steps" in repr(handle)


def test_more_steps_than_a_chunk_has_are_found_at_the_first_action():
    policy = hosts.build("plain")
    policy.executed = 9
    with qsteer.steer(policy, hosts.Target(), STRONG):
        with pytest.raises(ValueError, match="executed: expected at most the 5 steps"):
            chunk(policy)


@PLAIN
def test_a_copy_is_steered_by_itself(policy: nn.Module):
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(16,)))
    other = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(16,)))
    for parameter in other.parameters():
        parameter.data.add_(0.3)
    live, base = LiveCritic(critic), chunk(policy)
    with qsteer.steer(policy, live, STRONG):
        live.publish(critic)
        steered, copy = chunk(policy), deepcopy(policy)
        assert torch.equal(chunk(copy), steered)
        live.publish(other)
        moved = chunk(policy)
        assert not torch.equal(moved, steered)
        assert torch.equal(chunk(copy), steered)
        qsteer.unsteer(copy)
        assert torch.equal(chunk(copy), base)
        assert torch.equal(chunk(policy), moved)
        assert not any(p.requires_grad for p in policy.parameters())
    assert torch.equal(chunk(policy), base)


RULES = [
    None, qsteer.Tweedie(), qsteer.Tweedie(alpha="auto"), qsteer.ForwardTweedie(), qsteer.QGF(),
    qsteer.NoisyGradient(), qsteer.RandomDirection(), qsteer.ThroughTime(), qsteer.Negated(qsteer.QGF()),
]  # fmt: skip
SAMPLERS = [
    qsteer.Euler(), qsteer.BestOfN(3), qsteer.KeepBest(), qsteer.TrustRegion(), qsteer.RandomOfN(3),
    qsteer.BeamSearch(), qsteer.FeynmanKac(),
]  # fmt: skip


@PLAIN
@pytest.mark.parametrize("compile", [None, "static"])
def test_a_batch_without_rows_gives_none(policy: nn.Module, compile: Any):
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(16,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rule in a sampler that has no use for it
        for rule in RULES:
            for sampler in SAMPLERS:
                with qsteer.steer(policy, critic, rule, sampler=sampler, compile=compile):
                    assert chunk(policy, rows=0).shape == (0, 5, 3)


@NAMES
def test_a_wrong_number_of_steps_is_named(policy: nn.Module, name: str):
    batch, noise = hosts.observe(policy), hosts.draw(policy)
    with qsteer.steer(policy, hosts.Target(), STRONG):
        for steps, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), ("3", TypeError)):
            if name != "smolvla":  # which has no such argument
                with as_installed(), pytest.raises(error, match=r"^num_steps: expected"):
                    policy.predict_action_chunk(batch, noise=noise, num_steps=steps)
        hosts.set_steps(policy, 0)
        with pytest.raises(ValueError, match=r"steps: expected at least 1 Euler step, got 0"):
            policy.predict_action_chunk(batch, noise=noise)
        hosts.set_steps(policy, 10)
        assert chunk(policy).isfinite().all()


@PLAIN
def test_a_trace_that_records_nothing_is_warned_of_once(policy: nn.Module):
    with qsteer.steer(policy, hosts.Target(), qsteer.Tweedie(start=0.95), trace=True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(6):
                chunk(policy)
    assert sum("expected guided steps after 3 actions" in str(w.message) for w in said) == 1
    handle = qsteer.steer(policy, hosts.Target(), STRONG, trace=True)
    chunk(hosts.build("plain"))
    with pytest.warns(RuntimeWarning, match="an action of the policy to record.*not a copy"):
        handle.remove()

"""The ten laws of injection, each on every host."""

import copy
import gc
import resource
import sys
from dataclasses import replace
from types import MethodType

import hosts
import pytest
import torch
from hosts import STRONG, chunk
from torch import Tensor, nn

import qsteer
from qsteer.adapters import host_of
from qsteer.steering.handle import steer, unsteer

BASE = qsteer.Euler()


@pytest.fixture(params=(*hosts.HOSTS, *hosts.HEADS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def attributes(policy: nn.Module) -> dict[tuple[int, str], int]:
    """Every instance attribute of every module, by identity; Wall-X keeps one of its last prompt."""
    return {
        (id(m), key): id(value)
        for m in policy.modules()
        for key, value in vars(m).items()
        if key != "rope_deltas"
    }


def surroundings(policy: nn.Module) -> dict[tuple[str, str], int]:
    """Everything that classes and modules around a policy hold, by identity; and its configuration."""
    classes = {cls for part in (policy, hosts.loop(policy)) for cls in type(part).__mro__}
    names = {cls.__module__ for cls in classes} | {"lerobot.policies.common.flow_matching"}
    holders = [*classes, *(sys.modules[name] for name in names if name in sys.modules)]
    if hasattr(policy, "config"):
        holders.append(policy.config)
    return {(repr(h), key): id(value) for h in holders for key, value in vars(h).items()}


def test_law_01_only_the_instance_changes(policy: nn.Module, name: str):
    other = hosts.build(name)
    base = chunk(other)
    assert torch.equal(chunk(policy), base), "two instances, one policy"
    before, bystander = surroundings(policy), attributes(other)
    with steer(policy, hosts.Target(), STRONG):
        assert not torch.equal(chunk(policy), base), "the steering does something"
        assert torch.equal(chunk(other), base)
        assert surroundings(policy) == before
        assert attributes(other) == bystander
    assert surroundings(policy) == before


def test_law_02_a_deepcopy_runs_its_own_model(name: str):
    policy = hosts.build(name)
    base = chunk(policy)
    steer(policy, hosts.Target(), STRONG)
    host, steered = host_of(policy), chunk(policy)
    for path in (host.entry, host.step, host.batch):
        owner = host.site(policy, path)[0]
        assert isinstance(vars(owner)[path.rpartition(".")[2]], MethodType)
    twin = copy.deepcopy(policy)
    for parameter in policy.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(chunk(twin), steered), "the copy has the weights it was copied with"
    assert not torch.equal(chunk(policy), steered)
    unsteer(twin)
    assert torch.equal(chunk(twin), base)
    with pytest.raises(RuntimeError, match="not steered"):
        steer(policy, hosts.Target(), STRONG)


def test_law_03_removal_restores_everything(policy: nn.Module, name: str):
    frozen = [p for p in policy.parameters() if p.requires_grad][::2]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        base = chunk(policy)
        before = attributes(policy)
        state = {key: value.clone() for key, value in policy.state_dict().items()}
        grads = [p.requires_grad for p in policy.parameters()]
        training = [m.training for m in policy.modules()]
        random = torch.get_rng_state()
        handle = steer(policy, hosts.Target(), STRONG)
        assert attributes(policy) != before
        assert policy.state_dict().keys() == state.keys(), "a steered policy saves as it was"
        handle.remove()
        assert attributes(policy) == before
        steer(policy, hosts.Target(), STRONG)
        assert not torch.equal(chunk(policy), base)
        unsteer(policy)
        assert attributes(policy) == before
        assert [p.requires_grad for p in policy.parameters()] == grads
        assert [m.training for m in policy.modules()] == training
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())
        assert torch.equal(chunk(policy), base)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def test_law_04_once_at_a_time_and_always_removed(policy: nn.Module):
    base, before = chunk(policy), attributes(policy)
    handle = steer(policy, hosts.Target(), STRONG)
    with pytest.raises(RuntimeError, match=r"expected one that is not steered, got Handle.*swap.*unsteer"):
        steer(policy, hosts.Target(), STRONG)
    assert not torch.equal(chunk(policy), base), "the first steering is still there"
    handle.remove()
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        handle.swap(rule=None)
    with pytest.raises(RuntimeError, match="removed"), handle:
        pass
    with pytest.raises(ZeroDivisionError), steer(policy, hosts.Target(), STRONG):
        raise ZeroDivisionError
    assert attributes(policy) == before
    unsteer(policy)
    assert attributes(policy) == before


def test_law_05_zero_alpha_is_bit_identical(policy: nn.Module):
    batch = hosts.observe(policy, rows=2)
    for steps in (3, 7, 10):
        hosts.set_steps(policy, steps)
        torch.manual_seed(steps)
        base, state = hosts.plan(policy, batch), torch.get_rng_state()
        for method in (BASE, None, qsteer.Tweedie(alpha=0.0), qsteer.QGF(weight=0.0), qsteer.BestOfN(1)):
            with steer(policy, hosts.Target(), method):
                torch.manual_seed(steps)
                assert torch.equal(hosts.plan(policy, batch), base), (steps, method)
                assert torch.equal(torch.get_rng_state(), state), "the host's own random stream"
        with steer(policy, hosts.Target(), STRONG):
            torch.manual_seed(steps)
            assert not torch.equal(hosts.plan(policy, batch), base)
            assert torch.equal(torch.get_rng_state(), state)


class Closure(hosts.Target):
    """Multiplies by the batch's own tensor, which autograd must be able to keep."""

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        return qsteer.value(lambda a: (a[:, 0] * obs["observation.state"][:, :3]).sum(1))


def test_law_06_grad_modes(policy: nn.Module):
    steered, critic = [], Closure()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            base = chunk(policy)  # whatever the host keeps from here on was made in this mode
            with steer(policy, critic, STRONG):
                steered.append(chunk(policy))
            assert not torch.equal(steered[-1], base)
            assert not steered[-1].requires_grad
    assert torch.equal(steered[0], steered[1])
    assert torch.equal(steered[0], steered[2])


def test_law_06_compiled_entry_is_unwrapped_and_restored(policy: nn.Module):
    base, owner = chunk(policy), hosts.loop(policy)
    name = host_of(policy).entry.rpartition(".")[2]

    def inductor(graph: object, inputs: object) -> object:
        raise AssertionError("the compiled entry must not run")

    compiled = torch.compile(getattr(owner, name), backend=inductor)
    setattr(owner, name, compiled)
    try:
        with steer(policy, hosts.Target(), BASE):
            assert torch.equal(chunk(policy), base)
        assert vars(owner)[name] is compiled
    finally:
        delattr(owner, name)


def test_law_06_memory_is_flat(policy: nn.Module, name: str):
    """Wall-X's own code leaves cycles of references behind, as many without steering."""
    hosts.set_steps(policy, 2)

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    with steer(policy, hosts.Target(), STRONG):
        for _ in range(5):
            chunk(policy, rows=1)
        gc.collect()
        gc.disable()  # flat without the collector's help
        try:
            count, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(5 if name == "wall_x" else 40):
                chunk(policy, rows=1)
                if name == "wall_x":
                    gc.collect()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            assert tensors() == count
        finally:
            gc.enable()
    assert grown * (1 if sys.platform == "darwin" else 1024) < 8 * 2**20


def test_law_06_the_context_stays_clean(policy: nn.Module):
    """No step leaves a graph, or rows, in the context that the next one reads."""
    seen: list = []
    with steer(policy, hosts.Target(), STRONG, sampler=hosts.Spy(seen)):
        chunk(policy)
    context = seen[0][0].base.context
    held = [(key, t) for key, value in context.items() for t in leaves(value)]
    assert held
    assert not any(t.requires_grad for _, t in held)
    if context.get("past_key_values") is not None:
        prefix = context.get("act_start", context.get("prefix_pad_masks", torch.empty(0, 0)).shape[1])
        assert {t.shape[-2] for t in leaves(context["past_key_values"])} == {prefix}


def leaves(value: object) -> list[Tensor]:
    if hasattr(value, "layers"):
        return [t for layer in value.layers for t in (layer.keys, layer.values)]
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.mark.gpu
def test_law_06_cuda(name: str):
    policy = hosts.build(name).to("cuda")
    batch = {key: value.cuda() for key, value in hosts.observe(policy, 2).items()}
    noise = hosts.draw(policy, 2).cuda()
    base = policy.predict_action_chunk(batch, noise=noise)
    with steer(policy, hosts.Target().cuda(), BASE):
        assert torch.equal(policy.predict_action_chunk(batch, noise=noise), base)
    with pytest.raises(ValueError, match="device"):
        steer(policy, hosts.Target(), STRONG)
    with torch.inference_mode(), steer(policy, hosts.Target().cuda(), STRONG):
        assert not torch.equal(policy.predict_action_chunk(batch, noise=noise), base)
        used = []
        for _ in range(20):
            policy.predict_action_chunk(batch, noise=noise)
            used.append(torch.cuda.memory_allocated())
    assert len(set(used[2:])) == 1
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), base)


def test_law_07_gradients_to_x_only(policy: nn.Module):
    critic = hosts.Target()
    before = [p.requires_grad for p in policy.parameters()]
    assert any(before)
    with steer(policy, critic, STRONG):
        assert not any(p.requires_grad for p in policy.parameters())
        chunk(policy)
        assert not any(p.requires_grad for p in policy.parameters())
    assert [p.requires_grad for p in policy.parameters()] == before
    assert all(p.grad is None for p in [*policy.parameters(), *critic.parameters()])
    assert critic.weight.requires_grad, "a critic that learns meanwhile goes on learning"


def test_law_07_padding_gets_no_guidance(policy: nn.Module):
    seen: list = []
    with steer(policy, hosts.Target(), qsteer.Tweedie(alpha=0.5, clip=None), sampler=hosts.Spy(seen)):
        chunk(policy)
        steered, value, x = seen[0]
        t = torch.full((2,), 0.4)
        push = steered(x, t) - steered.base(x, t)
        mask = value.mask.bool()
        assert mask.sum() == 4 * 3
        assert (push[:, mask] != 0).all()
        assert (push[:, ~mask] == 0).all()
        full = seen_gradient(steered.base, value, x, t)
        assert (full[:, ~mask] != 0).any(), "the full Jacobian does reach the padding"


def seen_gradient(field: qsteer.Field, value: qsteer.Value, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(value(qsteer.flow.denoise(x, field(x, t), t)).sum(), x)[0]


def test_law_08_tweedie_is_the_true_gradient(name: str, monkeypatch: pytest.MonkeyPatch):
    """Against central differences of Q(D(x, t)), through the host's own code.

    Hosts cast to float32 on the way, Wall-X to bfloat16. Here these are names for float64: they compute in
    double precision.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    if name == "wall_x":
        monkeypatch.setattr(torch, "bfloat16", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.manual_seed(0)  # of heads, which draw their noise themselves
    policy, critic, seen = hosts.build(name).double(), hosts.Target().double(), []
    batch = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in hosts.observe(policy).items()
    }
    rule = qsteer.Tweedie(alpha=1.0, scaling="raw", clip=None)
    with steer(policy, critic, rule, sampler=hosts.Spy(seen)):
        hosts.plan(policy, batch, None if hosts.is_head(policy) else hosts.draw(policy).double())
        steered, value, noise = seen[0]
        field, mask = steered.base, value.mask.bool()
        for time, x in ((0.2, noise), (0.7, 0.5 * noise)):
            t = torch.tensor([time], dtype=torch.float64)
            tweedie = (steered(x, t) - field(x, t))[0]
            qgf = qsteer.QGF(weight=1.0, scaling="raw", clip=None)(field, value)
            identity = (qgf(x, t) - field(x, t))[0]
            differences = torch.zeros_like(x[0])
            for i, j in mask.nonzero().tolist():
                nudge = torch.zeros_like(x)
                nudge[0, i, j] = 1e-5
                up, down = (value(qsteer.flow.denoise(y, field(y, t), t)) for y in (x + nudge, x - nudge))
                differences[i, j] = (up - down) / 2e-5
            error = (tweedie - differences).norm() / differences.norm()
            apart = (tweedie - identity).norm() / tweedie.norm()
            print(f"{name} t={time}: error {error:.1e}, J is not I: {apart:.2f}")
            assert field(x, t).dtype == torch.float64
            assert error < 1e-7
            assert apart > 0.02


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_law_09_real_time_chunking_is_composed_or_refused(policy: nn.Module, name: str):
    """tests/adapters/test_chunking_lerobot.py has the composition."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    host = host_of(policy)
    try:
        with steer(policy, hosts.Target(), STRONG):
            steered = chunk(policy)
            policy.config.rtc_config = RTCConfig()
            policy.init_rtc_processor()
            assert torch.equal(chunk(policy), steered), "there is no former chunk"
        policy.__qsteer_host__ = replace(host, hold=None)
        with pytest.raises(RuntimeError, match=r"real-time chunking.*rtc_config.enabled = False.*hold"):
            steer(policy, hosts.Target(), STRONG)
    finally:
        vars(policy).pop("__qsteer_host__", None)
        policy.config.rtc_config = None
        policy.init_rtc_processor()


class Broken(hosts.Target):
    """Not finite for the first row: the value, or only its gradient."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def score(self, a: Tensor, state: Tensor) -> Tensor:
        first, rest = super().score(a, state).split([1, len(a) - 1])
        if self.value:
            return torch.cat([first * 0 + self.value, rest])
        return torch.cat([first + (a[:1] - a[:1]).abs().sum().sqrt(), rest])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0], ids=["nan", "inf", "gradient"])
def test_law_10_nothing_infinite_reaches_the_robot(policy: nn.Module, bad: float):
    base = chunk(policy)
    with steer(policy, hosts.Target(), STRONG):
        steered = chunk(policy)
    with steer(policy, Broken(bad), STRONG) as handle:
        with pytest.warns(RuntimeWarning, match="fell back") as warned:
            action = chunk(policy)
            assert torch.equal(chunk(policy), action)
    assert len(warned) == 1, "said once"
    assert handle.trace.fallbacks == 2 * 9, "two chunks, every guided step of the first row"
    assert torch.isfinite(action).all()
    assert torch.equal(action[0], base[0])
    torch.testing.assert_close(action[1], steered[1])
    assert not torch.equal(action[1], base[1])

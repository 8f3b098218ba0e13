"""Tweedie through the last layers only, on lerobot's hosts and on a residual network written by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from threading import Barrier, Thread
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from hosts import chunk
from torch import Tensor, nn

import qsteer
from qsteer.adapters import Host, PlainPolicy
from qsteer.bench.counting import count
from qsteer.flow import denoise
from qsteer.hosts import HostField, cut
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.steering.handle import steer

STRONG = qsteer.Tweedie(alpha=0.3, clip=None)
RAW = {"scaling": "raw", "clip": None}
DEPTH = {"pi0": 2, "pi05": 2, "smolvla": 4}


@pytest.fixture(params=hosts.LEROBOT)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@contextmanager
def bound(policy: nn.Module, rows: int = 2) -> Iterator[tuple[HostField, Any, Tensor, Tensor]]:
    """The field and value of a steered host, noise, and a time."""
    seen: list = []
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        chunk(policy, rows)
        field, value, x = seen[0]
        yield field, value, x, 0.5


def layers_of(field: HostField) -> nn.ModuleList:
    return field.host.read(field.policy, field.host.layers)


def gradient_of(field: Any, value: Any, x: Tensor, t: Tensor) -> Tensor:
    """Of the value of the denoised action; what a rule computes, written again."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(value(denoise(x, field(x, t), t)).sum(), x)[0]


def hooks(policy: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in policy.modules())


def test_the_record_names_the_layers(policy: nn.Module, name: str):
    with bound(policy) as (field, *_):
        layers = layers_of(field)
        assert len(layers) == DEPTH[name]
        assert all(
            isinstance(getattr(layer, part), nn.Module) for layer in layers for part in field.host.reads
        )


def test_all_layers_are_the_whole_gradient_to_the_bit(policy: nn.Module, name: str):
    with bound(policy) as (field, value, x, t):
        whole = field.truncated(DEPTH[name])
        assert torch.equal(gradient_of(whole, value, x, t), gradient_of(field, value, x, t))
    actions = []
    for rule in (STRONG, replace(STRONG, layers=DEPTH[name])):
        with steer(policy, hosts.Target(), rule):
            actions.append(chunk(policy))
    assert torch.equal(*actions)


def test_the_velocity_is_the_same_to_the_bit_and_the_gradient_is_not(policy: nn.Module, name: str):
    with bound(policy) as (field, value, x, t):
        with torch.no_grad():
            assert torch.equal(field.truncated(1)(x, t), field(x, t))
        found = [gradient_of(field.truncated(n), value, x, t) for n in range(1, DEPTH[name] + 1)]
        assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in pairwise(found))


@contextmanager
def constant_branches(layers: Any) -> Iterator[None]:
    """What the layers' attention and feed-forward add at the first call, they add at every call."""
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return kept.setdefault(module, output.clone()).clone()

    added = [module.register_forward_hook(keep) for la in layers for module in (la.self_attn.o_proj, la.mlp)]
    try:
        yield
    finally:
        for hook in added:
            hook.remove()


@pytest.mark.parametrize(("name", "last"), [("pi0", 1), ("pi05", 1), ("smolvla", 1), ("smolvla", 3)])
def test_it_is_the_derivative_with_constant_branches_in_the_early_layers(
    policy: nn.Module, name: str, last: int
):
    """By central differences of the host whose early layers add the constants they added at x."""
    with bound(policy, rows=1) as (field, value, x, t):
        g = gradient_of(field.truncated(last), value, x, t)
        full = gradient_of(field, value, x, t)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad(), constant_branches(layers_of(field)[:-last]):
            field(x, t)  # is kept

            def q(z: Tensor) -> Tensor:
                return value(denoise(z, field(z, t), t)).double()

            for _ in range(5):
                dx = torch.randn(x.shape, generator=draw)
                slope = (q(x + 3e-3 * dx) - q(x - 3e-3 * dx)) / 6e-3
                assert (g * dx).sum().item() == pytest.approx(
                    slope.item(), rel=0.02, abs=0.02 * float(g.norm())
                )
        assert (g - full).norm() > 0.05 * full.norm(), "not what the whole gradient would do too"


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_it_is_the_definition_e_plus_detached_difference(policy: nn.Module, name: str):
    """On pi0 and pi0.5 every layer is a module that is called with the stream."""
    with bound(policy) as (field, value, x, t):
        layers, embedded = layers_of(field), []

        def remember(module: nn.Module, args: tuple) -> None:
            embedded[:] = [args[0]]

        def skip(module: nn.Module, args: tuple) -> tuple:
            return (embedded[0] + (args[0] - embedded[0]).detach(), *args[1:])

        added = [layers[0].register_forward_pre_hook(remember), layers[-1].register_forward_pre_hook(skip)]
        expected = gradient_of(field, value, x, t)
        for hook in added:
            hook.remove()
        torch.testing.assert_close(gradient_of(field.truncated(1), value, x, t), expected)


def test_early_layers_keep_no_graph(policy: nn.Module, name: str):
    """Their attention and feed-forward are computed without one: no backward, nothing saved."""
    with bound(policy) as (field, _, x, t):
        grads: dict[int, list[bool]] = {}
        layers = list(layers_of(field))
        added = [
            part.register_forward_hook(
                lambda m, args, out, i=i: grads.setdefault(i, []).append(out.requires_grad)
            )
            for i, layer in enumerate(layers)
            for part in (layer.self_attn.o_proj, layer.mlp)
        ]
        with torch.enable_grad():
            field.truncated(1)(x.clone().requires_grad_(), t)
        for hook in added:
            hook.remove()
        last = len(layers) - 1
        assert grads == {i: [i == last] * 2 for i in range(len(layers))}


def test_nothing_is_left_behind(policy: nn.Module):
    base, before = chunk(policy), hooks(policy)
    with steer(policy, hosts.Target(), replace(STRONG, layers=1)):
        assert not torch.equal(chunk(policy), base)
        assert hooks(policy) == before
    assert torch.equal(chunk(policy), base)
    with bound(policy) as (field, _, x, t):
        with pytest.raises(RuntimeError), torch.no_grad():
            field.truncated(1)(x[:, :, :2], t)  # a step that fails
        assert hooks(policy) == before


def test_repeated_rows_are_truncated_too(policy: nn.Module):
    with bound(policy) as (field, value, x, t):
        alone = gradient_of(field.truncated(1), value, x, t)
        rows = x.repeat_interleave(2, 0), t
        for many in (field.truncated(1).repeat(2), field.repeat(2).truncated(1)):
            together = gradient_of(many, value.repeat(2), *rows)
            torch.testing.assert_close(together, alone.repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)


def test_another_thread_keeps_its_whole_gradient(policy: nn.Module):
    """The hooks are on modules which both threads run; each thread is in the other's block."""
    with bound(policy) as (field, value, x, t):
        expected = {n: gradient_of(field.truncated(n), value, x, t) for n in (1, len(layers_of(field)))}
        barrier, found = Barrier(2), {n: [] for n in expected}
        first = layers_of(field)[0].input_layernorm

        def wait(*_: Any) -> None:
            barrier.wait(timeout=60)

        meeting = first.register_forward_pre_hook(wait)  # from here on, hooks of both are in place

        def robot(n: int) -> None:
            for _ in range(3):
                found[n].append(gradient_of(field.truncated(n), value, x, t))

        threads = [Thread(target=robot, args=(n,)) for n in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        meeting.remove()
        for n, gradients in found.items():
            assert len(gradients) == 3
            assert all(torch.equal(g, expected[n]) for g in gradients)


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


def test_parameters_that_require_grad_get_none(policy: nn.Module):
    with bound(policy) as (field, value, x, t):
        expected = gradient_of(field.truncated(1), value, x, t)
        parameters = list(layers_of(field).parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        got = gradient_of(field.truncated(1), value, x, t)
        for parameter in parameters:
            parameter.requires_grad_(False)
        torch.testing.assert_close(got, expected)
        assert all(parameter.grad is None for parameter in parameters)


# ------------------------------------------------------------------------------- a residual network by hand


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


def test_cutting_is_undone_after_an_exception_and_does_not_leak():
    layer, x = nn.Linear(2, 2), torch.randn(1, 2, requires_grad=True)
    with pytest.raises(KeyError), cut([layer]):
        raise KeyError
    assert not layer._forward_pre_hooks
    with cut([layer]):
        inside = layer(x)
    assert torch.equal(inside, layer(x))
    assert torch.autograd.grad(layer(x).sum(), x)[0].abs().sum() > 0
    assert torch.autograd.grad(inside.sum(), x, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", ["pi05"])
def test_the_example_compares_on_a_host(policy: nn.Module, capsys: pytest.CaptureFixture[str]):
    import cheaper_tweedie

    rules = cheaper_tweedie.RULES | {"all": qsteer.Tweedie(layers=2), "last": qsteer.Tweedie(layers=1)}
    comparing, base = cheaper_tweedie.Compare(rules), chunk(policy)
    with steer(policy, hosts.Target(), comparing):
        assert torch.equal(chunk(policy), base), "it acts as the host alone"
    rows = {row["rule"]: row for row in comparing.rows}
    assert rows["all"]["cosine"] == pytest.approx([1.0] * 9)
    assert rows["last"]["cosine"][0] < 0.97
    assert [c is None for c in rows["Tweedie, every 2nd step"]["cosine"]] == [False, True] * 4 + [False]
    passes = {name: (row["forwards"], row["forward_rows"], row["backwards"]) for name, row in rows.items()}
    assert passes["Tweedie"] == passes["last"] == (10, 10, 9)
    assert passes["ForwardTweedie"] == (19, 19, 0) and passes["ForwardTweedie, stale"] == (11, 19, 0)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(rules)


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


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_residual_flow_policy_is_cut_as_defined(last: int):
    torch.manual_seed(0)
    config = FlowPolicyConfig(obs_dim=4, action_dim=3, horizon=2, hidden=(8,) * 4, residual=True)
    policy = FlowPolicy(config).double().requires_grad_(False)
    obs, x, t = torch.randn(5, 4).double(), torch.randn(5, 2, 3).double(), torch.full((5,), 0.4).double()
    value = qsteer.value(lambda a, s: -(a - s[:, None, :3]).square().flatten(1).sum(1), obs)
    field = policy.field(obs)

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        z = policy.encode(obs)
        angles = t[:, None] * policy.frequencies
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1)
        h = z + features @ policy.first.weight[:, 4:].T
        added = [torch.zeros_like(h)]
        for layer in policy.rest[:-1]:
            added.append(layer(nn.functional.gelu(h + sum(added))))
        e, early = h, sum(added[: 4 - last]).detach()
        h = e + early
        for layer in policy.rest[3 - last : 3]:
            h = h + layer(nn.functional.gelu(h))
        return policy.rest[-1](nn.functional.gelu(h)).view_as(x)

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

"""The fast path: the host's own function, on buffers that stay, asking the device nothing."""

from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import hosts
import pytest
import torch
from compiled_cases import CASES, PREPARED, critic, runs
from fields import as_installed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qsteer
from qsteer.adapters import PlainPolicy, host_of
from qsteer.adapters.experts import ExpertField
from qsteer.adapters.pi import PiExpert
from qsteer.compiling import inductor
from qsteer.compiling.kept import KEPT
from qsteer.compiling.kinds import rebuilt, signature, tensors_in
from qsteer.compiling.runs import MismatchError
from qsteer.critics import LiveCritic
from qsteer.hosts import Host
from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.steering.compiled import check_field
from qsteer.steering.handle import steer


@pytest.fixture(params=[*PREPARED[:2], pytest.param(PREPARED[2], marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(policy: nn.Module) -> nn.Module:
    """Each kind of action is run several times: a few steps will do."""
    hosts.set_steps(policy, 3)
    return policy


# ---------------------------------------------------------------------------------------------------- actions


@pytest.mark.parametrize(("name", "method"), CASES)
def test_actions_are_those_of_the_eager_path(
    name: str, method: tuple[qsteer.Rule | None, qsteer.Sampler]
) -> None:
    policy, batches = hosts.shared(name), [hosts.observe(hosts.shared(name), 2, seed) for seed in range(3)]
    hosts.set_steps(policy, 3)
    actions, traces, randoms = [], [], []
    for mode in (None, "static"):
        rule, sampler = deepcopy(method)
        torch.manual_seed(3)
        with steer(policy, critic(policy), rule, sampler=sampler, compile=mode, trace=True) as handle:
            actions.append(torch.stack([policy.predict_action_chunk(batch) for batch in batches]))
        traces.append(handle.trace.arrays()["strength"])
        randoms.append(torch.get_rng_state())
    if name == "plain":
        assert torch.equal(*actions), "no step was prepared: the buffers alone change nothing"
    # a difference of velocities over h of 7e-4 makes their rounding larger
    tolerance = 5e-4 if isinstance(method[0], qsteer.ForwardTweedie) else 1e-4
    torch.testing.assert_close(*actions, rtol=tolerance, atol=tolerance)
    # and so does the bend of a curve through improvements of 1e-4 an automatic strength's
    spare = 5e-4 if getattr(method[0], "alpha", None) == "auto" else 1e-4
    torch.testing.assert_close(*map(torch.from_numpy, traces), rtol=1e-3, atol=spare, equal_nan=True)
    assert torch.equal(*randoms), "the host's own random stream"


def test_learnt_maps_see_the_observations_of_each_action() -> None:
    policy = hosts.shared("pi05")
    own = qsteer.open_action(policy, hosts.observe(policy, 2)).field
    shape = {"horizon": 6, "action_dim": 5, "features": own.features[0].shape[-1], "network": "transformer"}
    small = {"width": 16, "depth": 1, "heads": 2}
    meta = MetaFlowMap(MetaMapConfig(**shape, **small)).requires_grad_(False)
    jump = FlowMap(MapConfig(**shape, **small)).requires_grad_(False)
    for method in (qsteer.Posterior(meta, samples=2), qsteer.BeamSearch(2, 2, 1, flow_map=jump)):
        actions = []
        for mode in (None, "static"):
            torch.manual_seed(3)
            with steer(policy, critic(policy), method, compile=mode):
                actions.append([policy.predict_action_chunk(hosts.observe(policy, 2, s)) for s in range(2)])
        for eager, static in zip(*actions, strict=True):
            torch.testing.assert_close(static, eager, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(actions[1][0], actions[1][1], atol=1e-2)


def test_it_is_removed_without_a_trace(policy: nn.Module) -> None:
    batch, noise = hosts.observe(policy), hosts.draw(policy)
    base, before = (
        policy.predict_action_chunk(batch, noise=noise),
        set(vars(policy)) | set(vars(policy.model)),
    )
    with steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static"):
        assert not torch.equal(policy.predict_action_chunk(batch, noise=noise), base)
    assert set(vars(policy)) | set(vars(policy.model)) == before
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), base)


def test_a_copy_of_a_steered_policy_runs_its_own_weights(policy: nn.Module) -> None:
    batch, noise = hosts.observe(policy), hosts.draw(policy)
    with steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static"):
        steered = policy.predict_action_chunk(batch, noise=noise)
        twin = deepcopy(policy)
        for parameter in policy.parameters():
            parameter.data.mul_(0.5)
        try:
            assert torch.equal(twin.predict_action_chunk(batch, noise=noise), steered)
        finally:
            for parameter in policy.parameters():
                parameter.data.mul_(2.0)


def test_grad_modes(policy: nn.Module) -> None:
    actions, target = [], hosts.Target()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), steer(policy, target, qsteer.Tweedie(), compile="static"):
            actions.append(policy.predict_action_chunk(hosts.observe(policy), noise=hosts.draw(policy)))
    assert torch.equal(actions[0], actions[1])
    assert torch.equal(actions[0], actions[2])


def test_fallbacks_are_counted_for_every_action(policy: nn.Module) -> None:
    class Broken(hosts.Target):
        def score(self, a: Tensor, state: Tensor) -> Tensor:
            return super().score(a, state) * torch.nan

    counts = []
    for mode in (None, "static"):
        with steer(policy, Broken(), qsteer.Tweedie(), compile=mode) as handle:
            with pytest.warns(RuntimeWarning, match="non-finite"):
                policy.predict_action_chunk(hosts.observe(policy, 2))
            policy.predict_action_chunk(hosts.observe(policy, 2))
        counts.append(handle.trace.fallbacks)
    assert counts == [8, 8]  # 2 guided steps, 2 rows, 2 actions


# ------------------------------------------------------------------------------------------ buffers and kinds


def test_actions_of_a_kind_share_buffers_and_a_learning_critic_is_seen(policy: nn.Module) -> None:
    live = LiveCritic(critic(policy))
    batch, noise = hosts.observe(policy), hosts.draw(policy)

    def act() -> Tensor:
        return policy.predict_action_chunk(batch, noise=noise)

    with steer(policy, live, qsteer.Tweedie(), compile="static") as handle:
        first = act()
        places = [buffer.data_ptr() for buffer in runs(handle)[0].buffers]
        assert torch.equal(act(), first)
        live.publish(critic(policy, seed=5))
        second = act()
        assert len(runs(handle)) == 1
        assert [buffer.data_ptr() for buffer in runs(handle)[0].buffers] == places
        handle.swap(critic=critic(policy, seed=5))
        torch.testing.assert_close(act(), second)
        assert len(runs(handle)) == 2, "another network is another kind"
    assert not torch.allclose(first, second, atol=1e-3)


def test_few_kinds_are_kept(policy: nn.Module) -> None:
    with steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static") as handle:
        for rows in range(1, KEPT + 3):
            policy.predict_action_chunk(hosts.observe(policy, rows))
        assert len(runs(handle)) == KEPT
        assert runs(handle)[-1].buffers[0].shape[0] == KEPT + 2
        policy.predict_action_chunk(hosts.observe(policy, 4))
        handle.swap(rule=qsteer.QGF())
        policy.predict_action_chunk(hosts.observe(policy, 4))
        assert [run.kind.rule for run in runs(handle)[-2:]] == [qsteer.Tweedie(), qsteer.QGF()]


@pytest.mark.parametrize("mode", ["static", "inductor"])
def test_other_settings_of_a_network_are_another_kind(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that a network has as attributes are part of what is captured or compiled."""
    monkeypatch.setattr(inductor.compiler, "submit", lambda run: None)
    policy = hosts.shared("plain")
    steering, batch = critic(policy), hosts.observe(policy)
    with steer(policy, steering, qsteer.QGF(), compile=mode) as handle:
        policy.predict_action_chunk(batch)
        steering.config = replace(steering.config, rho=steering.config.rho + 1)
        policy.predict_action_chunk(batch)
        steering.temperature = 0.5
        policy.predict_action_chunk(batch)
        assert len(runs(handle)) == 3


def test_weights_elsewhere_or_another_rule_are_another_kind(policy: nn.Module) -> None:
    """A graph reads addresses; rules may hold what no comparison sees."""
    steering, batch = critic(policy), hosts.observe(policy)
    with steer(policy, steering, qsteer.Tweedie(), compile="static") as handle:
        policy.predict_action_chunk(batch)
        steering.load_state_dict(critic(policy, seed=5).state_dict())
        policy.predict_action_chunk(batch)
        assert len(runs(handle)) == 1
        steering.load_state_dict(critic(policy, seed=6).state_dict(), assign=True)
        policy.predict_action_chunk(batch)
        assert len(runs(handle)) == 2
        handle.swap(rule=qsteer.Tweedie())
        policy.predict_action_chunk(batch)
        assert len(runs(handle)) == 3


def test_autocast_is_that_of_the_eager_path(policy: nn.Module) -> None:
    actions = {}
    for mode in (None, "static"):
        with steer(policy, critic(policy), qsteer.Tweedie(), compile=mode) as handle:
            for enabled in (False, True):
                torch.manual_seed(3)
                with torch.autocast("cpu", torch.bfloat16, enabled):
                    actions[mode, enabled] = policy.predict_action_chunk(hosts.observe(policy, 2)).float()
            if mode is not None:
                assert len(runs(handle)) == 2
    torch.testing.assert_close(actions["static", False], actions[None, False], rtol=1e-4, atol=1e-4)
    cast, rounded = ((actions[mode, True] - actions[None, False]).norm() for mode in ("static", None))
    assert 0 < cast < 2 * rounded


class Named(NamedTuple):
    x: Tensor
    rest: dict[str, Tensor]


def test_a_tree_is_taken_apart_and_put_together() -> None:
    a, b, network = torch.zeros(2), torch.ones(3), nn.Linear(1, 1)
    value = qsteer.value(network, {"x": [a, (b, 4, None)]})
    assert tensors_in(value) == [a, b]
    other = rebuilt(value, iter([b, a]))
    assert other.fn is network
    assert other.context["x"][0] is b
    assert other.context["x"][1] == (a, 4, None)
    named = Named(a, OrderedDict(y=b))
    assert rebuilt(named, iter([b, a])) == Named(b, OrderedDict(y=a))
    assert type(rebuilt(named, iter([b, a])).rest) is OrderedDict
    assert signature(value, []) == signature(qsteer.value(network, {"x": [a + 1, (b + 1, 4, None)]}), [])
    for different in (
        qsteer.value(network, {"x": [a, (b, 5, None)]}),
        qsteer.value(network, {"y": [a, (b, 4, None)]}),
        qsteer.value(network, {"x": [b, (b, 4, None)]}),
        qsteer.value(nn.Linear(1, 1), {"x": [a, (b, 4, None)]}),
    ):
        assert signature(value, []) != signature(different, [])


class Asking(TorchDispatchMode):
    """Refuses what would wait for a device: reading a number, selecting by a mask, copying from the host."""

    REFUSED = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "_unique2")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.REFUSED:
            raise AssertionError(f"{name} cannot be captured")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_an_action_asks_the_device_nothing(
    name: str, method: tuple[qsteer.Rule | None, qsteer.Sampler]
) -> None:
    policy = hosts.shared(name)
    hosts.set_steps(policy, 4)
    rule, sampler = deepcopy(method)
    with steer(policy, critic(policy), rule, sampler=sampler, compile="static", trace=True) as handle:
        policy.predict_action_chunk(hosts.observe(policy))
        (run,) = runs(handle)
        with torch.no_grad(), Asking():
            run.act()


# ----------------------------------------------------------------------------------------------------- checks


def test_a_prepared_step_that_is_not_the_hosts_is_refused(
    policy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ExpertField.__call__

    def off(self: ExpertField, x: Tensor, t: Tensor) -> Tensor:
        return 1.001 * call(self, x, t)

    def without_gradient(self: ExpertField, x: Tensor, t: Tensor) -> Tensor:
        return call(self, x.detach(), t) + 0 * x

    for wrong, what in (
        (off, "the prepared velocity"),
        (without_gradient, "the prepared velocity's gradient"),
    ):
        monkeypatch.setattr(ExpertField, "__call__", wrong)
        with (
            steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static"),
            pytest.raises(RuntimeError, match=f"expected {what} to be .* leave compile out"),
        ):
            policy.predict_action_chunk(hosts.observe(policy))


def test_a_prepared_step_of_other_bounds_is_refused() -> None:
    policy = FlowPolicy(FlowPolicyConfig(3, 2, 4, (8,), bounds=(-1.0, 1.0)))
    mine, noise = policy.field(torch.zeros(1, 3)), torch.zeros(1, 4, 2)
    check_field(replace(mine), mine, noise)
    with pytest.raises(MismatchError, match=r"bounds to be the host's \(-1.0, 1.0\), got \(-1.0, 0.5\)"):
        check_field(replace(mine, bounds=(-1.0, 0.5)), mine, noise)


def test_a_value_that_hides_the_observation_is_refused() -> None:
    """A graph would steer every action by the first one's."""

    class Hidden(qsteer.Value):
        def __init__(self, obs: Any) -> None:
            self.obs = obs

        def __call__(self, a: Tensor) -> Tensor:
            return a.flatten(1).sum(1)

        def repeat(self, k: int) -> "Hidden":
            return self

    class Hiding(hosts.Target):
        def bind(self, obs: Any) -> Any:
            return Hidden(obs)

    policy = hosts.shared("pi05")
    with (
        steer(policy, Hiding(), qsteer.Tweedie(), compile="static"),
        pytest.raises(TypeError, match=r"expected a frozen dataclass, .* got Hidden"),
    ):
        policy.predict_action_chunk(hosts.observe(policy))


class Unprepared(hosts.Plain):
    @property
    def __qsteer_host__(self) -> Host:
        return replace(super().__qsteer_host__, prepare=None)


def test_what_cannot_be_is_refused() -> None:
    policy = hosts.shared("pi05")
    with pytest.raises(
        ValueError, match="expected a policy on one CUDA device for 'graph', got cpu; use compile='static'"
    ):
        steer(policy, hosts.Target(), compile="graph")
    with (
        as_installed(),
        pytest.raises(ValueError, match="expected one of static, graph, inductor or None, got 'max'"),
    ):
        steer(policy, hosts.Target(), compile="max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a policy whose step .*SmolVLAPolicy.*, got Unprepared"):
        steer(Unprepared(0), hosts.Target(), compile="static")
    free = PlainPolicy(lambda x, t, obs: -x, horizon=4, action_dim=3)
    with pytest.raises(ValueError, match="got no parameters"):
        steer(free, hosts.Target(), compile="graph")


def test_a_residual_flow_map_looks_its_times_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy behind it is asked at floats: what pi0.5 knows of a time is evaluated once."""
    policy, evaluated = hosts.shared("pi05"), []
    evaluate = PiExpert.evaluate
    monkeypatch.setattr(PiExpert, "evaluate", lambda self, u: evaluated.append(len(u)) or evaluate(self, u))
    features, _ = qsteer.open_action(policy, hosts.observe(policy)).field.features
    config = MapConfig(6, 5, features.shape[-1], "transformer", width=16, depth=1, heads=2, residual=True)
    sampler = qsteer.BeamSearch(2, 2, 1, flow_map=FlowMap(config))
    with steer(policy, critic(policy), sampler, compile="static"):
        policy.predict_action_chunk(hosts.observe(policy))
        evaluated.clear()
        policy.predict_action_chunk(hosts.observe(policy))
    assert evaluated == []


@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_changed_weights_of_the_policy_are_seen(name: str) -> None:
    policy = hosts.build(name, seed=3)
    batch, noise = hosts.observe(policy), hosts.draw(policy)
    with steer(policy, critic(policy), qsteer.QGF(), compile="static"):
        before = policy.predict_action_chunk(batch, noise=noise)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1.05)
        after = policy.predict_action_chunk(batch, noise=noise)
    with steer(policy, critic(policy), qsteer.QGF()):
        eager = policy.predict_action_chunk(batch, noise=noise)
    torch.testing.assert_close(after, eager, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_kinds_tell_types_apart() -> None:
    values = [qsteer.value(abs, {"scale": scale}) for scale in (1, 1.0, True)]
    assert len({signature(value, []) for value in values}) == 3


# ------------------------------------------------------------------------------------ changes between actions


def assign(policy: nn.Module) -> None:
    policy.load_state_dict({name: 1.05 * weight for name, weight in policy.state_dict().items()}, assign=True)


def replace_memory(policy: nn.Module) -> None:
    for weight in policy.parameters():
        weight.data = 1.05 * weight.data


def layers(policy: nn.Module) -> Any:
    return host_of(policy).read(policy, host_of(policy).layers)


def replace_module(policy: nn.Module) -> None:
    attention = layers(policy)[0].self_attn
    attention.q_proj = deepcopy(attention.q_proj)
    attention.q_proj.weight.data.mul_(1.5)


@pytest.mark.parametrize("change", [assign, replace_memory, replace_module])
@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_weights_and_modules_put_in_the_place_of_others_are_seen(name: str, change: Any) -> None:
    policy = hosts.build(name, seed=3)
    hosts.set_steps(policy, 3)
    batch, noise = hosts.observe(policy), hosts.draw(policy)
    with steer(policy, critic(policy), qsteer.QGF(), compile="static"):
        before = policy.predict_action_chunk(batch, noise=noise)
        change(policy)
        after = policy.predict_action_chunk(batch, noise=noise)
    with steer(policy, critic(policy), qsteer.QGF()):
        eager = policy.predict_action_chunk(batch, noise=noise)
    torch.testing.assert_close(after, eager, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_a_hook_or_an_adapter_put_on_later_is_refused(name: str) -> None:
    """The prepared step reads matrices: what is around them is compared with the host's again."""
    policy = hosts.build(name, seed=3)
    hosts.set_steps(policy, 3)
    layer = layers(policy)[0].mlp
    with steer(policy, hosts.Target(), qsteer.QGF(), compile="static"):
        policy.predict_action_chunk(hosts.observe(policy))
        hook = layer.register_forward_hook(lambda module, args, result: 1.5 * result)
        with pytest.raises(RuntimeError, match="expected the prepared velocity to be the host's"):
            policy.predict_action_chunk(hosts.observe(policy))
        hook.remove()
        policy.predict_action_chunk(hosts.observe(policy))
        layer._disable_adapters, layer.gate_proj = False, Adapter(layer.gate_proj)
        policy.predict_action_chunk(hosts.observe(policy))
        layer.gate_proj._disable_adapters = False
        with pytest.raises(RuntimeError, match="expected the prepared velocity to be the host's"):
            policy.predict_action_chunk(hosts.observe(policy))


class Adapter(nn.Module):
    """As PEFT has it: another weight beside the layer's, until it is disabled."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self._disable_adapters = base, True

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * (1.0 if self._disable_adapters else 1.5)


def test_modes_and_switches_of_torch_are_part_of_a_kind() -> None:
    policy, steering = hosts.shared("plain"), critic(hosts.shared("plain"))
    hosts.set_steps(policy, 3)
    torch.set_float32_matmul_precision("highest")
    with steer(policy, steering, qsteer.QGF(), compile="static") as handle:

        def kinds() -> int:
            policy.predict_action_chunk(hosts.observe(policy))
            return len(runs(handle))

        assert kinds() == 1
        try:
            torch.set_float32_matmul_precision("high")
            assert kinds() == 2
        finally:
            torch.set_float32_matmul_precision("highest")
        steering.train(not steering.training)
        assert kinds() == 3
        steering.train(not steering.training)
        assert kinds() == 3
        policy.train(not policy.training)
        assert kinds() == 1, "the policy is prepared anew"
        policy.train(not policy.training)


def test_a_map_with_weights_elsewhere_is_another_kind() -> None:
    policy = PlainPolicy(lambda x, t, obs: obs[:, None, :3] - x, horizon=5, action_dim=3, executed=4)
    jump = FlowMap(MapConfig(5, 3, 4, width=16, depth=1)).requires_grad_(False)
    sampler = qsteer.BeamSearch(2, 2, 1, flow_map=jump)
    with steer(policy, critic(policy), sampler, compile="static") as handle:
        policy.predict_action_chunk(torch.ones(1, 4))
        jump.load_state_dict({name: 2 * weight for name, weight in jump.state_dict().items()}, assign=True)
        policy.predict_action_chunk(torch.ones(1, 4))
        assert len(runs(handle)) == 2

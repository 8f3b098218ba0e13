"""The fast path: the host's own function, on buffers that stay, asking the device nothing."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import hosts
import numpy as np
import pytest
import torch
from fields import as_installed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.adapters.pi import PiExpert, PiField
from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.hosts import HostField
from qsteer.maps import FlowMap, GlassPosterior, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.steering.compiled import KEPT, GraphRun, rebuilt, signature, tensors_in
from qsteer.steering.handle import steer, unsteer

PI = ("pi0", "pi05")
GLASS = GlassPosterior(steps=2)
METHODS: tuple[tuple[qsteer.Rule | None, qsteer.Sampler], ...] = (
    (None, qsteer.Euler()),
    (qsteer.Tweedie(alpha=0.3), qsteer.Euler()),
    (qsteer.Tweedie(alpha="auto"), qsteer.Euler()),
    (qsteer.Tweedie(alpha=0.3, start=0.4, stop=0.8), qsteer.Euler(steps=7)),
    (qsteer.Tweedie(every=2), qsteer.Euler(steps=7)),
    (qsteer.ForwardTweedie(), qsteer.Euler()),
    (qsteer.ForwardTweedie(stale=True), qsteer.Euler()),
    (qsteer.QGF(), qsteer.Euler()),
    (qsteer.NoisyGradient(), qsteer.Euler()),
    (qsteer.ThroughTime(), qsteer.Euler()),
    (qsteer.Posterior(GLASS, samples=3), qsteer.Euler()),
    (qsteer.GradientFreePosterior(GLASS, samples=3), qsteer.Euler()),
    (qsteer.RandomDirection(), qsteer.Euler()),
    (qsteer.Negated(qsteer.Tweedie()), qsteer.Euler()),
    (qsteer.Gated(qsteer.Tweedie()), qsteer.Euler()),
    (None, qsteer.BestOfN(4)),
    (None, qsteer.RandomOfN(4)),
    (None, qsteer.TrustRegion(beta=0.5)),
    (None, qsteer.BeamSearch(2, 2, 1)),
    (qsteer.Tweedie(), qsteer.KeepBest()),
    (qsteer.Tweedie(), qsteer.BestOfN(3)),
)
CASES = [
    pytest.param(name, method, id=f"{name}-{method[0]}-{method[1]}")
    for name in (*PI, "plain")
    for method in (METHODS[:4] if name == "pi0" else METHODS)
]


@pytest.fixture(params=PI)
def policy(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    policy = hosts.shared(request.param)
    hosts.set_steps(policy, 10)
    yield policy
    unsteer(policy)


def fields(policy: nn.Module, rows: int = 2, **changed: Tensor) -> tuple[HostField, PiField]:
    """The host's field, and the prepared one, for random observations."""
    seen: list[Any] = []
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        policy.predict_action_chunk(hosts.observe(policy, rows) | changed)
    return seen[0][0], PiExpert(policy)(seen[0][0])


def pulled(field: qsteer.Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity, and its vector-Jacobian product in a fixed direction."""
    x = x.clone().requires_grad_()
    v = field(x, t)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return v.detach(), torch.autograd.grad(v, x, direction)[0]


def critic(policy: nn.Module, seed: int = 0) -> Critic:
    """A small critic that fits the tiny hosts, with gradients that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(16, 16)))


# The prepared step


@pytest.mark.parametrize("each", [1, 3])
def test_the_prepared_step_is_the_hosts(policy: nn.Module, each: int) -> None:
    own, prepared = fields(policy)
    draw = torch.Generator().manual_seed(1)
    for time in (0.0, 0.3, 0.9):
        x = torch.randn(2 * each, 6, 5, generator=draw)
        t = torch.full((2 * each,), time, dtype=torch.float64)
        expected, got = pulled(own.repeat(each), x, t), pulled(prepared.repeat(each), x, t)
        for ours, its in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5 * float(its.abs().max()))


def test_it_depends_on_the_prefix_the_state_and_the_time(policy: nn.Module) -> None:
    x, t = torch.randn(2, 6, 5), torch.full((2,), 0.3, dtype=torch.float64)
    _, prepared = fields(policy)
    v = prepared(x, t)
    assert not torch.allclose(v, prepared(x, t + 0.2), atol=1e-4)
    other = replace(prepared, values=tuple(-values for values in prepared.values))
    assert not torch.allclose(v, other(x, t), atol=1e-4)
    if prepared.state is not None:
        assert not torch.allclose(v, replace(prepared, state=-prepared.state)(x, t), atol=1e-4)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gradient_through_the_last_layers_is_the_hosts(policy: nn.Module, layers: int) -> None:
    own, prepared = (field.truncated(layers) for field in fields(policy))
    x, t = torch.randn(2, 6, 5), torch.full((2,), 0.3, dtype=torch.float64)
    for ours, its in zip(pulled(prepared, x, t), pulled(own, x, t), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)
    whole = pulled(fields(policy)[1], x, t)[1]
    assert torch.allclose(pulled(prepared, x, t)[1], whole, atol=1e-5) == (layers == 2)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        prepared.truncated(3)


def test_absent_tokens_of_the_prefix_are_not_seen(policy: nn.Module) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    own, prepared = fields(policy, **{"observation.language.attention_mask": mask})
    assert not prepared.present.all()
    x, t = torch.randn(4, 6, 5), torch.full((4,), 0.5, dtype=torch.float64)
    for ours, its in zip(pulled(prepared.repeat(2), x, t), pulled(own.repeat(2), x, t), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)


def test_rows_may_have_times_of_their_own(policy: nn.Module) -> None:
    own, prepared = fields(policy)
    x, t = torch.randn(2, 6, 5), torch.tensor([0.2, 0.7], dtype=torch.float64)
    torch.testing.assert_close(prepared(x, t), own(x, t), rtol=1e-5, atol=1e-5)


def test_its_features_are_the_hosts(policy: nn.Module) -> None:
    own, prepared = fields(policy)
    for ours, its in zip(prepared.repeat(2).features, own.repeat(2).features, strict=True):
        assert torch.equal(ours, its)


def test_in_bfloat16_it_is_as_close_to_float32_as_the_host() -> None:
    """Rounding is not ours to remove, but not ours to add either."""
    policy = hosts.random_hosts.pi05(64, 6, dtype=torch.bfloat16)
    own, prepared = fields(policy.requires_grad_(False))
    exact = deepcopy(policy)
    exact.model.paligemma_with_expert.float()
    wide = {name: tuple(part.float() for part in getattr(prepared, name)) for name in ("keys", "values")}
    truth = replace(prepared, expert=PiExpert(exact), **wide)
    x, t = torch.randn(2, 6, 5), torch.full((2,), 0.3, dtype=torch.float64)
    for ours, its, true in zip(*(pulled(field, x, t) for field in (prepared, own, truth)), strict=True):
        assert 1e-4 < (its - true).norm() / true.norm() < 0.08
        assert (ours - true).norm() < 1.5 * (its - true).norm()


def test_what_depends_on_the_time_alone_is_evaluated_once(
    policy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    evaluate = PiExpert._evaluate

    def counted(self: PiExpert, u: Tensor) -> Any:
        calls.append(float(u[0]))
        return evaluate(self, u)

    monkeypatch.setattr(PiExpert, "_evaluate", counted)
    with steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static"):
        for seed in range(3):
            policy.predict_action_chunk(hosts.observe(policy, 1, seed))
    assert len(calls) == len(set(calls)) == 10


def test_candidates_share_one_prefix(policy: nn.Module) -> None:
    _, prepared = fields(policy)
    many = prepared.repeat(2).repeat(10)
    assert many.each == 20
    assert all(a is b for a, b in zip(many.keys, prepared.keys, strict=True))


# Actions


@pytest.mark.parametrize(("name", "method"), CASES)
def test_actions_are_those_of_the_eager_path(
    name: str, method: tuple[qsteer.Rule | None, qsteer.Sampler]
) -> None:
    policy, batches = hosts.shared(name), [hosts.observe(hosts.shared(name), 2, seed) for seed in range(3)]
    hosts.set_steps(policy, 4)
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
    torch.testing.assert_close(*actions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*map(torch.from_numpy, traces), rtol=1e-3, atol=1e-4, equal_nan=True)
    assert torch.equal(*randoms), "the host's own random stream"


def test_learnt_maps_see_the_observations_of_each_action() -> None:
    policy = hosts.shared("pi05")
    own, _ = fields(policy)
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
    assert counts == [36, 36]  # 9 guided steps, 2 rows, 2 actions


# Buffers and kinds


def runs(handle: Any) -> list[Any]:
    return list(handle._compiled._runs.values())


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
        assert [run.rule for run in runs(handle)[-2:]] == [qsteer.Tweedie(), qsteer.QGF()]


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


def test_streams_of_graphs_that_are_gone_are_used_again(recorded: None) -> None:
    policy = hosts.shared("pi05")
    with steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static") as handle:
        handle._compiled.mode = "graph"
        streams = []
        for rows in range(1, 2 * KEPT):
            policy.predict_action_chunk(hosts.observe(policy, rows))
            streams.append(runs(handle)[-1].stream)
        assert len(runs(handle)) == len(set(streams)) == KEPT
        assert streams[KEPT:] == streams[: KEPT - 1]


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


# Checks


def test_a_prepared_step_that_is_not_the_hosts_is_refused(
    policy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = PiField.__call__

    def off(self: PiField, x: Tensor, t: Tensor) -> Tensor:
        return 1.001 * call(self, x, t)

    def without_gradient(self: PiField, x: Tensor, t: Tensor) -> Tensor:
        return call(self, x.detach(), t) + 0 * x

    for wrong, what in (
        (off, "the prepared velocity"),
        (without_gradient, "the prepared velocity's gradient"),
    ):
        monkeypatch.setattr(PiField, "__call__", wrong)
        with (
            steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static"),
            pytest.raises(RuntimeError, match=f"expected {what} to be .* leave compile out"),
        ):
            policy.predict_action_chunk(hosts.observe(policy))


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


def test_what_cannot_be_is_refused() -> None:
    policy = hosts.shared("pi05")
    with pytest.raises(
        ValueError, match="expected a policy on one CUDA device for 'graph', got cpu; use compile='static'"
    ):
        steer(policy, hosts.Target(), compile="graph")
    with as_installed(), pytest.raises(ValueError, match="expected one of static, graph or None, got 'max'"):
        steer(policy, hosts.Target(), compile="max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a policy whose step .*, got SmolVLAPolicy"):
        steer(hosts.shared("smolvla"), hosts.Target(), compile="static")
    free = PlainPolicy(lambda x, t, obs: -x, horizon=4, action_dim=3)
    with pytest.raises(ValueError, match="got no parameters"):
        steer(free, hosts.Target(), compile="graph")


# The graph: its book-keeping on the CPU, where a replay is an eager run into the same places; then on CUDA


class Recorder:
    """Stands in for torch.cuda: what is captured is computed again by each replay."""

    captured: GraphRun | None = None
    seen: ClassVar[list[str]] = []

    class CUDAGraph:
        def __init__(self) -> None:
            self.generators: list[torch.Generator] = []

        def register_generator_state(self, generator: torch.Generator) -> None:
            self.generators.append(generator)

        def replay(self) -> None:
            assert Recorder.captured is not None
            with torch.no_grad():
                action, found = Recorder.captured.act()
                Recorder.captured.action.copy_(action)
                for kept, fresh in zip(Recorder.captured.found.steps, found.steps, strict=True):
                    assert kept.t == fresh.t
                    for part in ("strength", "gradient_norm", "value", "value_std"):
                        getattr(kept, part).copy_(getattr(fresh, part))

    class Stream:
        __class__ = torch.cuda.Stream  # to type checks at run time

        def __init__(self, *_: object) -> None:
            pass

        def wait_stream(self, _: object) -> None:
            Recorder.seen.append("wait")

    @staticmethod
    @contextmanager
    def nothing(*_: object, **__: object) -> Iterator[None]:
        yield


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture on the CPU."""
    for name, stand_in in (
        ("CUDAGraph", Recorder.CUDAGraph),
        ("Stream", Recorder.Stream),
        ("current_stream", Recorder.Stream),
        ("stream", Recorder.nothing),
        ("graph", Recorder.nothing),
        ("device", Recorder.nothing),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    check = GraphRun.check

    def known_by_the_graph(self: GraphRun) -> None:
        Recorder.captured = self
        check(self)

    monkeypatch.setattr(GraphRun, "check", known_by_the_graph)


@pytest.mark.parametrize(
    "method",
    [(qsteer.Tweedie(), None), (qsteer.RandomDirection(), None), (None, qsteer.BestOfN(3))],
    ids=["tweedie", "random", "best-of-3"],
)
def test_a_replayed_action_is_the_static_one(
    recorded: None, method: tuple[qsteer.Rule | None, qsteer.Sampler | None]
) -> None:
    policy = hosts.shared("pi05")
    hosts.set_steps(policy, 4)
    actions, traces, randoms = [], [], []
    for mode in ("static", "graph"):
        rule, sampler = deepcopy(method)
        torch.manual_seed(3)
        with steer(policy, critic(policy), rule, sampler=sampler, compile="static", trace=True) as handle:
            handle._compiled.mode = mode
            actions.append([policy.predict_action_chunk(hosts.observe(policy, 2, s)) for s in range(3)])
        traces.append(handle.trace.arrays()["strength"])
        randoms.append(torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*actions, strict=True)), "actions are copies of their own"
    assert np.array_equal(*traces)
    assert torch.equal(*randoms), "rehearsals, capture and check draw nothing from the user's stream"


def test_a_graph_that_does_something_else_is_refused(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder.CUDAGraph, "replay", lambda self: None)  # keeps the action of the capture
    policy = hosts.shared("pi05")
    with steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static") as handle:
        handle._compiled.mode = "graph"
        with pytest.raises(RuntimeError, match=r"expected the graph's action to be .* got"):
            policy.predict_action_chunk(hosts.observe(policy))
        assert not runs(handle)


def test_the_critic_encodes_its_observation_beside_the_prefix(
    recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, seen = hosts.shared("pi05"), Recorder.seen
    embed, bind = policy.model.embed_prefix, hosts.Target.bind

    def prefix(*args: Any) -> Any:
        seen.append("prefix")
        return embed(*args)

    def encode(self: Any, obs: Any) -> Any:
        seen.append("critic")
        return bind(self, obs)

    monkeypatch.setattr(policy.model, "embed_prefix", prefix)
    monkeypatch.setattr(hosts.Target, "bind", encode)
    actions = []
    for mode, expected in (
        ("static", ["prefix", "critic"]),
        ("graph", ["wait", "critic", "prefix", "wait"]),
    ):
        with steer(policy, hosts.Target(), qsteer.QGF(), compile="static") as handle:
            handle._compiled.mode = mode
            policy.predict_action_chunk(hosts.observe(policy))  # with what a capture waits for
            seen.clear()
            torch.manual_seed(3)
            actions.append(policy.predict_action_chunk(hosts.observe(policy)))
        assert seen == expected
    assert torch.equal(*actions)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "method"), CASES)
def test_on_a_gpu_the_graph_is_the_static_path(
    name: str, method: tuple[qsteer.Rule | None, qsteer.Sampler]
) -> None:
    policy = hosts.build(name).cuda()
    hosts.set_steps(policy, 4)
    batches = [hosts.observe(policy, 2, seed) for seed in range(3)]
    batches = [{key: value.cuda() for key, value in batch.items()} for batch in batches]
    actions, traces = [], []
    for mode in ("static", "graph"):
        rule, sampler = deepcopy(method)
        torch.manual_seed(3)
        live = LiveCritic(critic(policy).cuda())
        with steer(policy, live, rule, sampler=sampler, compile=mode, trace=True) as handle:
            first = [policy.predict_action_chunk(batch) for batch in batches]
            live.publish(critic(policy, seed=5).cuda())
            actions.append([*first, *(policy.predict_action_chunk(batch) for batch in batches)])
            assert len(runs(handle)) == 1
        traces.append(torch.from_numpy(handle.trace.arrays()["strength"]))
    for static, replayed in zip(*actions, strict=True):
        torch.testing.assert_close(replayed, static, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*traces, rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_flat_and_kinds_are_bounded() -> None:
    policy = hosts.build("pi05").cuda()
    with steer(policy, critic(policy).cuda(), qsteer.Tweedie(), compile="graph") as handle:
        sizes = []
        for count in range(40):
            rows = 1 + count % (KEPT + 2)
            batch = {key: value.cuda() for key, value in hosts.observe(policy, rows).items()}
            policy.predict_action_chunk(batch)
            torch.cuda.synchronize()
            sizes.append(torch.cuda.memory_reserved())  # that of the graphs' pools too
        assert len(runs(handle)) == KEPT
    assert max(sizes[20:]) <= 1.05 * max(sizes[:20])

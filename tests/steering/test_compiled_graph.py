"""The graph: its book-keeping on the CPU, where a replay runs eagerly into the same places; then on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar

import hosts
import numpy as np
import pytest
import torch
from compiled_cases import CASES, critic, runs

import qsteer
from qsteer.compiling.kept import KEPT
from qsteer.compiling.runs import Captured, GraphRun
from qsteer.critics import LiveCritic
from qsteer.steering.handle import steer


class Recorder:
    """Stands in for torch.cuda: what is captured is computed again by each replay."""

    captured: Captured | None = None
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
        Recorder.captured = self.captured
        check(self)

    monkeypatch.setattr(GraphRun, "check", known_by_the_graph)


def test_streams_of_graphs_that_are_gone_are_used_again(recorded: None) -> None:
    policy = hosts.shared("pi05")
    with steer(policy, hosts.Target(), qsteer.Tweedie(), compile="static") as handle:
        handle._compiled.kept.mode = "graph"
        streams = []
        for rows in range(1, 2 * KEPT):
            policy.predict_action_chunk(hosts.observe(policy, rows))
            streams.append(runs(handle)[-1].stream)
        assert len(runs(handle)) == len(set(streams)) == KEPT
        assert streams[KEPT:] == streams[: KEPT - 1]


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
            handle._compiled.kept.mode = mode
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
        handle._compiled.kept.mode = "graph"
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
            handle._compiled.kept.mode = mode
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

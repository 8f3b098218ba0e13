"""Compiled actions: the line of operators is the eager action, for every method; and what compiles it."""

import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import hosts
import pytest
import torch
from compiled_cases import METHODS, PREPARED, critic, runs
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.compiling import inductor, lines
from qsteer.compiling.cuts import Part
from qsteer.compiling.inductor import InductorRun, explain
from qsteer.compiling.kinds import tensors_in
from qsteer.compiling.lines import Replayed, read, trace
from qsteer.compiling.runs import Kind, unlike, unmoved
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.sampling import FastSampling
from qsteer.steering.handle import steer

CASES = [
    pytest.param(name, method, id=f"{name}-{method[0]}-{method[1]}", marks=marks)
    for name, marks in (*((name, pytest.mark.slow) for name in PREPARED), ("plain", ()))
    for method in METHODS
]
QUICK = [
    pytest.param(name, METHODS[1], id=name, marks=() if name == "pi05" else pytest.mark.slow)
    for name in PREPARED
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions are not compiled."""
    monkeypatch.setattr(inductor.compiler, "submit", lambda run: None)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("name", "method"), [*CASES, *QUICK])
@pytest.mark.parametrize("many", [0, 10**9], ids=["cut", "whole"])
def test_a_line_is_the_eager_action(
    name: str,
    method: tuple[qsteer.Rule | None, qsteer.Sampler],
    many: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "MANY", many)
    policy, steering = hosts.shared(name), critic(hosts.shared(name))
    hosts.set_steps(policy, 2)
    rule, sampler = deepcopy(method)
    with steer(policy, steering, rule, sampler=sampler, compile="inductor", trace=True) as handle:
        policy.predict_action_chunk(hosts.observe(policy, 2))
        (run,) = runs(handle)
        line = trace(run.act, run.buffers, run.draws)
        assert (len(line.calls) > 1) == (many == 0)
        for changed in (False, True):
            with torch.no_grad():
                for weight in steering.parameters() if changed else ():
                    weight.mul_(1.1)  # it has learnt
                with unmoved(rule, run.kind.device):
                    buffers = [unlike(buffer) for buffer in run.buffers]
                    drawn = [draw() for draw in run.draws]
                with Replayed(drawn):
                    action, record = run.act(buffers)
                found = line.run([read(part.source) for part in line.parts], [*buffers, *drawn])
            torch.testing.assert_close(found[0], action)
            assert len(found[2]) == len(record.steps)
    hosts.set_steps(policy, 10)


@pytest.mark.usefixtures("uncompiled")
def test_until_it_is_compiled_the_eager_action_acts() -> None:
    policy = hosts.shared("plain")
    actions = []
    for mode in ("static", "inductor"):
        torch.manual_seed(3)
        rule = qsteer.RandomDirection(redraw=True)
        with steer(policy, critic(policy), rule, sampler=qsteer.BestOfN(2), compile=mode):
            actions.append(
                torch.stack([policy.predict_action_chunk(hosts.observe(policy, 2)) for _ in range(3)])
            )
    assert torch.equal(*actions)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place of its own for what is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("compiled")
        patch.setattr(inductor, "cache_directory", lambda: path)
        yield path


@pytest.mark.slow  # a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_an_action_is_compiled_kept_and_found_again(cache: Path) -> None:
    """Random numbers are those of the eager action, and a critic that learns is seen."""
    policy, batch = hosts.build("plain"), hosts.observe(hosts.shared("plain"), 2)
    hosts.set_steps(policy, 2)
    actions: dict[str, list[Tensor]] = {}
    for again in range(2):
        for mode in ("static", "inductor"):
            steering, rule = critic(policy), qsteer.Randomized(qsteer.QGF(weight=0.3))
            with steer(policy, steering, rule, compile=mode, trace=True) as handle:
                policy.predict_action_chunk(batch)
                assert handle.finish_compiling()
                if mode == "inductor":
                    (run,) = runs(handle)
                    assert ("found on the disk" if again else "compiled in") in run.state, run.state
                torch.manual_seed(4)
                found = [policy.predict_action_chunk(batch)]
                with torch.no_grad():
                    for weight in steering.parameters():
                        weight.mul_(1.2)
                found += [policy.predict_action_chunk(batch), torch.get_rng_state()]
                if mode == "inductor":
                    assert run._compiled is not None, run.state
            actions[mode] = found
            assert len(handle.trace.actions) == 3
        for eager, compiled in zip(*actions.values(), strict=True):
            torch.testing.assert_close(compiled, eager)
    assert len(list(cache.iterdir())) == 1


def broken(said: str) -> Any:
    class Broken:
        returncode = 1

        def __init__(self, *args: Any, **options: Any) -> None:
            pass

        def communicate(self) -> tuple[None, str]:
            return None, said

        def kill(self) -> None:
            pass

    return Broken


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "...\ntorch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found\n",
            r"apt-get install g\+\+",
        ),
        ("...\nCppCompileError: out of disk\n\n", "CppCompileError: out of disk"),
    ],
)
def test_where_nothing_can_be_compiled_one_line_says_so_and_eager_goes_on(
    said: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(subprocess, "Popen", broken(said))
    policy = hosts.shared("plain")
    batch, noise = hosts.observe(policy, 1), hosts.draw(policy, 1, 0)
    with steer(policy, critic(policy), qsteer.QGF()):
        own = policy.predict_action_chunk(batch, noise=noise)
    with steer(policy, critic(policy), qsteer.QGF(), compile="inductor") as handle:
        policy.predict_action_chunk(batch, noise=noise)
        assert handle.finish_compiling()
        with pytest.warns(
            RuntimeWarning, match=f"that Inductor compiles, got: .*{shown}.*; the eager action"
        ):
            assert torch.equal(policy.predict_action_chunk(batch, noise=noise), own)
        assert torch.equal(policy.predict_action_chunk(batch, noise=noise), own), "and it is said once"


def test_a_compiled_action_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(parts: list[Part]) -> tuple[list[Path], int]:
        return [Path(part.source) for part in parts], 0

    def load(path: Path, device: torch.device) -> Any:
        part = read(str(path))
        return lambda tensors: [1.1 * x if x.is_floating_point() else x for x in part(tensors)]

    monkeypatch.setattr(inductor, "build", off)
    monkeypatch.setattr(inductor, "load", load)
    policy = hosts.shared("plain")
    batch, noise = hosts.observe(policy, 1), hosts.draw(policy, 1, 0)
    with steer(policy, critic(policy), qsteer.QGF(), compile="inductor") as handle:
        own = policy.predict_action_chunk(batch, noise=noise)
        assert handle.finish_compiling()
        with pytest.warns(RuntimeWarning, match="expected the compiled action to be the host's"):
            assert torch.equal(policy.predict_action_chunk(batch, noise=noise), own)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is run as it is written down."""
    monkeypatch.setattr(inductor, "build", lambda parts: ([Path(part.source) for part in parts], 0))
    monkeypatch.setattr(inductor, "load", lambda path, device: read(str(path)))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("live", [False, True], ids=["critic", "live critic"])
def test_a_plain_policy_is_compiled_from_the_observation_on(live: bool) -> None:
    """Its own noise, too; other observations and what the networks learn are seen."""
    network = FlowPolicy(FlowPolicyConfig(3, 2, 5, (8, 8)))
    policy = PlainPolicy(lambda x, t, obs: network(obs, x, t), 5, 2)
    teacher = qsteer.Critic(qsteer.CriticConfig(3, 2, 5, (8, 8), 2))
    judge = qsteer.LiveCritic(teacher) if live else teacher
    rule, actions = qsteer.Randomized(qsteer.QGF(weight=0.5)), []
    for mode in (None, "inductor"):
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in (*network.parameters(), *teacher.parameters()):
                weight.copy_(torch.randn(weight.shape))
        if live:
            judge.publish(teacher)
        with steer(policy, judge, deepcopy(rule), compile=mode) as handle:
            policy.predict_action_chunk(torch.randn(4, 3))
            assert handle.finish_compiling()
            found = [policy.predict_action_chunk(torch.randn(4, 3)) for _ in range(2)]
            with torch.no_grad():
                for weight in (*network.parameters(), *teacher.parameters()):
                    weight.mul_(1.3)
            if live:
                judge.publish(teacher)
            found.append(policy.predict_action_chunk(torch.randn(4, 3)))
            noise = torch.randn(4, 5, 2)
            found.append(policy.predict_action_chunk(torch.randn(4, 3), noise=noise, num_steps=3))
            found.append(torch.get_rng_state())
            if mode is not None:
                whole, given = runs(handle)
                assert len(tensors_in(whole.kind.inputs)) == 2 and len(tensors_in(given.kind.inputs)) == 3
                assert whole.state.startswith("found"), whole.state
        actions.append(found)
    for eager, compiled in zip(*actions, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.usefixtures("interpreted")
def test_on_cuda_the_compiled_action_is_what_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed on the CPU, where what stands in for a graph computes the compiled action again."""
    captured = []

    class Captured:
        def __init__(self, act: Any, rule: Any, device: torch.device, stream: Any) -> None:
            self.act, self.stream = act, stream
            captured.append(self)

        def __call__(self, trace: qsteer.Trace) -> Tensor:
            return self.act()[0]

    class Stream:
        __class__ = torch.cuda.Stream  # to type checks at run time

    monkeypatch.setattr(inductor, "Captured", Captured)
    noise = torch.randn(3, 5, 2)
    kind = Kind(lambda inputs: inputs[0] * 2, (noise,), None, (False, False), [], noise.device)
    run = InductorRun(kind, stream := cast(torch.cuda.Stream, Stream()))
    assert run.finished.wait(60)
    for x in (noise, noise + 1):
        assert torch.equal(run([x], qsteer.Trace()), 2 * x)
    assert [each.stream for each in captured] == [stream] and captured[0].act == run.again


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.4)], ids=["unsteered", "Tweedie"])
def test_a_bare_chain_is_compiled(rule: qsteer.Rule | None) -> None:
    policy = FlowPolicy(FlowPolicyConfig(3, 2, 5, (8, 8)))
    judge = qsteer.Critic(qsteer.CriticConfig(3, 2, 5, (8, 8), 2))
    fast = FastSampling("inductor", wait=True)
    traces = [qsteer.Trace(), qsteer.Trace()]
    for _ in range(3):
        obs, noise = torch.randn(4, 3), torch.randn(4, 5, 2)
        found = [
            qsteer.sample(policy.field(obs), judge.bind(obs), noise, rule=rule, trace=trace, compile=compile)
            for trace, compile in zip(traces, (None, fast), strict=True)
        ]
        torch.testing.assert_close(*found)
        assert "found on the disk" in fast.states[0] and len(fast.states) == 1
    assert str(traces[0]) == str(traces[1]) and len(traces[0].displacements) == 3


def test_a_bare_chain_refuses_what_it_would_keep_from_the_first_action_on() -> None:
    noise, goal = torch.randn(1, 5, 2), torch.randn(1, 5, 2)
    with pytest.raises(TypeError, match="got 1 other tensor"):
        qsteer.sample(qsteer.field(lambda x, t: goal - x), None, noise, compile="inductor")
    with pytest.raises(ValueError, match="expected one of static, graph, inductor or None, got 'fast'"):
        qsteer.sample(qsteer.field(lambda x, t: -x), None, noise, compile="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected noise on a CUDA device"):
        qsteer.sample(qsteer.field(lambda x, t: -x), None, noise, compile="graph")

    class Bare(qsteer.Field):
        def __call__(self, x: Tensor, t: Any) -> Tensor:
            return -x

        def repeat(self, k: int) -> "Bare":
            return self

    with pytest.raises(TypeError, match="field: expected a frozen dataclass"):
        qsteer.sample(Bare(), None, noise, compile="inductor")


def test_random_numbers_that_depend_on_others_are_refused() -> None:
    class Dropout(hosts.Target):
        def bind(self, obs: Any) -> Any:
            inner = super().bind(obs)
            return qsteer.value(lambda a, _: inner(nn.functional.dropout(a, 0.1)), context=torch.zeros(1))

    policy = hosts.shared("plain")
    with (
        steer(policy, Dropout(), qsteer.QGF(), compile="inductor"),
        pytest.raises(TypeError, match=r"expected random numbers of rand, .*got (native_dropout|bernoulli)"),
    ):
        policy.predict_action_chunk(hosts.observe(policy, 1))


def test_the_last_line_of_what_a_compiler_says_is_shown() -> None:
    assert explain("a\n b\n\n") == "b" and explain("") == "no message"

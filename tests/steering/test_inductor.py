"""Compiled actions: the line of operators is the eager action, for every method; and what compiles it."""

import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from compiled_cases import METHODS, PREPARED, critic, runs
from torch import Tensor, nn

import qsteer
from qsteer.steering import inductor
from qsteer.steering.handle import steer
from qsteer.steering.inductor import explain
from qsteer.steering.lines import Replayed, read, trace
from qsteer.steering.runs import unlike, unmoved

CASES = [
    pytest.param(name, method, id=f"{name}-{method[0]}-{method[1]}", marks=marks)
    for name, marks in (*((name, pytest.mark.slow) for name in PREPARED), ("plain", ()))
    for method in METHODS
]
QUICK = [pytest.param(name, METHODS[1], id=name) for name in PREPARED]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions are not compiled."""
    monkeypatch.setattr(inductor.compiler, "submit", lambda run: None)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("name", "method"), [*CASES, *QUICK])
def test_a_line_is_the_eager_action(name: str, method: tuple[qsteer.Rule | None, qsteer.Sampler]) -> None:
    policy, steering = hosts.shared(name), critic(hosts.shared(name))
    hosts.set_steps(policy, 2)
    rule, sampler = deepcopy(method)
    with steer(policy, steering, rule, sampler=sampler, compile="inductor", trace=True) as handle:
        policy.predict_action_chunk(hosts.observe(policy, 2))
        (run,) = runs(handle)
        line = trace(run.act, run.buffers, run.draws)
        for changed in (False, True):
            with torch.no_grad():
                for weight in steering.parameters() if changed else ():
                    weight.mul_(1.1)  # it has learnt
                with unmoved(rule, run.device):
                    buffers = [unlike(buffer) for buffer in run.buffers]
                    drawn = [draw() for draw in run.draws]
                with Replayed(drawn):
                    action, record = run.act(buffers)
                found = read(line.source)(*buffers, *drawn, *line.weights)
            torch.testing.assert_close(found[0], action)
            assert len(found) > 1 + 4 * len(record.steps) - 1
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
    class Off:
        def run(self, tensors: list[Tensor]) -> list[Tensor]:
            return [torch.zeros_like(tensors[3]), torch.zeros((), dtype=torch.int64)]

    monkeypatch.setattr(inductor, "build", lambda line, inputs: (Path("line.so"), False))
    monkeypatch.setattr(inductor, "load", lambda path, device: Off())
    policy = hosts.shared("plain")
    batch, noise = hosts.observe(policy, 1), hosts.draw(policy, 1, 0)
    with steer(policy, critic(policy), qsteer.QGF(), compile="inductor") as handle:
        own = policy.predict_action_chunk(batch, noise=noise)
        assert handle.finish_compiling()
        with pytest.warns(RuntimeWarning, match="expected the compiled action to be the host's"):
            assert torch.equal(policy.predict_action_chunk(batch, noise=noise), own)


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

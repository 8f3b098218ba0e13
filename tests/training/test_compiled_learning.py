"""Compiled updates are the eager ones, draws and checkpoints included; what cannot be compiled is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import distilling
import pytest
import torch
from eager_lines import uncompiled
from play_data import A, H, S, episodes
from safetensors.torch import load_file
from torch import Tensor
from training_runs import CRITIC, POLICY, act

import qsteer
from qsteer.compiling import inductor
from qsteer.compiling.runs import MismatchError
from qsteer.critics import Critic, CriticConfig
from qsteer.data import Chunks
from qsteer.maps import FlowMap, MapConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training import compiled, distil, distil_flow_map, train_critic, train_policy
from qsteer.training.checkpoints import CHECKPOINT
from qsteer.training.compiled import CompiledLoss
from qsteer.training.critic import ACTING, LEARNERS, Sarsa
from qsteer.training.loop import Learner

FROZEN = FlowPolicy(FlowPolicyConfig(S, A, H, (8,))).requires_grad_(False)
FLOW = replace(distilling.FLOW, learning_rate=1e-3)


def drawing() -> Any:
    """A policy under a rule that draws from a generator of its own, and a sampler that draws from torch's."""
    rule, sampler = qsteer.RandomDirection(seed=5, redraw=True), qsteer.BestOfN(2)
    return lambda critic, obs, noise: qsteer.sample(
        FROZEN.field(obs), critic.bind(obs), noise, rule=rule, sampler=sampler
    )


def train(what: str, out: Path, seeds: list[int] | None = None, **changes: Any) -> None:
    """Train for twenty steps."""
    changes = {"steps": 20} | changes
    data = episodes()
    match what:
        case "policy":
            train_policy(data, out, replace(POLICY, **changes), progress=False)
        case "meta":
            settings = replace(distilling.META, learning_rate=1e-3, **changes)
            distil(distilling.untrained("meta"), distilling.teacher(), out, settings, progress=False)
        case "direct" | "eulerian" | "lagrangian" | "progressive":
            settings = replace(FLOW, distillation=what, **changes)
            distil_flow_map(distilling.untrained("flow"), distilling.teacher(), out, settings, progress=False)
        case "drawing":
            settings = replace(CRITIC, target="td", **changes)
            train_critic(data, out, settings, act=drawing(), progress=False)
        case _:
            settings = replace(CRITIC, target=what, **changes)
            acting = act if what in ACTING else None
            train_critic(data, out, settings, act=acting, seeds=seeds, progress=False)


def checkpoint(run: Path) -> dict[str, Tensor]:
    return load_file(run / CHECKPOINT)


def check_close(run: Path, other: Path) -> None:
    """Weights and optimiser agree up to rounding, generators to the bit, and metrics."""
    a, b = checkpoint(run), checkpoint(other)
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith("generator"):
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
    lines = [[json.loads(line) for line in (x / "metrics.jsonl").open()] for x in (run, other)]
    for mine, its in zip(*lines, strict=True):
        assert mine == pytest.approx(its, rel=1e-3, abs=1e-4)


KINDS = {
    "policy": 1,
    **dict.fromkeys(LEARNERS, 1),
    "drawing": 1,
    "meta": 1,
    "direct": 1,
    "eulerian": 2,  # of the diagonal alone, and of intervals
    "lagrangian": 2,
    "progressive": 2,
}


@pytest.mark.parametrize("what", KINDS)
def test_twenty_updates_by_a_line_are_twenty_eager_ones(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(what, tmp_path / "eager")
    lines = uncompiled(monkeypatch)
    train(what, tmp_path / "line", compile=True)
    assert len(lines) == KINDS[what]
    check_close(tmp_path / "line", tmp_path / "eager")


def test_a_stack_of_seeds_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("iql", tmp_path / "eager", [0, 1])
    lines = uncompiled(monkeypatch)
    train("iql", tmp_path / "line", [0, 1], compile=True)
    assert len(lines) == 1
    check_close(tmp_path / "line", tmp_path / "eager")


def interrupt(what: Any, patch: pytest.MonkeyPatch, calls: int) -> None:
    """Make the ``calls + 1``-th batch of a kind of learner raise, as a signal would."""
    sample, count = what.sample, 0

    def counted(self: Learner, generator: torch.Generator) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return sample(self, generator)

    patch.setattr(what, "sample", counted)


@pytest.mark.parametrize("what", ["iql", "drawing", "eulerian"])
def test_a_killed_run_resumes_to_the_bit(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = uncompiled(monkeypatch)
    check_resumed(what, tmp_path, monkeypatch)
    assert len(lines) == KINDS[what] * 3 - (what == "eulerian")  # which is past the diagonal at the end


def check_resumed(what: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = {"drawing": LEARNERS["td"], "eulerian": distilling.KINDS["flow"]}.get(what) or LEARNERS[what]
    train(what, out / "whole", compile=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(learner, patch, 9)
        train(what, out / "parts", compile=True)
    train(what, out / "parts", compile=True)
    a, b = checkpoint(out / "parts"), checkpoint(out / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert (out / "parts" / "metrics.jsonl").read_bytes() == (out / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_only_as_it_began(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    train("sarsa", tmp_path, compile=first)
    with pytest.raises(ValueError, match=r"expected a run with compile=.*another directory"):
        train("sarsa", tmp_path, compile=not first)
    train("sarsa", tmp_path, compile=first)


def learner(source: Any = None) -> Sarsa:
    torch.manual_seed(0)
    critic = Critic(CriticConfig(S, A, H, (8,), 3))
    return Sarsa(
        critic, source or Chunks(episodes(), H, 0.99, "next_actions"), replace(CRITIC, target="sarsa")
    )


def loss_of(learner: Learner) -> CompiledLoss:
    return CompiledLoss(learner, [p for p in learner.parameters() if p.requires_grad])


def test_batches_of_another_size_are_a_line_of_their_own_and_there_is_an_end_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = uncompiled(monkeypatch)
    model = learner()
    compute = loss_of(model)
    for size, seen in ((8, 1), (4, 2), (8, 2), (4, 2)):
        model.settings = replace(model.settings, batch_size=size)
        loss, _ = compute(torch.Generator().manual_seed(size))
        got = [p.grad for p in compute.parameters]
        eager, _ = model.loss(torch.Generator().manual_seed(size))
        torch.testing.assert_close(loss, eager.detach())
        torch.testing.assert_close(got, list(torch.autograd.grad(eager, compute.parameters)))
        assert len(lines) == seen
    for size in (5, 6, 7):
        model.settings = replace(model.settings, batch_size=size)
        with pytest.raises(TypeError, match="at most 4 kinds") if size == 7 else monkeypatch.context():
            compute(torch.Generator())


def test_a_line_that_differs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch, spoil=lambda loss: loss * 1.01)
    with pytest.raises(MismatchError, match="expected the compiled update's loss to be"):
        train("sarsa", tmp_path, compile=True)


def test_a_gradient_that_is_zero_but_for_rounding_is_compared_at_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distilled(out: Path, compiled: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        residual = FlowMap(MapConfig(*distilling.teacher().sizes(), hidden=(8,), residual=True))
        settings = replace(FLOW, steps=3, diagonal_steps=3, compile=compiled)
        distil_flow_map(residual, distilling.teacher(), out, settings, progress=False)
        return checkpoint(out)

    eager = distilled(tmp_path / "eager", False)
    lines = uncompiled(monkeypatch, spoil=lambda loss: loss + 1e-14)
    found = distilled(tmp_path / "line", True)
    assert len(lines) == 1
    assert all(torch.equal(found[name], eager[name]) for name in eager)


def test_numbers_that_are_neither_in_the_batch_nor_in_networks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncompiled(monkeypatch)
    hidden = torch.ones(A)

    def moved(critic: Critic, obs: Tensor, noise: Tensor) -> Tensor:
        return (noise + hidden).clamp(-1, 1)

    with pytest.raises(TypeError, match=r"expected a loss that reads its inputs .*: \(2,\) of float32"):
        train_critic(
            episodes(), tmp_path, replace(CRITIC, target="td", compile=True), act=moved, progress=False
        )


def without_a_compiler() -> str:
    raise RuntimeError("No working C++ compiler found")


def test_without_a_compiler_the_run_is_the_eager_one_and_one_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("sarsa", tmp_path / "eager")
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", without_a_compiler)
    compiled.has_compiler.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"apt-get install g\+\+.*counts as one with compile=False"
    ) as told:
        train("sarsa", tmp_path / "none", compile=True)
    assert len(told) == 1
    compiled.has_compiler.cache_clear()
    found, eager = checkpoint(tmp_path / "none"), checkpoint(tmp_path / "eager")
    assert all(torch.equal(found[name], eager[name]) for name in eager)
    train("sarsa", tmp_path / "none")  # is a finished run of these settings


def test_a_compiler_that_fails_ends_the_run_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(inductor.sys, "executable", shutil.which("false"))
    monkeypatch.setattr(compiled, "has_compiler", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"that Inductor compiles, got RuntimeError: no message; leave comp"
    ):
        train("sarsa", tmp_path / "run", compile=True)


@pytest.mark.slow  # some minutes of compiling
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_updates_are_the_eager_ones_and_a_killed_run_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "cache_directory", lambda: tmp_path / "cache")
    built: list[int] = []
    build = compiled.build
    monkeypatch.setattr(compiled, "build", lambda *given: noted(build(*given), built))
    check_resumed("iql", tmp_path, monkeypatch)
    assert built == [1, 0, 0]  # one part, compiled once
    train("iql", tmp_path / "eager")
    check_close(tmp_path / "whole", tmp_path / "eager")


def noted(result: tuple[list[Path], int], found: list[int]) -> tuple[list[Path], int]:
    found.append(result[1])
    return result

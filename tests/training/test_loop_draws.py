"""What a rule or sampler draws while a critic learns: seeded by the run, kept by its checkpoints."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from play_data import H, episodes
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_runs import CRITIC, killed_after

import qsteer
from qsteer.critics import Critic
from qsteer.files import locked_run
from qsteer.maps import GlassPosterior
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training import train_critic
from qsteer.training.critic import list_parts
from qsteer.types import Sampler


@dataclass(frozen=True)
class Drawn(Sampler):
    """A sampler of one's own, with a generator of its own."""

    generator: torch.Generator

    def __call__(self, field: Any, value: Any, noise: Tensor) -> Tensor:
        own = torch.randn(noise.shape, generator=self.generator)
        return qsteer.Euler(clip=(-1.0, 1.0))(field, value, own)

    def generators(self, device: torch.device) -> list[torch.Generator]:
        return [self.generator]


POLICY = FlowPolicy(FlowPolicyConfig(3, 2, H, (8,))).requires_grad_(False)
EULER = qsteer.Euler(clip=(-1.0, 1.0))
DRAWING = {
    "posterior": lambda: (qsteer.Posterior(GlassPosterior(steps=2), samples=2), EULER),
    "gradient-free": lambda: (qsteer.GradientFreePosterior(GlassPosterior(steps=2), samples=2), EULER),
    "random": lambda: (qsteer.RandomDirection(), EULER),
    "best-of-n": lambda: (None, qsteer.BestOfN(3, EULER)),
    "inside": lambda: (None, qsteer.BestOfN(2, Drawn(torch.Generator().manual_seed(3)))),
    "own": lambda: (qsteer.RandomDirection(seed=5), Drawn(torch.Generator().manual_seed(3))),
}


def make_act(name: str) -> Any:
    rule, sampler = DRAWING[name]()
    return lambda critic, obs, noise: qsteer.sample(
        POLICY.field(obs), critic.bind(obs), noise, rule=rule, sampler=sampler
    )


def train(out: Path, act: Any, **changes: Any) -> Critic:
    settings = replace(CRITIC, target="td", **changes)
    return train_critic(episodes(), out, settings, act=act, progress=False)


@pytest.mark.parametrize("name", DRAWING)
def test_td_with_a_rule_or_sampler_that_draws_resumes_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    act = make_act(name)
    train(tmp_path / "whole", act)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(9, patch, "td")
        train(tmp_path / "parts", act)  # which has drawn already
    assert torch.equal(torch.get_rng_state(), before)
    train(tmp_path / "parts", make_act(name))  # as a process of its own would
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    parts, whole = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("parts", "whole"))
    assert parts.keys() == whole.keys() and all(torch.equal(parts[n], whole[n]) for n in parts)


def test_draws_are_those_of_the_seed_and_not_those_of_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for seed in (0, 1):
        act = make_act("best-of-n")

        def noted(critic: Any, obs: Tensor, noise: Tensor, act: Any = act) -> Tensor:
            states.append(torch.get_rng_state())
            return act(critic, obs, noise)

        train(tmp_path / str(seed), noted, seed=seed, steps=1)
        assert not torch.equal(states[-1], torch.Generator().manual_seed(seed).get_state())
    assert not torch.equal(*states)


def test_rules_and_samplers_are_found_wherever_a_function_keeps_them() -> None:
    rule, sampler = DRAWING["own"]()

    def call(critic: Any, obs: Tensor, noise: Tensor, rule: Any = None) -> Tensor:
        return qsteer.sample(POLICY.field(obs), critic.bind(obs), noise, rule=rule, sampler=EULER)

    class Acting:
        def __init__(self) -> None:
            self.rule, self.sampler = rule, sampler

        def act(self, *_: Any) -> Tensor: ...

        __call__ = act

    assert list_parts(call) == [EULER]
    assert set(map(id, list_parts(partial(call, rule=rule)))) == {id(rule), id(EULER)}
    assert (
        set(map(id, list_parts(Acting().act)))
        == set(map(id, list_parts(Acting())))
        == {id(rule), id(sampler)}
    )
    assert list_parts(lambda *given: call(*given, rule=rule)) in ([rule, EULER], [EULER, rule])
    assert list_parts(torch.add) == list_parts(None) == []


def test_a_checkpoint_of_other_generators_or_networks_says_what_differs(tmp_path: Path) -> None:
    train(tmp_path, make_act("random"), steps=5)
    with pytest.raises(ValueError, match=r"got a checkpoint with generator.2=5056; resume .* with the rule"):
        train(tmp_path, make_act("best-of-n"), steps=5)
    file = tmp_path / "checkpoint.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    wider = {
        n: torch.cat([t, t], -1) if n == "learner.critic.net.first.bias" else t for n, t in tensors.items()
    }
    save_file(wider, file, metadata=header)
    with pytest.raises(
        ValueError, match=r"expected networks with critic\.net\.first\.bias=\(.*got a checkpoint of"
    ):
        train(tmp_path, make_act("random"), steps=5)
    old = {n: t for n, t in tensors.items() if not n.startswith("generator.")}  # as they were once written
    save_file(old, file, metadata=header)
    train(tmp_path, make_act("random"), steps=5)


def test_a_directory_has_one_run(tmp_path: Path) -> None:
    with locked_run(tmp_path), pytest.raises(RuntimeError, match="expected a run that nothing else has open"):
        train(tmp_path, make_act("best-of-n"))
    (tmp_path / ".checkpoint.safetensors.0123.tmp").write_text("of a killed run")
    train(tmp_path, make_act("best-of-n"))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_system_without_locks_is_used_and_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    with pytest.warns(
        RuntimeWarning, match="expected a file system that locks files, got .*No locks available"
    ):
        train(tmp_path, make_act("best-of-n"), steps=1)

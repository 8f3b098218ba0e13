"""Distilling maps: targets of the losses, the start of residual maps, and maps of pretrained policies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import distilling
import hosts
import pytest
import torch
from distilling import make_learner, weights
from host_batches import SMALL
from torch import Tensor, nn

from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig, glass_velocity
from qsteer.training import (
    FlowMapTraining,
    HostTeacher,
    JumpError,
    MetaTraining,
    PosteriorError,
    SafetensorsBatches,
    Teacher,
    distil,
    distil_flow_map,
)
from qsteer.training.maps import FlowMapDistillation, MetaDistillation

META = MetaTraining(
    steps=3, batch_size=4, log_every=1, checkpoint_every=2, evaluate_every=3, warmup=0, learning_rate=1e-2
)


def test_judging_a_map_does_not_disturb_its_training(tmp_path: Path) -> None:
    distilling.train("meta", tmp_path / "judged")
    meta, out = distilling.untrained("meta"), tmp_path / "alone"
    distil(meta, distilling.teacher(), out, distilling.META, progress=False)
    a, b = weights(tmp_path / "judged"), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("target", ["glass", "data"])
def test_the_diagonal_target_is_glass_or_the_data(target: str) -> None:
    model, seed = make_learner("meta", residual=False), torch.Generator().manual_seed
    model.settings = replace(model.settings, target=target)
    drawn = model.teacher.chunks.sample(model.settings.batch_size, seed(5))
    field, asked = model.teacher.policy.field(drawn.observations), []

    def exact(z: Tensor, xbar: Tensor, u: Tensor, w: Tensor, x: Tensor, t: Tensor, base: None) -> Tensor:
        asked.append(torch.equal(u, w))
        return glass_velocity(field, x, t, xbar, u) + 0 * model.meta.net.last.bias.sum()

    model.meta.velocity = model.target.velocity = exact
    _, info = model.loss(seed(5))
    assert info["diagonal"] < 1e-10 if target == "glass" else info["diagonal"] > 1e-2
    assert asked[0] and not any(asked[1:])


def test_a_direct_distillation_starts_at_noise_and_ends_at_the_action_as_often_as_it_is_told() -> None:
    settings = replace(distilling.FLOW, distillation="direct", diagonal_steps=9, batch_size=256)
    settings = replace(settings, zero_share=0.5, one_share=0.25)
    flow_map = FlowMap(MapConfig(*distilling.teacher().sizes(), hidden=(8,), residual=True))
    learner, asked = FlowMapDistillation(flow_map, distilling.teacher(), settings), []
    ask = flow_map.average_velocity

    def recorded(z: Tensor, x: Tensor, r: Tensor, t: Tensor, field: Any) -> Tensor:
        asked.append((r, t))
        return ask(z, x, r, t, field)

    flow_map.average_velocity = recorded
    loss, info = learner.loss(torch.Generator().manual_seed(0))
    ((r, t),) = asked
    assert list(info) == ["direct"] and info["direct"] == loss > 0
    assert 0.4 < (r == 0).float().mean() < 0.6 and 0.17 < (t == 1).float().mean() < 0.33
    assert (r <= t).all() and ((r == 0) & (t == 1)).any()


def test_the_error_of_a_jump_is_that_of_one_step_at_first_and_falls(tmp_path: Path) -> None:
    teacher = distilling.teacher()
    settings = replace(distilling.FLOW, distillation="direct", zero_share=0.5, one_share=0.5)
    settings = replace(settings, steps=200, batch_size=64, evaluate_every=200, log_every=100)
    flow_map = FlowMap(MapConfig(*teacher.sizes(), hidden=(32,), residual=True))
    error = JumpError(distilling.teacher(1), observations=64)
    before = error(flow_map)
    assert before["jump_error"] == pytest.approx(before["one_step"]) and before["chain"] < before["one_step"]
    distil_flow_map(flow_map, teacher, tmp_path, settings, held_out=error, progress=False)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["jump_error"] == error(flow_map)["jump_error"] < 0.5 * before["jump_error"]


@pytest.mark.parametrize("distillation", ["eulerian", "lagrangian", "progressive"])
def test_a_residual_flow_map_starts_exact_on_the_diagonal_and_learns_from_the_noise_on(distillation) -> None:
    settings = replace(
        distilling.FLOW, distillation=distillation, diagonal_steps=1, anneal_steps=1, zero_share=1.0
    )
    flow_map = FlowMap(MapConfig(*distilling.teacher().sizes(), hidden=(8,), residual=True))
    learner, starts = FlowMapDistillation(flow_map, distilling.teacher(), settings), []
    learner.step += 2
    ask = flow_map.average_velocity

    def asked(z: Tensor, x: Tensor, r: Tensor, t: Tensor, field: Any) -> Tensor:
        starts.append(
            r.sum() == 0 if distillation != "eulerian" else len(starts) > 0
        )  # its r is a dual number
        return ask(z, x, r, t, field)

    flow_map.average_velocity = asked
    loss, info = learner.loss(torch.Generator().manual_seed(0))
    assert info["diagonal"] == 0 and info[distillation] > 0
    assert starts[1] and not starts[0]
    (grad,) = torch.autograd.grad(loss, flow_map.net.last.weight)
    assert grad.abs().max() > 0


def meta_map(teacher: Teacher) -> MetaFlowMap:
    torch.manual_seed(3)
    return MetaFlowMap(MetaMapConfig(*teacher.sizes(), **SMALL))


def attributes(policy: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in (policy, policy.model)]


def test_a_map_of_a_pretrained_policy_starts_exact_and_learns(
    name: str, stored: SafetensorsBatches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = hosts.shared(name)
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    had, state = attributes(policy), torch.get_rng_state()
    trainable = [p.requires_grad for p in policy.parameters()]
    teacher = HostTeacher(policy, stored)
    meta = meta_map(teacher)
    learner = MetaDistillation(meta, teacher, META)
    prefixes, embed = 0, policy.model.embed_prefix

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal prefixes
        prefixes += 1
        return embed(*args, **kwargs)

    monkeypatch.setattr(policy.model, "embed_prefix", counted)
    generator = torch.Generator().manual_seed(0)
    torch.set_rng_state(state)
    optimizer = META.optimizer(list(meta.parameters()))
    for step in range(3):
        loss, info = learner.loss(generator)
        assert prefixes == step + 1, "encoded once per batch"
        assert step > 0 or info["diagonal"] == 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.after_step()
    assert info["diagonal"] > 0
    assert all(p.grad is not None and p.grad.norm() > 0 for p in meta.parameters())
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    assert attributes(policy) == had
    assert all(torch.equal(before[key], tensor) for key, tensor in policy.state_dict().items())
    assert [p.requires_grad for p in policy.parameters()] == trainable


def test_distilling_a_pretrained_policy_reports_its_posterior_error_and_resumes(
    name: str, stored: SafetensorsBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = HostTeacher(hosts.shared(name), stored)
    error = PosteriorError(teacher, observations=2, samples=4, steps=2, times=(0.5,))
    untrained = error(meta_map(teacher))
    assert untrained["posterior_error"] == pytest.approx(untrained["tweedie"], rel=1e-5)
    whole = distil(meta_map(teacher), teacher, tmp_path / "whole", META, held_out=error, progress=False)
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["posterior_error"] == error(whole)["posterior_error"] != untrained["posterior_error"]

    loss, count = MetaDistillation.loss, 0

    def interrupted(self: MetaDistillation, generator: torch.Generator) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return loss(self, generator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetaDistillation, "loss", interrupted)
        distil(meta_map(teacher), teacher, tmp_path / "parts", META, held_out=error, progress=False)
    distil(meta_map(teacher), teacher, tmp_path / "parts", META, held_out=error, progress=False)
    for file in "metrics.jsonl", "model.safetensors":
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("distillation", ["direct", "eulerian"])
def test_a_flow_map_of_a_pretrained_policy(
    name: str, stored: SafetensorsBatches, distillation: str, tmp_path: Path
) -> None:
    teacher = HostTeacher(hosts.shared(name), stored)
    torch.manual_seed(3)
    flow_map = FlowMap(MapConfig(*teacher.sizes(), **SMALL))
    before = flow_map.net.last.weight.clone()
    settings = FlowMapTraining(steps=2, batch_size=2, diagonal_steps=0, anneal_steps=1, learning_rate=1e-2)
    settings = replace(settings, distillation=distillation)
    distil_flow_map(flow_map, teacher, tmp_path / "run", settings, progress=False)
    assert (flow_map.net.last.weight - before).abs().max() > 1e-4
    assert all(p.grad is None for p in hosts.shared(name).parameters())

"""Distillation at scale: several processes, kill -9, pretrained teachers, stored batches, the hub."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import distilling
import hosts
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qsteer
from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig, glass_velocity
from qsteer.training import (
    DatasetBatches,
    FlowMapTraining,
    HostTeacher,
    MetaTraining,
    PosteriorError,
    SafetensorsBatches,
    Teacher,
    distil,
    distil_flow_map,
    lerobot_batches,
    record,
)
from qsteer.training.loop import Learner, Share
from qsteer.training.maps import FlowMapDistillation, MetaDistillation

H, A = 6, 5
SMALL = {"width": 16, "depth": 2, "heads": 2, "harmonics": 2}
META = MetaTraining(
    steps=3, batch_size=4, log_every=1, checkpoint_every=2, evaluate_every=3, warmup=0, learning_rate=1e-2
)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint.safetensors")


def python(*arguments: str | Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(distilling.__file__).parent)}
    subprocess.run([sys.executable, *arguments], env=environment, check=True, timeout=280)


# Interruptions


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    python(distilling.__file__, tmp_path / "parts", "kill")
    for kind in distilling.KINDS:
        parts, whole = tmp_path / "parts" / kind, tmp_path / "whole" / kind
        assert not (parts / "model.safetensors").exists()
        assert json.loads((parts / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
        torch.manual_seed(1234)  # the global generator has no say
        for out in parts, whole:
            distilling.train(kind, out)
        assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        a, b = weights(parts), weights(whole)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    distilling.train("flow", tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected a whole checkpoint.*delete it"):
        distilling.train("flow", tmp_path)


def test_judging_a_map_does_not_disturb_its_training(tmp_path: Path) -> None:
    distilling.train("meta", tmp_path / "judged")
    meta, out = distilling.untrained("meta"), tmp_path / "alone"
    distil(meta, distilling.teacher(), out, distilling.META, progress=False)
    a, b = weights(tmp_path / "judged"), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_throughput_is_kept_apart_from_the_metrics(tmp_path: Path) -> None:
    distilling.train("flow", tmp_path)
    speed, metrics = (
        [json.loads(line) for line in (tmp_path / name).open()] for name in ("speed.jsonl", "metrics.jsonl")
    )
    assert [line["step"] for line in speed] == [line["step"] for line in metrics] == [2, 4, 6, 8, 10, 12, 14]
    assert all(line["samples/s"] > 0 for line in speed)
    assert not any("samples/s" in line for line in metrics)


# Several processes


def learner(kind: str, residual: bool = True) -> Learner:
    torch.manual_seed(1)
    sizes = distilling.teacher().sizes()
    if kind == "meta":
        config = MetaMapConfig(*sizes, hidden=(8,), harmonics=2, residual=residual)
        return MetaDistillation(MetaFlowMap(config), distilling.teacher(), distilling.META)
    config = MapConfig(*sizes, hidden=(8,), residual=residual)
    flow = FlowMapDistillation(FlowMap(config), distilling.teacher(), distilling.FLOW)
    flow.step += 8
    return flow


def gradient(learner: Learner, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and the generator's state after the step."""
    learner.share = share
    learner.zero_grad()
    generator = torch.Generator().manual_seed(5)
    loss, _ = learner.loss(generator)
    loss.backward()
    grads = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads), generator.get_state()


@pytest.mark.parametrize(("kind", "residual"), [("meta", True), ("meta", False), ("flow", True)])
def test_shares_of_a_batch_average_to_the_whole(kind: str, residual: bool) -> None:
    model = learner(kind, residual)
    whole, g, state = gradient(model, Share())
    parts = [gradient(model, Share(i, 4)) for i in range(4)]
    torch.testing.assert_close(sum(part[0] for part in parts) / 4, whole)
    torch.testing.assert_close(sum(part[1] for part in parts) / 4, g, rtol=1e-5, atol=1e-6)
    assert (parts[0][1] - g).norm() > 0.1 * g.norm()  # a part is not the whole
    assert all(torch.equal(part[2], state) for part in parts)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    python(
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        distilling.__file__,
        tmp_path / "two",
    )
    assert {path.name for path in (tmp_path / "two").glob("process*")} == {"process 0 of 2", "process 1 of 2"}
    for kind in distilling.KINDS:
        distilling.train(kind, tmp_path / "one" / kind)
        one, two = (weights(tmp_path / n / kind) for n in ("one", "two"))
        assert all(torch.allclose(one[n], two[n], rtol=0, atol=1e-6) for n in one if n != "generator")
        assert torch.equal(one["generator"], two["generator"])
        lines = [
            [json.loads(x) for x in (tmp_path / n / kind / "metrics.jsonl").open()] for n in ("one", "two")
        ]
        for a, b in zip(*lines, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("target", ["glass", "data"])
def test_the_diagonal_target_is_glass_or_the_data(target: str) -> None:
    model, seed = learner("meta", residual=False), torch.Generator().manual_seed
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


def test_a_batch_that_processes_cannot_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Three:
        num_processes, process_index, is_main_process = 3, 0, True

    monkeypatch.setattr("qsteer.training.loop.processes", lambda device: Three())
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 8"):
        distilling.train("flow", tmp_path)


# Pretrained teachers


@pytest.fixture(params=["pi05", "smolvla"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def batch(policy: nn.Module, rows: int, seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return hosts.observe(policy, rows, seed) | {
        "action": torch.randn(rows, H, 3, generator=draw),
        "task": ["put it there"] * rows,
    }


@pytest.fixture
def stored(name: str, tmp_path: Path) -> SafetensorsBatches:
    record([batch(hosts.shared(name), 3, seed) for seed in range(2)], tmp_path / "data")
    return SafetensorsBatches(tmp_path / "data")


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


def test_a_flow_map_of_a_pretrained_policy(name: str, stored: SafetensorsBatches, tmp_path: Path) -> None:
    teacher = HostTeacher(hosts.shared(name), stored)
    torch.manual_seed(3)
    flow_map = FlowMap(MapConfig(*teacher.sizes(), **SMALL))
    before = flow_map.net.last.weight.clone()
    settings = FlowMapTraining(steps=2, batch_size=2, diagonal_steps=0, anneal_steps=1, learning_rate=1e-2)
    distil_flow_map(flow_map, teacher, tmp_path / "run", settings, progress=False)
    assert (flow_map.net.last.weight - before).abs().max() > 1e-4
    assert all(p.grad is None for p in hosts.shared(name).parameters())


def test_the_policys_own_actions_are_what_it_would_do(name: str, stored: SafetensorsBatches) -> None:
    policy = hosts.shared(name)
    _, x1 = HostTeacher(policy, stored).batch(3, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(6, (3,), generator=generator).tolist()
    noise = torch.randn(3, H, A, generator=generator)
    torch.testing.assert_close(policy.predict_action_chunk(stored.rows(rows), noise=noise), x1[..., :3])


def test_stored_actions_are_padded_as_the_host_does_it(name: str, stored: SafetensorsBatches) -> None:
    policy = hosts.shared(name)
    _, x1 = HostTeacher(policy, stored, "data").batch(3, torch.Generator().manual_seed(4))
    rows = torch.randint(6, (3,), generator=torch.Generator().manual_seed(4)).tolist()
    assert torch.equal(x1[..., :3], stored.rows(rows)["action"])
    assert x1.shape == (3, H, A) and not x1[..., 3:].any()


@pytest.mark.parametrize("actions", ["policy", "data"])
def test_a_share_is_the_whole_batchs_rows(name: str, stored: SafetensorsBatches, actions: Any) -> None:
    teacher = HostTeacher(hosts.shared(name), stored, actions)
    field, x1 = teacher.batch(4, torch.Generator().manual_seed(4))
    parts = [teacher.batch(4, torch.Generator().manual_seed(4), Share(i, 2)) for i in range(2)]
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x1)
    x, t = torch.randn(4, H, A), torch.full((4,), 0.3)
    v = torch.cat([part[0](x[2 * i : 2 * i + 2], t[:2]) for i, part in enumerate(parts)])
    torch.testing.assert_close(v, field(x, t))


def test_other_data_other_weights_and_other_actions_have_other_fingerprints(
    name: str, stored: SafetensorsBatches, tmp_path: Path
) -> None:
    policy = hosts.shared(name)
    first = HostTeacher(policy, stored).fingerprint()
    assert HostTeacher(policy, SafetensorsBatches(stored.paths[0].parent)).fingerprint() == first
    record([batch(policy, 3, 7)], tmp_path / "other")
    others = {
        HostTeacher(policy, stored, "data").fingerprint(),
        HostTeacher(policy, SafetensorsBatches(tmp_path / "other")).fingerprint(),
        HostTeacher(hosts.build(name, seed=1), stored).fingerprint(),
    }
    assert len(others | {first}) == 4


def test_a_teacher_without_actions_to_take_says_so(name: str, tmp_path: Path) -> None:
    policy = hosts.shared(name)
    record([hosts.observe(policy, 2)], tmp_path / "observations")
    teacher = HostTeacher(policy, SafetensorsBatches(tmp_path / "observations"), "data")
    with pytest.raises(KeyError, match=r"expected the key 'action'.*actions='policy'"):
        teacher.batch(2, torch.Generator())


# Stored batches


def test_stored_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    values = torch.arange(10.0).view(5, 2)
    record([{"a": values[:2], "task": ["x", "y"]}, {"a": values[2:]}], tmp_path)
    stored = SafetensorsBatches(tmp_path)
    assert len(stored) == 5
    order = [4, 0, 2, 1, 2, 3]
    rows = stored.rows(order)
    assert rows.keys() == {"a"} and torch.equal(rows["a"], values[order])


def test_tokens_of_different_length_are_padded_behind_their_mask(tmp_path: Path) -> None:
    for length in 2, 4:
        tokens, mask = torch.full((1, length), length), torch.ones(1, length, dtype=torch.bool)
        record([{"tokens": tokens, "mask": mask, "s": torch.zeros(1, 3)}], tmp_path / str(length))
        (tmp_path / str(length) / "000000.safetensors").rename(tmp_path / f"{length}.safetensors")
    rows = SafetensorsBatches(tmp_path).rows([0, 1])
    assert rows["tokens"].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4]]
    assert rows["mask"].dtype == torch.bool and rows["mask"].sum(1).tolist() == [2, 4]
    assert rows["s"].shape == (2, 3)


def test_impossible_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected \*\.safetensors files.*record"):
        SafetensorsBatches(tmp_path)
    save_file({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="same number of rows under every key"):
        SafetensorsBatches(tmp_path)


class Frames:
    """A dataset as lerobot's: frames by number, the prompt a string."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy, self.whole = policy, batch(policy, 5, 0)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {key: value[i] for key, value in self.whole.items()}


def test_a_dataset_goes_through_the_policys_preprocessor(name: str) -> None:
    policy = hosts.shared(name)

    def preprocessor(frames: dict[str, Any]) -> dict[str, Any]:
        assert frames["task"] == ["put it there"] * len(frames["action"])
        return frames | {"action": frames["action"] / 2}

    frames = Frames(policy)
    teacher = HostTeacher(policy, DatasetBatches(frames, preprocessor, "me/frames@v1"), "data")
    _, x1 = teacher.batch(3, torch.Generator().manual_seed(4))
    rows = torch.randint(5, (3,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(x1[..., :3], frames.whole["action"][rows] / 2)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("datasets", "av")), reason="needs lerobot[dataset]"
)
def test_a_lerobot_dataset_gives_action_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.datasets import LeRobotDataset
    from lerobot.policies import factory

    policy = hosts.shared("smolvla")
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (3,), "names": None},
    }
    dataset = LeRobotDataset.create(
        "me/tiny", fps=10, features=features, root=tmp_path / "d", use_videos=False
    )
    for episode in range(2):
        for i in range(8):
            step = 10.0 * episode + i
            dataset.add_frame(
                {"observation.state": torch.full((4,), step).numpy()}
                | {"action": torch.full((3,), step).numpy(), "task": "push"}
            )
        dataset.save_episode()
    dataset.finalize()
    seen: list[Any] = []
    monkeypatch.setattr(
        factory, "make_pre_post_processors", lambda *a, **k: seen.append((a, k)) or (lambda b: b, None)
    )
    batches = lerobot_batches(policy, "me/tiny", root=tmp_path / "d")
    assert len(batches) == 16 and seen[0][1]["dataset_stats"].keys() >= {"action", "observation.state"}
    rows = batches.rows([3, 12])
    assert rows["action"].shape == (2, H, 3) and rows["task"] == ["push"] * 2
    assert rows["action"][:, :, 0].tolist() == [[3, 4, 5, 6, 7, 7], [14, 15, 16, 17, 17, 17]]


# The hub


def maps() -> Iterator[tuple[str, MetaFlowMap | FlowMap]]:
    small = SMALL | {"hidden": (16, 8)}
    for network in "mlp", "transformer":
        for residual in True, False:
            config = MetaMapConfig(H, A, 7, network, **small, residual=residual)
            yield f"meta-{network}-{residual}", MetaFlowMap(config)
        yield f"flow-{network}", FlowMap(MapConfig(H, A, 7, network, **small))


MAPS = dict(maps())


def answer(model: MetaFlowMap | FlowMap) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    features: Any = torch.randn(2, 7, generator=draw)
    if model.config.network == "transformer":
        features = torch.randn(2, 3, 7, generator=draw), torch.ones(2, 3, dtype=torch.bool)
    x, t = torch.randn(2, H, A, generator=draw), torch.rand(2, generator=draw)
    if isinstance(model, FlowMap):
        return model.bind(features)(x, t / 2, t)
    return model.bind(features, qsteer.field(lambda x, t: -x))(torch.stack([x, 2 * x]), x, t)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_comes_back_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    model = MAPS[name]
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and type(again.config) is type(model.config)
    assert torch.equal(answer(again), answer(model))
    card = (tmp_path / "README.md").read_text()
    assert f"qsteer.maps.{type(model).__name__}.from_pretrained" in card and f"`(B, {H}, {A})`" in card
    assert "library_name: qsteer" in card and "{{" not in card and "{%" not in card
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("net.last.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"net\.last\.bias"):
        type(model).from_pretrained(tmp_path)

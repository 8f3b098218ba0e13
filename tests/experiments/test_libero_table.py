"""QPILOTS' table 3: its figures, misconfigurations that have names, and the path on a stand-in for LIBERO."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gymnasium")
pytest.importorskip("lerobot")

import libero_stand_in
from libero_stand_in import Dark, Millimetres, StandIn

import qsteer
from qsteer.cli import main
from qsteer.data import SafetensorsBatches
from qsteer.envs import libero as simulator
from qsteer.experiments import libero, libero_policy
from qsteer.experiments.libero import Table3, format_table, make_arm, record_walk, run_task
from qsteer.experiments.libero_policy import Frozen, check_first, check_policy, open_frozen
from qsteer.maps import MetaFlowMap, MetaMapConfig
from qsteer.steering.handle import unsteer
from qsteer.testing import hosts as random_hosts
from qsteer.training import HostTeacher

SMALL = Table3(steps=40, episodes=2, tuning_episodes=2, num_envs=1, batch_size=4)


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    return open_frozen("random")


def first(env: StandIn) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value)[None] for key, value in env.reset(seed=0)[0].items()}


# The paper's


def test_settings_are_the_papers() -> None:
    assert libero.TASKS == tuple(simulator.TASKS)
    assert libero_policy.VIEWS == tuple(simulator.VIEWS)
    online = Table3().online()
    critic = online.critic
    assert (online.env_steps, online.updates_per_step, online.row) == (500_000, 1, 10)
    assert (critic.target, critic.horizon, critic.gamma, critic.rho) == ("sarsa", 10, 0.99, 0.5)
    assert (critic.members, critic.hidden, critic.ema) == (10, (128, 128, 128), 0.005)
    assert (critic.learning_rate, critic.warmup, critic.decay, critic.gradient_clip) == (
        3e-4,
        500,
        300_000,
        1,
    )
    config = Table3().critic(8, 7)
    assert (config.views, config.view_size, len(config.strides)) == (tuple(simulator.VIEWS), 64, 4)


def test_means_are_those_of_the_papers_table() -> None:
    """The last column of the table, which the rows were not copied with."""
    means = {"pi0.5, zero-shot": 26, "DSRL": 58, "BoN (N=5)": 40, "EXPO": 39, "CGQL-LinEx": 31}
    means |= {"QPILOTS-U": 76, "QPILOTS-M": 72}
    assert {name: sum(row) / 6 for name, row in libero.PAPER.items()} == pytest.approx(means, abs=0.7)


def test_posterior_arms_draw_four_samples() -> None:
    meta = MetaFlowMap(MetaMapConfig(10, 8, 16, hidden=(8,)))
    maps = libero.Maps(meta=meta)
    assert make_arm("posterior=0.2", maps).rule == qsteer.Posterior(meta, 0.2, samples=4)
    assert make_arm("tweedie=0.2", maps).rule == qsteer.Tweedie(0.2)
    assert make_arm("base", maps).sampler == qsteer.Euler(clip=None)
    assert libero.guided(maps) == ("tweedie", "posterior", "qgf-matched")


# Misconfigurations


def changed(frozen: Frozen, side: str, **features: Any) -> Frozen:
    """The policy with other features."""
    config = random_hosts.pi05(shape=random_hosts.LIBERO).config
    getattr(config, side).update({k: v for k, v in features.items() if v is not None})
    for key in [key for key, value in features.items() if value is None]:
        del getattr(config, side)[key]
    policy = type("Policy", (), {"config": config})()
    return replace(frozen, policy=policy)


def test_a_missing_or_foreign_camera_is_named(frozen: Frozen) -> None:
    wrist = libero_policy.VIEWS[1]
    with pytest.raises(KeyError, match=rf"expected the cameras .*, got no \['{wrist}'\]"):
        check_policy(changed(frozen, "input_features", **{wrist: None}))
    like = frozen.policy.config.input_features[wrist]
    with pytest.raises(KeyError, match=r"got \['observation.images.top'\], which LIBERO lacks"):
        check_policy(changed(frozen, "input_features", **{"observation.images.top": like}))
    check_policy(changed(frozen, "input_features", **{"observation.images.empty_camera_0": like}))


def test_other_sizes_are_named(frozen: Frozen) -> None:
    like = frozen.policy.config.output_features["action"]
    with pytest.raises(ValueError, match=r"policy, action: expected shape \(7,\), got \(14,\)"):
        check_policy(changed(frozen, "output_features", action=replace(like, shape=(14,))))
    short = changed(frozen, "input_features")
    short.policy.config.chunk_size = 5
    with pytest.raises(ValueError, match="chunks of at least 10 steps, got 5"):
        check_policy(short)


def with_statistics(frozen: Frozen, side: str, key: str, numbers: dict[str, float] | None) -> Frozen:
    """The policy with other statistics of its processors, a copy of which is changed."""
    pre, post = random_hosts.processors(frozen.policy)
    for step in (post if side == "postprocess" else pre).steps:
        if getattr(step, "stats", None):
            step.stats.pop(key)
            if numbers is not None:
                step.stats[key] = {name: torch.full((7,), value) for name, value in numbers.items()}
    return replace(frozen, preprocess=pre, postprocess=post)


def test_wrong_normalisation_is_named(frozen: Frozen) -> None:
    with pytest.raises(KeyError, match=r"preprocessor: .*\['q01', 'q99'\] of 'observation.state', got no"):
        check_policy(with_statistics(frozen, "preprocess", "observation.state", None))
    with pytest.raises(KeyError, match=r"postprocessor: .* of 'action', got no \['q01', 'q99'\]"):
        check_policy(with_statistics(frozen, "postprocess", "action", {"mean": 0.0, "std": 1.0}))
    with pytest.raises(ValueError, match=r"actions in .-1, 1., got -300 to 300"):
        check_policy(with_statistics(frozen, "postprocess", "action", {"q01": -300.0, "q99": 300.0}))


@pytest.mark.parametrize(
    ("env", "error", "line"),
    [
        (Millimetres, ValueError, "normalised state within 20 of 0, got .*of other units"),
        (Dark, ValueError, "expected pictures, got a black 'observation.images.image'"),
    ],
)
def test_what_an_environment_shows_wrong_is_named(env: type, error: type, line: str, frozen: Frozen) -> None:
    with pytest.raises(error, match=line):
        check_first(frozen, first(env()), "put the bowl")


def test_a_missing_view_or_instruction_is_named(frozen: Frozen) -> None:
    seen = first(StandIn())
    with pytest.raises(KeyError, match=r"environment: .*got no \['observation.images.image2'\]"):
        check_first(frozen, {k: v for k, v in seen.items() if not k.endswith("2")}, "put the bowl")
    with pytest.raises(ValueError, match="task_description, got none"):
        check_first(frozen, seen, "")
    lost = replace(frozen, preprocess=lambda batch: {"observation.state": batch["observation.state"]})
    with pytest.raises(KeyError, match=r"preprocessor: .*renaming step"):
        check_first(lost, seen, "put the bowl")
    assert check_first(frozen, seen, "put the bowl")["observation.state"].shape == (1, 8)


def test_a_checkpoint_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"expected weights, got a config.json without"):
        open_frozen(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a lerobot policy with config.json, got none"):
        open_frozen(tmp_path / "nothing")


# The path


def test_its_parts_act_in_the_stand_in(
    frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without processes of simulators: the actor's actions, and every arm's, carry the robot."""
    asked: list[tuple[Any, ...]] = []

    def train(
        make_env: Any, actor: Any, critic: Any, out: Path, training: Any, **given: Any
    ) -> qsteer.Critic:
        actor.steer(given["rule"], given["sampler"])
        obs = first(make_env())
        noise = torch.randn(1, *actor.noise_shape, generator=torch.Generator().manual_seed(0))
        steered = actor.act(obs, noise)
        actor.steer(None, None)
        assert not torch.equal(steered.executed, actor.act(obs, noise).executed)
        assert steered.executed.shape == (1, 10, 7)
        assert steered.observations[libero_policy.VIEWS[0]].shape == (1, 3, 64, 64)
        asked.append(("train", training, given["rule"]))
        out.mkdir(parents=True)
        (out / "metrics.jsonl").write_text('{"env_steps": 40, "success": 0.5}\n')
        return critic.critic

    def compare(make_env: Any, driver: Any, arms: Any, **given: Any) -> tuple[dict[str, Any], list[Any]]:
        rows, noise = [], torch.randn(1, *driver.noise_shape, generator=torch.Generator().manual_seed(1))
        for each in arms:
            env = StandIn()
            seen, _ = env.reset(seed=given["seed"])
            start = env.place.copy()
            obs = {key: torch.as_tensor(value)[None] for key, value in seen.items()}
            chunk = driver.agent(each, None, None, 1)(obs, noise)
            for action in chunk[0].clip(-1, 1).numpy():
                env.step(action)
            rows.append(arm(each.spec, abs(env.place - start).max() / 5) | {"moved": chunk.tolist()})
        asked.append((given["seed"], given["episodes"], [each.spec for each in arms]))
        return {"seed": given["seed"], "arms": rows}, []

    monkeypatch.setattr(libero, "train_online", train)
    monkeypatch.setattr(libero, "compare_driven", compare)
    result = run_task(26, StandIn, frozen, tmp_path, SMALL, progress=False)
    (_, training, rule), (tuning, *_, tried), (evaluation, *_, specs) = asked
    assert rule == qsteer.Tweedie(0.3) and training == SMALL.online()
    assert (tuning, evaluation) == (20_000, 10_000)
    assert tried == [f"{m}={a}" for m in ("tweedie", "qgf-matched") for a in (0.1, 0.2, 0.3)]
    tuned = {
        row["spec"]: row["success"] for row in json.loads((tmp_path / "tuning.json").read_text())["arms"]
    }
    for method, alpha in result["strengths"].items():
        assert tuned[f"{method}={alpha}"] == max(tuned[f"{method}={a}"] for a in (0.1, 0.2, 0.3))
    chunks = {row["spec"]: torch.tensor(row["moved"]) for row in result["arms"]}
    base = chunks.pop("base")
    assert base.shape == (1, 10, 7) and specs[0] == "base"
    for spec, chunk in chunks.items():
        assert spec.startswith(("best-of", "random-of")) or not torch.equal(chunk, base), spec
    assert result["online"] == 0.5
    assert "sample_actions" not in vars(frozen.policy.model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, frozen: Frozen) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("table")
    return out, run_task(31, StandIn, frozen, out, SMALL, progress=False)


@pytest.mark.slow
def test_a_task_runs_from_nothing_to_its_rows(whole: tuple[Path, dict[str, Any]], frozen: Frozen) -> None:
    out, result = whole
    specs = [arm["spec"] for arm in result["arms"]]
    best = result["strengths"]
    assert specs == [
        "base",
        f"tweedie={best['tweedie']}",
        f"qgf-matched={best['qgf-matched']}",
        f"random-direction={best['tweedie']}",
        "best-of-5",
        "random-of-5",
    ]
    tuned = json.loads((out / "tuning.json").read_text())
    assert (tuned["seed"], len(tuned["arms"])) == (20_000, 6)
    assert json.loads((out / "evaluation.json").read_text())["seed"] == 10_000
    metrics = [json.loads(line) for line in (out / "online/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["env_steps"] == 40 and metrics[-1]["step"] == 40
    assert metrics[-1]["steered"] == 1
    critic = qsteer.Critic.from_pretrained(out / "online" / "last")
    assert critic.config.contract.target == "sarsa" and critic.config.horizon == 10
    tweedie = result["arms"][1]
    assert tweedie["displacement"][0] > 0 == result["arms"][0]["displacement"][0]
    assert (tweedie["policy_passes"]["backwards"], tweedie["critic_passes"]["backwards"]) == (9, 9)
    unsteer(frozen.policy)  # which does nothing: the handle is gone
    assert "sample_actions" not in vars(frozen.policy.model)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(
    whole: tuple[Path, dict[str, Any]], frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = whole
    monkeypatch.setattr(libero, "compare_driven", None)
    monkeypatch.setattr(libero, "train_online", None)
    assert run_task(31, StandIn, frozen, out, SMALL, progress=False) == result
    with pytest.raises(ValueError, match=r"results.json: expected a run with steps = 50, got 40"):
        run_task(31, StandIn, frozen, out, replace(SMALL, steps=50), progress=False)


@pytest.mark.slow
def test_the_command_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(simulator, "make", libero_stand_in.make)
    command = ["libero", "--policy", "random", "--tasks", "31", "--steps", "20", "--episodes", "1"]
    command += ["--tuning-episodes", "1", "--num-envs", "1", "--batch-size", "4", "--actor", "base"]
    main([*command, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert re.search(r"paper: QPILOTS-U +55 +55", text) and "here: tweedie" in text
    found = json.loads((tmp_path / "base-seed0.json").read_text())
    assert [row["task"] for row in found["results"]] == [31]
    assert format_table(found["results"]) in text


def test_other_tasks_are_refused(frozen: Frozen, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"task: expected one of \(26, .*, got 5"):
        run_task(5, StandIn, frozen, tmp_path)
    with pytest.raises(SystemExit):
        main(["libero", "--policy", "random", "--tasks", "5"])
    assert "invalid choice: 5" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--maps", "nowhere"], ["--actor", "posterior"]])
def test_a_missing_map_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(simulator, "make", libero_stand_in.make)
    with pytest.raises(SystemExit):
        main(["libero", "--policy", "random", *words, "--out", str(tmp_path)])
    assert (
        "--maps: expected a directory with a meta flow map of the policy in meta/" in capsys.readouterr().err
    )


def test_recording_is_all_that_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "make", libero_stand_in.make)
    main(["libero", "--policy", "random", "--tasks", "31", "--record", "3", "--out", str(tmp_path)])
    assert len(SafetensorsBatches(tmp_path / "task31" / "batches")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["task31"]


def arm(spec: str, success: float) -> dict[str, Any]:
    name, low, high = spec.partition("=")[0], max(success - 0.1, 0), min(success + 0.1, 1)
    return {
        "spec": spec,
        "name": name,
        "success": success,
        "low": low,
        "high": high,
        "difference": [0.1, 0, 0.2],
    }


def test_the_table_averages_seeds_and_stands_beside_the_paper() -> None:
    results = [
        {"task": task, "settings": {"seed": seed, "actor": "tweedie"}, "online": online, "arms": arms}
        for task, seed, online, arms in (
            (26, 0, 0.5, [arm("base", 0.1), arm("tweedie=0.3", 0.4)]),
            (26, 1, 0.7, [arm("base", 0.3), arm("tweedie=0.1", 0.8)]),
            (64, 0, None, [arm("base", 0.5), arm("tweedie=0.2", 1.0)]),
        )
    ]
    rows = {line[:30].strip(): line[30:].split() for line in format_table(results).splitlines()}
    assert rows["success in %"] == ["26", "64", "mean"]
    assert rows["here: base"] == ["20", "50", "35"]
    assert rows["here: tweedie"] == ["60", "100", "80"]
    assert rows["here: online: tweedie"] == ["60", "-", "-"]
    assert rows["paper: QPILOTS-U"] == ["43", "89", "66"]
    assert rows["paper: DSRL"] == ["36", "34", "35"]


def test_success_of_training_is_smoothed_over_the_lines_with_episodes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"env_steps": 10}, {"env_steps": 20, "success": 0.0}, {"env_steps": 30, "success": 1.0}]
    for count, expected in ((1, None), (2, 0.0), (3, pytest.approx(1.0, abs=0.01))):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        assert libero.smoothed_success(path) == expected


# Recorded batches


def test_recorded_batches_serve_a_teacher_and_an_audit(frozen: Frozen, tmp_path: Path) -> None:
    folder = record_walk(StandIn, frozen.preprocess, tmp_path, rows=9)
    batches = SafetensorsBatches(folder)
    assert len(batches) == 9
    states = batches.rows(list(range(9)))["observation.state"]
    assert len(states.unique(dim=0)) == 9
    live = check_first(frozen, first(StandIn()), StandIn.task_description)
    stored = batches.rows([0])
    assert stored.keys() == {key for key, value in live.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(stored[key], live[key]) for key in stored)
    teacher = HostTeacher(frozen.policy, batches)
    field, x1 = teacher.batch(2, torch.Generator().manual_seed(0))
    assert x1.shape == (2, 10, 8) and field(x1, 0.5).isfinite().all()
    again = record_walk(partial(StandIn), frozen.preprocess, tmp_path / "again", rows=2)
    assert torch.equal(SafetensorsBatches(again).rows([1])["observation.state"], states[1:2])
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        record_walk(StandIn, frozen.preprocess, tmp_path, rows=0)

"""Settings of the OGBench protocol: the paper's sentences about them, names that OGBench knows, objects."""

import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qsteer.experiments.protocol import (
    DOMAINS,
    find_domain,
    format_results,
    plan_critic,
    plan_online,
    plan_policy,
)
from qsteer.experiments.tasks import NUMBERS, Task
from qsteer.rules import Tweedie

PUBLISHED = {name for name, domain in DOMAINS.items() if domain.published}


def having(attribute: str, value: object) -> set[str]:
    return {name for name in PUBLISHED if getattr(DOMAINS[name], attribute) == value}


class TestTable:
    def test_alphas_are_those_of_the_paper(self) -> None:
        sentence = (
            "antmaze-large: 0.2, antmaze-giant: 0.3, humanoidmaze-medium: 0.2, humanoidmaze-large: 0.2, "
            "cube-double: 0.3, cube-triple: 0.5, cube-quadruple: 0.5, scene-play-sparse: 0.2, "
            "puzzle-3x3-play-sparse: 0.3, puzzle-4x4-play-sparse: 2.0"
        )
        alphas = dict(entry.replace("-play", "").split(": ") for entry in sentence.split(", "))
        assert {name: DOMAINS[name].alpha for name in PUBLISHED} == {
            name: float(alpha) for name, alpha in alphas.items()
        }

    def test_the_rest_is_that_of_the_paper(self) -> None:
        mazes = {name for name in PUBLISHED if "maze" in name}
        humanoids = {name for name in PUBLISHED if "humanoid" in name}
        assert len(PUBLISHED) == 10
        assert having("horizon", 1) == mazes
        assert having("horizon", 5) == PUBLISHED - mazes
        assert having("gamma", 0.995) == humanoids | {"antmaze-giant"}
        assert having("gamma", 0.99) == PUBLISHED - having("gamma", 0.995)
        assert having("rho", 0.0) == humanoids
        assert having("rho", 0.5) == PUBLISHED - humanoids
        assert having("sparse", True) == {name for name in PUBLISHED if name.endswith("-sparse")}
        assert having("large", True) == {"cube-quadruple", "puzzle-4x4-sparse"}
        assert having("tuning_tasks", (1, 4)) == mazes
        assert having("tuning_tasks", (2, 4)) == PUBLISHED - mazes

    def test_ogbench_knows_the_tasks(self) -> None:
        gymnasium = pytest.importorskip("gymnasium")
        pytest.importorskip("ogbench")
        from qsteer.envs.ogbench import dataset_name

        for name, domain in DOMAINS.items():
            for number in NUMBERS:
                task = find_domain(name).environment(number)
                assert dataset_name(task) == domain.data
                environment = task.replace("-play", "").replace("-navigate", "")  # how data is collected
                assert gymnasium.spec(environment).id == environment

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match=r"one of antmaze-large, .*, got 'scene'"):
            find_domain("scene")
        with pytest.raises(ValueError, match="got 'cube-dubble'; the nearest name is 'cube-double'"):
            find_domain("cube-dubble")
        with pytest.raises(ValueError, match="1 to 5, got 0"):
            find_domain("cube-double").environment(0)
        for wrong in ({"horizon": 0}, {"gamma": 1.0}, {"rho": -0.1}, {"alpha": -1.0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                replace(DOMAINS["cube-double"], **wrong)


@pytest.mark.parametrize("domain", [DOMAINS["humanoidmaze-large"], DOMAINS["puzzle-4x4-sparse"]])
def test_settings_carry_the_values(domain: Task) -> None:
    policy, critic = plan_policy(domain, seed=3), plan_critic(domain, seed=3)
    for training in (policy, critic):
        assert (training.steps, training.batch_size, training.seed) == (1_000_000, 256, 3)
        assert (training.learning_rate, training.gradient_clip) == (3e-4, 1.0)
        assert (training.horizon, training.hidden) == (domain.horizon, (512, 512, 512, 512))
    assert (critic.target, critic.members, critic.ema) == ("td", 10, 0.005)
    assert (critic.gamma, critic.rho) == (domain.gamma, domain.rho)
    assert domain.rule == Tweedie(domain.alpha)
    pytest.importorskip("gymnasium")
    online = plan_online(domain, seed=3)
    assert online.critic == critic
    assert (online.env_steps, online.updates_per_step, online.offline_share) == (500_000, 1, None)
    assert (online.episodes, online.warmup) == (50, 0)


def test_sparse_rewards_say_solved_or_not(tmp_path: Path) -> None:
    """There are two goals, one for each cube; data and environment agree, and solved is what it was."""
    pytest.importorskip("ogbench")
    from qsteer.envs import ogbench

    ogbench.generate(
        "cube-double-play-v0",
        tmp_path / "s.npz",
        transitions=30,
        val_transitions=5,
        workers=1,
        progress=False,
    )
    task = find_domain("cube-double").environment(2)
    loads = partial(ogbench.load, task, tmp_path / "s.npz")
    for dense, sparse in zip(loads(), loads(sparse=True), strict=True):
        assert dense["rewards"].min() < -1
        assert np.array_equal(sparse["rewards"], -(dense["rewards"] < 0).astype(np.float32))
        for column in dense.keys() - {"rewards"}:
            assert np.array_equal(dense[column], sparse[column])
    with contextlib.closing(ogbench.make(task, sparse=True)) as env:
        action = env.action_space.sample()
        rewards = []
        for judge in (env.env, env):
            env.reset(seed=0)
            rewards.append(judge.step(action)[1])
    assert rewards[0] < -1 == rewards[1]


@pytest.mark.slow
def test_the_protocol_runs_all_seeds_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small networks, few steps, the real task: both phases, results, a second call, another size."""
    pytest.importorskip("ogbench")
    from qsteer.cli import main
    from qsteer.envs import ogbench

    data, out = tmp_path / "data.npz", tmp_path / "run"
    ogbench.generate("pointmaze-medium-navigate-v0", data, transitions=2000, val_transitions=200, workers=1)
    command = [
        "protocol",
        "--domain",
        "pointmaze-medium",
        "--task",
        "1",
        "--seeds",
        "0",
        "1",
        "--out",
        str(out),
    ]
    command += [
        "--data",
        str(data),
        "--scale",
        "0.0002",
        "--hidden",
        "16",
        "--members",
        "3",
        "--episodes",
        "1",
    ]
    command += ["--arms", "best-of-2", "--evaluate-every", "500000", "--clones", "--num-envs", "2"]
    main(command)
    results = json.loads((out / "results.json").read_text())
    assert [arm["spec"] for arm in results["arms"]] == ["base", "best-of-2"]
    assert [len(results["arms"][1][phase]) for phase in ("offline", "online", "unsteered")] == [2, 2, 2]
    assert [len(tenths) for tenths in results["arms"][1]["curve"]] == [10, 10]
    online = out / "best-of-2" / "online"
    for seed in range(2):
        lines = [json.loads(line) for line in (online / f"seed{seed}/metrics.jsonl").open()]
        assert lines[-1]["env_steps"] == lines[-1]["step"] == 100
        assert [line["env_steps"] for line in lines if "evaluation/success" in line] == [100]
    assert (out / "best-of-2" / "offline" / "config.json").exists()  # TD asks how the arm acts
    main(command)
    assert json.loads((out / "results.json").read_text()) == results
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--episodes", "2"])
    assert "with size.episodes=2, got one with size.episodes=1" in capsys.readouterr().err


def results_of(number: int, *arms: tuple[str, list[float]]) -> dict[str, object]:
    rows = [{"spec": spec, "offline": [0.0] * len(rates), "online": rates} for spec, rates in arms]
    seeds = list(range(len(arms[0][1])))
    return {"domain": "cube-double", "task": number, "size": {}, "seeds": seeds, "arms": rows}


def test_the_table_has_each_task_and_their_interquartile_mean(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(4)]
    for path, arm in zip(
        paths,
        [
            ("tweedie=0.3", [0.0, 1.0]),
            ("tweedie=0.2", [0.5, 0.5]),
            ("tweedie=0.2", [0.5]),
            ("best-of-8", [0.5, 0.5]),
        ],
        strict=True,
    ):
        path.write_text(json.dumps(results_of(2, arm)))
    lines = format_results(paths[:2]).splitlines()
    assert lines[4].split() == ["tweedie", "online", "cube-double", "2", "50%", "0%", "..", "100%"]
    assert lines[5].split() == ["tweedie", "online", "cube-double", "2", "50%", "50%", "..", "50%"]
    assert lines[6].split()[:5] == ["tweedie", "online", "all,", "IQM", "50%"]
    with pytest.raises(ValueError, match="equally many"):
        format_results(paths[1:3])
    mixed = format_results([paths[0], paths[3]])
    assert "best-of-8" in mixed and "IQM" not in mixed  # no arm is in both
    two = results_of(2, ("tweedie=0.3", [0.25, 0.25]), ("tweedie=0.1", [1.0, 1.0]))
    paths[3].write_text(json.dumps(two))
    weak = [line.split() for line in format_results([paths[3]]).splitlines() if "online" in line]
    assert [(line[0], line[4]) for line in weak[::2]] == [("tweedie", "25%"), ("tweedie=0.1", "100%")]
    for broken in {"arms": []}, {"arms": [{"spec": "base", "offline": [2.0, 0.0]}]}, {"seeds": [0]}:
        paths[3].write_text(json.dumps(results_of(2, ("best-of-8", [0.5, 0.5])) | broken))
        with pytest.raises(ValueError, match=r"expected the results.json of qsteer protocol"):
            format_results([paths[3]])

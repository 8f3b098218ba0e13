"""The demonstration: a frozen policy fails at a task, the same policy steered by a critic succeeds."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsteer.critics import Critic
from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.envs.rollouts import MakeEnv, Rollouts
from qsteer.evaluation.arms import Arm, describe_arm, parse
from qsteer.evaluation.compare import compare, format_comparison
from qsteer.evaluation.plots import plot_success
from qsteer.evaluation.video import RenderError, side_by_side
from qsteer.experiments.tasks import RECIPES, Task, run_directory
from qsteer.files import write_json
from qsteer.policies import FlowPolicy
from qsteer.trace import Trace
from qsteer.training import train_critic, train_policy


def demo(
    name: str = "cube-single",
    *,
    out: Path = Path("runs/demo"),
    episodes: int = 100,
    num_envs: int = 8,
    checkpoints: Path = Path("examples/checkpoints"),
    from_scratch: bool = False,
    seed: int = 0,
) -> dict[str, object]:
    """Compare a task's arms; print a table, write results, plots and a video into ``out``.

    Args:
        name: of the task, a key of :data:`qsteer.experiments.tasks.RECIPES`.
        out: directory of ``results.json``, ``success.png``, ``trace.png`` and ``rollout.gif``.
        episodes: evaluation episodes per arm.
        num_envs: simulators at once.
        checkpoints: folder with ``policy`` and ``critic`` of each task, by name; that of a checkout, if it is
            the working directory.
        from_scratch: make data, policy and critic under ``runs/`` first; an interrupted run goes on.
        seed: training seed, with ``from_scratch``.

    Returns:
        What ``results.json`` holds.

    Raises:
        FileNotFoundError: the folder has none of this task.
    """
    started, task = time.perf_counter(), RECIPES[name]
    environment = task.environment()
    source = _make_checkpoints(task, seed) if from_scratch else _find_checkpoints(task, checkpoints)
    policy, critic = FlowPolicy.from_pretrained(source / "policy"), Critic.from_pretrained(source / "critic")
    arms = [parse(spec) for spec in task.arms]
    steered = next(spec for spec in task.arms if spec.startswith("tweedie"))
    print(
        f"{environment}: one frozen policy, one critic ({source}), the same {episodes} episodes for each arm"
    )

    trace, make_env = Trace(), partial(ogbench.make, environment)
    report, runs = compare(
        make_env,
        policy,
        critic,
        arms,
        episodes=episodes,
        num_envs=num_envs,
        record=True,
        traces={steered: trace},
    )
    report = {"task": environment, "checkpoints": str(source)} | report
    report = present(report, arms, runs, trace, out)
    film = partial(ogbench.make, environment, render=True)
    make_film(film, runs[0], next(run for run in runs if run.name == steered), out, task.camera)
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores")
    return report


def present(
    report: dict[str, object], arms: Sequence[Arm], runs: Sequence[Rollouts], trace: Trace, out: Path
) -> dict[str, object]:
    """Print the table; write results, picture and trace into ``out``; return the results."""
    report = {"command": shlex.join(["qsteer", *sys.argv[1:]])} | report
    write_json(report, out / "results.json")
    print("\n" + format_comparison(report) + "\n")
    print(f"results: {out / 'results.json'}")
    successes = {describe_arm(run.name): run.success for run in runs}
    base, *_ = successes
    controls = [describe_arm(arm.spec) for arm in arms if arm.kind == "control"]
    picture = out / "success.png"
    plot_success(successes, picture, base=base, controls=controls, title=str(report["task"]))
    print(f"plot:    {picture}")
    print(f"trace:   {trace.plot(out / 'trace.png')}")
    return report


def _find_checkpoints(task: Task, folder: Path) -> Path:
    source = folder / task.name
    if not source.is_dir():
        raise FileNotFoundError(
            f"expected the checkpoints of {task.name} in {source}, got none: a checkout of qsteer has "
            "those of cube-single, an installed package has none; run it in a checkout, or make them with "
            f"qsteer demo --task {task.name} --from-scratch"
        )
    return source


def _make_checkpoints(task: Task, seed: int) -> Path:
    """Make data, policy and critic; what is there already is not made again."""
    data, source = task.data_path, run_directory(task.name, seed)
    print(
        f"{task.name} from scratch, about {task.minutes} minutes on two cores: data, policy, critic, "
        "evaluation"
    )
    if not data.exists():
        transitions = task.transitions
        ogbench.generate(task.data, data, transitions=transitions, val_transitions=transitions // 10)
    columns, _ = ogbench.load(task.environment(), data)
    train = Episodes.from_ogbench(columns)
    train_policy(train, source / "policy", replace(task.policy, seed=seed))
    train_critic(train, source / "critic", replace(task.critic, seed=seed))
    return source


def make_film(make_env: MakeEnv, base: Rollouts, steered: Rollouts, out: Path, camera: str | None) -> None:
    """Film an episode in which the base policy fails and the steered one succeeds, side by side."""
    telling = (steered.success & ~base.success).nonzero()[0]
    episode, path = int(telling[0]) if telling.size else 0, out / "rollout.gif"
    try:
        arms = [replace(run, name=describe_arm(run.name)) for run in (base, steered)]
        side_by_side(make_env, arms, episodes=[episode], paths=[path], camera=camera)
        print(f"video:   {path} (episode {episode})")
    except RenderError as error:
        print(f"video:   none: {error}")

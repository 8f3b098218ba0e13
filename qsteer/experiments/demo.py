"""The demonstration: a frozen policy fails at a task, the same policy steered by a critic succeeds."""

import os
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsteer.critics import Critic
from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.envs.rollouts import Rollouts
from qsteer.evaluation.arms import parse
from qsteer.evaluation.compare import compare, table
from qsteer.evaluation.plots import plot_success
from qsteer.evaluation.video import RenderError, side_by_side
from qsteer.experiments.tasks import CHECKPOINTS, RECIPES, Recipe, run_directory
from qsteer.files import write_json
from qsteer.policies import FlowPolicy
from qsteer.trace import Trace
from qsteer.training import train_critic, train_policy


def demo(
    task: str = "cube-single",
    *,
    out: Path = Path("runs/demo"),
    episodes: int = 100,
    num_envs: int = 8,
    from_scratch: bool = False,
    seed: int = 0,
) -> dict[str, object]:
    """Compare the recipe's arms on one task; print a table, write results, plots and a video into ``out``.

    Args:
        task: a key of :data:`qsteer.experiments.tasks.RECIPES`.
        out: directory of ``results.json``, ``success.png``, ``trace.png`` and ``rollout.gif``.
        episodes: evaluation episodes per arm.
        num_envs: simulators at once.
        from_scratch: make data, policy and critic under ``runs/`` first; an interrupted run goes on.
        seed: training seed, with ``from_scratch``.

    Returns:
        What ``results.json`` holds.

    Raises:
        FileNotFoundError: the checkpoints kept in a checkout are not there.
    """
    started, recipe = time.perf_counter(), RECIPES[task]
    source = Path(os.path.relpath(_make(recipe, task, seed) if from_scratch else _kept(task)))
    policy, critic = FlowPolicy.from_pretrained(source / "policy"), Critic.from_pretrained(source / "critic")
    arms = [parse(spec) for spec in recipe.arms]
    steered = next(spec for spec in recipe.arms if spec.startswith("tweedie"))
    print(
        f"{recipe.task}: one frozen policy, one critic ({source}), the same {episodes} episodes for each arm"
    )

    trace, make_env = Trace(), partial(ogbench.make, recipe.task)
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
    report = {
        "task": recipe.task,
        "checkpoints": str(source),
        "command": shlex.join(["qsteer", *sys.argv[1:]]),
    } | report
    write_json(report, out / "results.json")
    print("\n" + table(report) + "\n")
    print(f"results: {out / 'results.json'}")
    successes = {run.name: run.success for run in runs}
    controls = [arm.spec for arm in arms if arm.kind == "control"]
    plot_success(successes, out / "success.png", base="base", controls=controls, title=recipe.task)
    print(f"plot:    {out / 'success.png'}")
    print(f"trace:   {trace.plot(out / 'trace.png')}")
    _film(recipe, runs[0], next(run for run in runs if run.name == steered), out / "rollout.gif")
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores")
    return report


def _kept(task: str) -> Path:
    source = CHECKPOINTS / task
    if not source.is_dir():
        raise FileNotFoundError(
            f"expected the checkpoints of {task} in {source}, got none: a checkout of qsteer has them, "
            f"an installed package has not; run from a checkout, or make them with "
            f"qsteer demo --task {task} --from-scratch"
        )
    return source


def _make(recipe: Recipe, task: str, seed: int) -> Path:
    """Make data, policy and critic; each is kept and not made again."""
    data, source = recipe.data_path, run_directory(task, seed)
    print(
        f"{task} from scratch, about {recipe.minutes} minutes on two cores: data, policy, critic, evaluation"
    )
    if not data.exists():
        transitions = recipe.transitions
        ogbench.generate(recipe.data, data, transitions=transitions, val_transitions=transitions // 10)
    columns, _ = ogbench.load(recipe.task, data)
    train = Episodes.from_ogbench(columns)
    train_policy(train, source / "policy", replace(recipe.policy, seed=seed))
    train_critic(train, source / "critic", replace(recipe.critic, seed=seed))
    return source


def _film(recipe: Recipe, base: Rollouts, steered: Rollouts, path: Path) -> None:
    """Film an episode in which the base policy fails and the steered one succeeds, side by side."""
    telling = (steered.success & ~base.success).nonzero()[0]
    episode = int(telling[0]) if telling.size else 0
    try:
        make_env = partial(ogbench.make, recipe.task, render=True)
        side_by_side(make_env, [base, steered], episodes=[episode], paths=[path], camera=recipe.camera)
        print(f"video:   {path} (episode {episode})")
    except RenderError as error:
        print(f"video:   none: {error}")

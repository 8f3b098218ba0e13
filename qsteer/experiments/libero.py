"""QPILOTS' table 3: a frozen pi0.5 on six tasks of LIBERO-90, and a critic that learns online to steer it.

QPILOTS (arXiv:2606.14801, section 5.2, appendix C): for each task a critic of two views of 64 pixels learns
by SARSA from nothing, for 5 x 10^5 environment steps, while the policy acts that it steers; chunks of 10.
:func:`run_task` does that, chooses strengths on the tuning episodes, and compares the arms on the evaluation
episodes; :func:`format_table` prints what came of it beside the paper's figures.

What differs here, or is not said in the paper: the critic sees the normalised state beside the views; the
first steps are the unsteered policy's; 8 simulators run at once; the paper's figures are read off the curves
of training, which :attr:`online` of a result is compared with, while evaluation episodes come after it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.envs.seeds import EVALUATION_SEED, TUNING_SEED
from qsteer.evaluation.arms import Arm, Maps, parse
from qsteer.evaluation.compare import compare_driven
from qsteer.evaluation.lerobot import LerobotPolicy, read_named, unchanged
from qsteer.experiments.libero_policy import ACTION_DIM, HORIZON, VIEWS, Frozen, check_first
from qsteer.files import read_json, write_json
from qsteer.fingerprints import fingerprint
from qsteer.online.actors import HostActor
from qsteer.online.run import train_online
from qsteer.online.settings import OnlineTraining
from qsteer.rules import Posterior
from qsteer.statistics import time_weighted_ema
from qsteer.training.critic import CriticTraining, fresh_critic
from qsteer.training.loop import METRICS

if TYPE_CHECKING:  # needs gymnasium
    from qsteer.envs.rollouts import MakeEnv

TASKS = (26, 31, 38, 59, 60, 64)
ALPHAS = {26: 0.3, 31: 0.3, 38: 0.1, 59: 0.3, 60: 0.2, 64: 0.2}
"""The paper's strength for each task (table 4), with which its policies act while the critic learns."""
STRENGTHS = (0.1, 0.2, 0.3)
"""What the paper chooses among, and this file for every guided method, in the matched norm."""
STEPS, EPISODES, TUNING_EPISODES = 500_000, 50, 20
CANDIDATES, POSTERIOR_SAMPLES = 5, 4
PAPER = {
    "pi0.5, zero-shot": (6, 14, 32, 19, 50, 36),
    "DSRL": (36, 22, 70, 93, 95, 34),
    "BoN (N=5)": (10, 19, 53, 35, 66, 57),
    "EXPO": (7, 29, 55, 28, 62, 52),
    "CGQL-LinEx": (11, 12, 25, 27, 64, 49),
    "QPILOTS-U": (43, 55, 91, 82, 99, 89),
    "QPILOTS-M": (41, 42, 78, 87, 98, 86),
}
"""Table 3: success in per cent on each of :data:`TASKS`, a mean over 5 seeds at the end of training."""
COUNTERPARTS = {
    "base": "pi0.5, zero-shot",
    "tweedie": "QPILOTS-U",
    "posterior": "QPILOTS-M",
    f"best-of-{CANDIDATES}": "BoN (N=5)",
}
"""The paper's name of an arm; the others are this project's."""

type Actor = Literal["base", "tweedie", "posterior", "qgf-matched", "best-of-5"]


@dataclass(frozen=True, kw_only=True)
class Table3:
    """How much of the paper's experiment is run, and how.

    Attributes:
        actor: who acts while the critic learns: an arm's name, at the paper's strength of the task; "base":
            the frozen policy.
        steps: environment steps of each task.
        episodes: evaluation episodes of each arm.
        tuning_episodes: of each strength, on seeds of their own.
        num_envs: simulators at once.
        seed: of the critic's weights, of training episodes and noise.
        batch_size: of the critic's updates.
        warmup: steps of the unsteered policy at first; None: 5000, or a tenth of a smaller budget.
        size: edge of the rendered views, in pixels.
        max_steps: time limit of an episode; None: the suite's, 400.
    """

    actor: Actor = "tweedie"
    steps: int = STEPS
    episodes: int = EPISODES
    tuning_episodes: int = TUNING_EPISODES
    num_envs: int = 8
    seed: int = 0
    batch_size: int = 256
    warmup: int | None = None
    size: int = 256
    max_steps: int | None = None

    def environment(self, task: int, assets: str | Path | None = None) -> "MakeEnv":
        """Return what makes the environment of a task, see :func:`qsteer.envs.libero.make`."""
        from qsteer.envs import libero

        return partial(libero.make, task, size=self.size, assets=assets, max_steps=self.max_steps)

    def online(self) -> OnlineTraining:
        """Return how the critic learns: appendix C, tables 2 to 4."""
        return OnlineTraining(
            critic=CriticTraining(
                target="sarsa",
                horizon=HORIZON,
                gamma=0.99,
                ema=0.005,
                members=10,
                rho=0.5,
                hidden=(128, 128, 128),
                batch_size=self.batch_size,
                learning_rate=3e-4,
                gradient_clip=1.0,
                warmup=500,
                decay=300_000,
                seed=self.seed,
            ),
            env_steps=self.steps,
            num_envs=self.num_envs,
            row=HORIZON,  # only what the policy decides on is rendered, and stored
            warmup=min(5_000, self.steps // 10) if self.warmup is None else self.warmup,
            evaluate_every=0,
            log_every=max(1, min(2_500, self.steps // 5)),
            checkpoint_every=max(1, min(25_000, self.steps // 5)),
        )

    def critic(self, state: int, action: int) -> CriticConfig:
        """Return what the critic sees: two views of 64 pixels and the state; four convolutions."""
        training = self.online().critic
        return replace(training.critic_config(state, action), views=VIEWS, view_size=64)


def make_arm(spec: str, maps: Maps) -> Arm:
    """Return an arm as the paper has it on LIBERO: no clipping, 4 posterior samples."""
    arm = parse(spec, maps, clip=None)
    if isinstance(arm.rule, Posterior):
        arm = replace(arm, rule=replace(arm.rule, samples=POSTERIOR_SAMPLES))
    return arm


def acting_spec(actor: Actor, alpha: float) -> str:
    """Return the arm that acts while the critic learns."""
    return actor if actor == "base" or actor.startswith("best-of") else f"{actor}={alpha}"


def guided(maps: Maps) -> tuple[str, ...]:
    """Return the methods whose strength is chosen."""
    return ("tweedie", "qgf-matched") if maps.meta is None else ("tweedie", "posterior", "qgf-matched")


def run_task(
    task: int,
    make_env: "MakeEnv",
    frozen: Frozen,
    out: str | Path,
    plan: Table3 | None = None,
    *,
    maps: Maps | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run one task, write ``out/results.json`` and return it; the same call goes on after a kill.

    ``out/online`` is what :func:`~qsteer.online.train_online` leaves, ``out/tuning.json`` and
    ``out/evaluation.json`` are what :func:`~qsteer.evaluation.compare.compare_driven` reports. What is
    there of the same settings is not run again.

    Args:
        task: number in LIBERO-90, one of :data:`TASKS`.
        make_env: makes its environment: ``plan.environment(task)``.
        frozen: the policy, see :func:`qsteer.experiments.libero_policy.open_frozen`; unsteered before and
            after.
        out: directory of the task.
        plan: how much; None: all of it.
        maps: the learnt maps; with a meta flow map QPILOTS-M is run.
        progress: show progress bars.

    Returns:
        ``task``, ``settings``, ``online`` (success during training, smoothed as in the paper, at its end;
        None without an episode that ended), ``strengths`` and ``arms``, as of a comparison.

    Raises:
        KeyError, ValueError: policy, processors and environment do not fit, see
            :func:`~qsteer.experiments.libero_policy.check_first`; or ``out`` holds a run with other settings.
        RuntimeError: another run has ``out`` open, or a simulator failed too often in a row.

    Cost: with E environment steps a task, E / 10 actions of the policy and E updates of the critic; then
    7 to 10 strengths on tuning episodes and 6 or 7 arms on evaluation episodes, of up to 400 steps each.
    """
    if task not in ALPHAS:
        raise ValueError(f"task: expected one of {TASKS}, got {task}; the paper has no other")
    plan, maps, out = plan or Table3(), maps or Maps(), Path(out)
    settings = _settings(plan, frozen, maps)
    if (done := _read(out / "results.json", settings)) is not None:
        return done
    first, instruction = _look(make_env)
    batch = check_first(frozen, first, instruction)
    critic = _learn(task, make_env, frozen, batch, instruction, plan, maps, out, progress)

    whole = LerobotPolicy(*frozen.parts, (unchanged, unchanged), instruction, read_named)
    driver = whole.driver(critic, first)

    def compared(name: str, specs: Sequence[str], episodes: int, seed: int) -> list[dict[str, Any]]:
        """Compare arms, or read what was compared before."""
        file, told = out / f"{name}.json", settings | {"specs": list(specs)}
        if (found := _read(file, told)) is None:
            report, _ = compare_driven(
                make_env,
                driver,
                [make_arm(spec, maps) for spec in specs],
                episodes=episodes,
                seed=seed,
                num_envs=plan.num_envs,
                progress=progress,
            )
            found = {"settings": told} | report
            write_json(found, file)
        return found["arms"]

    tried = [f"{method}={alpha}" for method in guided(maps) for alpha in STRENGTHS]
    rates = {
        arm["spec"]: arm["success"] for arm in compared("tuning", tried, plan.tuning_episodes, TUNING_SEED)
    }
    strengths = {
        method: max(STRENGTHS, key=lambda alpha: (rates[f"{method}={alpha}"], -alpha))
        for method in guided(maps)
    }
    specs = ["base", *(f"{method}={alpha}" for method, alpha in strengths.items())]
    specs += [f"random-direction={strengths['tweedie']}"]
    specs += [f"best-of-{CANDIDATES}", f"random-of-{CANDIDATES}"]
    arms = compared("evaluation", specs, plan.episodes, EVALUATION_SEED)
    result = {
        "task": task,
        "instruction": instruction,
        "settings": settings,
        "online": smoothed_success(out / "online" / METRICS),
        "strengths": strengths,
        "arms": arms,
    }
    write_json(result, out / "results.json")
    return result


def _learn(
    task: int,
    make_env: "MakeEnv",
    frozen: Frozen,
    batch: Mapping[str, Any],
    instruction: str,
    plan: Table3,
    maps: Maps,
    out: Path,
    progress: bool,
) -> Critic:
    """Let the policy act and a critic learn; return the critic, the policy unsteered."""
    training, arm = plan.online(), make_arm(acting_spec(plan.actor, ALPHAS[task]), maps)
    config = plan.critic(batch["observation.state"].shape[-1], frozen.action_dim)
    with torch.random.fork_rng(devices=[]):
        live = LiveCritic(fresh_critic(config, [plan.seed]).to(frozen.device))
    actor = HostActor(frozen.policy, live, frozen.preprocess, frozen.postprocess, instruction)
    try:
        return train_online(
            make_env,
            actor,
            live,
            out / "online",
            training,
            rule=arm.rule,
            sampler=None if arm.spec == "base" else arm.sampler,
            progress=progress,
        )
    finally:
        actor.handle.remove()


def _look(make_env: "MakeEnv") -> tuple[dict[str, Tensor], str]:
    """Return the first observation of an episode, of one row, and the instruction."""
    env = make_env()
    try:
        seen, _ = env.reset(seed=0)
        return {key: torch.as_tensor(value)[None] for key, value in seen.items()}, str(
            env.get_wrapper_attr("task_description")
        )
    finally:
        env.close()


def _settings(plan: Table3, frozen: Frozen, maps: Maps) -> dict[str, Any]:
    """Return what results depend on, as JSON holds it."""
    meta = None if maps.meta is None else fingerprint(maps.meta.state_dict().values())
    return asdict(plan) | {"policy": frozen.name, "meta": meta}


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was written with these settings; None: nothing was.

    Raises:
        ValueError: it was written with others.
    """
    if not path.exists():
        return None
    found = read_json(path)
    told = found.get("settings", {})
    if other := sorted(key for key in {*told, *settings} if told.get(key) != settings.get(key)):
        key = other[0]
        raise ValueError(
            f"{path}: expected a run with {key} = {settings.get(key)!r}, got {told.get(key)!r}; name another "
            "--out, or the settings that it began with"
        )
    return found


def smoothed_success(metrics: str | Path) -> float | None:
    """Return the success of the episodes of training, smoothed as in the paper, at its end.

    None: no episode has ended. A line of metrics counts once, however many episodes ended before it.
    """
    whole = map(json.loads, Path(metrics).read_text().splitlines())
    lines = [line for line in whole if "success" in line]
    steps = [line["env_steps"] for line in lines]
    if len(lines) < 2:
        return lines[0]["success"] if lines else None
    return float(time_weighted_ema(steps, [line["success"] for line in lines])[-1])


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return results of tasks beside the paper's figures: success in per cent, and against the frozen policy.

    Args:
        results: of :func:`run_task`, one for each task and seed; several seeds of a task are averaged.
    """
    tasks = [task for task in TASKS if any(result["task"] == task for result in results)]
    rates: dict[str, dict[int, list[float]]] = {}
    for result in results:
        if result["online"] is not None:
            name = f"online: {result['settings']['actor']}"
            rates.setdefault(name, {}).setdefault(result["task"], []).append(result["online"])
        for arm in result["arms"]:
            rates.setdefault(arm["name"], {}).setdefault(result["task"], []).append(arm["success"])
    lines = [f"{'success in %':<30}" + "".join(f"{task:>8}" for task in tasks) + f"{'mean':>8}"]
    for name, found in rates.items():
        means = [100 * float(np.mean(found[task])) if task in found else None for task in tasks]
        lines.append(_row(f"here: {name}", means))
        if name in COUNTERPARTS:
            lines.append(_paper_row(COUNTERPARTS[name], tasks))
    shown = {COUNTERPARTS[name] for name in rates if name in COUNTERPARTS}
    lines += [_paper_row(name, tasks) for name in PAPER if name not in shown]
    lines += ["", *_details(results)]
    return "\n".join(lines)


def _row(name: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if len(known) == len(values) else None
    return f"{name:<30}" + "".join(f"{'-' if v is None else f'{v:.0f}':>8}" for v in (*values, mean))


def _paper_row(name: str, tasks: Sequence[int]) -> str:
    return _row(f"paper: {name}", [float(PAPER[name][TASKS.index(task)]) for task in tasks])


def _details(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Give a line for each arm of each task: Wilson's interval, and the paired one against the policy."""
    yield f"{'task':>4} {'seed':>4} {'arm':<22}{'success':>8}{'95 %':>15}{'gain':>7}{'95 %, paired':>16}"
    for result in results:
        for arm in result["arms"]:
            gain, low, high = arm["difference"]
            first = arm["spec"] == "base"
            against = "" if first else f"{gain:>+7.0%}{f'{low:+.0%} .. {high:+.0%}':>16}"
            interval = f"{arm['low']:.0%} .. {arm['high']:.0%}"
            yield (
                f"{result['task']:>4} {result['settings']['seed']:>4} {arm['spec']:<22}"
                f"{arm['success']:>8.0%}{interval:>15}{against}"
            )


def record_walk(
    make_env: "MakeEnv", preprocess: Callable[[Any], Any], directory: str | Path, *, rows: int, seed: int = 0
) -> Path:
    """Record a policy's own batches along random walks; nothing of the policy is run.

    Each file of ``directory`` is one row, which :class:`~qsteer.data.SafetensorsBatches` reads: for
    :func:`qsteer.audit`, for latency, and for :class:`~qsteer.training.HostTeacher`, whose actions are the
    policy's. Between two rows a chunk of actions is acted, each drawn near the one before.

    Args:
        make_env: makes the environment.
        preprocess: the policy's own preprocessor.
        directory: where the files go.
        rows: how many.
        seed: of episodes and actions.

    Raises:
        ValueError: ``rows`` is not positive, or a row is not finite.

    Cost: :data:`~qsteer.experiments.libero_policy.HORIZON` steps of the simulator and one frame of each
    camera a row; 3 MB a row with two views of 256 pixels.
    """
    from qsteer.data import record

    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    record(_walk(make_env, preprocess, rows, seed), directory)
    return Path(directory)


def _walk(
    make_env: "MakeEnv", preprocess: Callable[[Any], Any], rows: int, seed: int
) -> Iterator[Mapping[str, Any]]:
    env, draw, begun = make_env(), np.random.default_rng(seed), 0
    cameras = getattr(env.unwrapped, "cameras", lambda on: None)
    try:
        over = True
        action: np.ndarray = np.zeros(ACTION_DIM)
        for _ in range(rows):
            if over:
                seen, _ = env.reset(seed=seed + begun)
                over, begun = False, begun + 1
            row = {key: torch.as_tensor(value)[None] for key, value in seen.items()}
            task = [str(env.get_wrapper_attr("task_description"))]
            yield preprocess(read_named(row) | {"task": task})
            for k in range(HORIZON):
                cameras(k == HORIZON - 1)
                action = np.clip(0.7 * action + 0.5 * draw.standard_normal(ACTION_DIM), -1, 1)
                seen, _, terminated, truncated, _ = env.step(action.astype(np.float32))
                over = terminated or truncated
                if over:
                    break
    finally:
        env.close()

"""OGBench from offline to online, as QPILOTS and QAM measure it, and the settings that all domains share.

QPILOTS (arXiv:2606.14801, section 5.1, appendix C) takes over the protocol of QAM (Li and Levine,
arXiv:2601.14234): 10 domains of 5 tasks, 10^6 offline updates, then 5 x 10^5 environment steps with one
update each on offline and online data, drawn uniformly; 8 seeds; success over 50 episodes at the end.

A :class:`~qsteer.experiments.tasks.Task` holds what differs between domains, a :class:`Size` what makes a run
long: its defaults are the papers'. :func:`plan_policy`, :func:`plan_critic` and :func:`plan_online` make
settings of both.

What differs here: the policy is cloned first, and stays frozen unless ``Size.clones``, where the papers go on
cloning with a moving average of the policy while the critic learns; networks are as qsteer builds them (GELU,
LayerNorm).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from qsteer.checks import check_at_least
from qsteer.experiments.tasks import TASKS, Task
from qsteer.files import read_json
from qsteer.online.settings import OnlineTraining
from qsteer.statistics import interquartile_mean, seed_bootstrap, stratified_bootstrap
from qsteer.training.critic import CriticTraining
from qsteer.training.policy import PolicyTraining

SEEDS = tuple(range(8))
LEARNING_RATE, GRADIENT_CLIP = 3e-4, 1.0
PHASES = "offline", "online", "unsteered"
"""Of an arm's results: under the offline critic, under its own, and of its policy alone after cloning."""
DOMAINS = {task.domain: task for task in TASKS.values()}
"""The tasks by the protocol's names, which tell sparse rewards from dense ones."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a run is; the defaults are the papers'.

    Attributes:
        offline_steps: gradient steps of the policy, and of the critic.
        online_steps: environment steps.
        updates_per_step: gradient steps for each of them.
        num_envs: simulators of each seed.
        batch_size: transitions per update of each seed.
        evaluate_every: environment steps between evaluations; 0: none.
        episodes: of an evaluation.
        hidden: widths of all networks.
        members: of the critic.
        ema: step of the target critic's moving average.
        target: of the critic; the papers' is TD, the next action being that of the steered policy.
        clones: policies go on cloning offline and online data, and what acts is their moving average.
        compile: compile the updates.
    """

    offline_steps: int = 1_000_000
    online_steps: int = 500_000
    updates_per_step: float = 1.0
    num_envs: int = 1
    batch_size: int = 256
    evaluate_every: int = 50_000
    episodes: int = 50
    hidden: Sequence[int] = (512, 512, 512, 512)
    members: int = 10
    ema: float = 0.005
    target: str = "td"
    clones: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the values; those of the trainings are checked by them."""
        check_at_least(self, 1, "offline_steps", "online_steps", "num_envs", "batch_size", "episodes")

    def scaled(self, factor: float) -> "Size":
        """Return the same with ``factor`` times the steps."""
        names = "offline_steps", "online_steps", "evaluate_every"
        counts = {name: round(factor * getattr(self, name)) for name in names}
        return replace(self, **{name: max(n, min(1, getattr(self, name))) for name, n in counts.items()})


PAPERS = Size()
"""The papers' size."""


def find_domain(name: str) -> Task:
    """Return a task by its name in the protocol.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in DOMAINS:
        near = get_close_matches(name, DOMAINS, n=1, cutoff=0.5)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {name!r}{hint}")
    return DOMAINS[name]


def plan_policy(task: Task, seed: int = 0, size: Size = PAPERS) -> PolicyTraining:
    """Return how the policy is cloned offline."""
    return PolicyTraining(
        steps=size.offline_steps,
        batch_size=size.batch_size,
        learning_rate=LEARNING_RATE,
        gradient_clip=GRADIENT_CLIP,
        seed=seed,
        compile=size.compile,
        horizon=task.horizon,
        hidden=size.hidden,
    )


def plan_critic(task: Task, seed: int = 0, size: Size = PAPERS) -> CriticTraining:
    """Return how the critic learns offline."""
    return CriticTraining(
        steps=size.offline_steps,
        batch_size=size.batch_size,
        learning_rate=LEARNING_RATE,
        gradient_clip=GRADIENT_CLIP,
        seed=seed,
        compile=size.compile,
        target=size.target,  # type: ignore[arg-type]  # checked there
        horizon=task.horizon,
        gamma=task.gamma,
        ema=size.ema,
        members=size.members,
        rho=task.rho,
        hidden=size.hidden,
    )


def plan_online(task: Task, seed: int = 0, size: Size = PAPERS) -> OnlineTraining:
    """Return how the offline critic goes on online; it steers from the first step on."""
    return OnlineTraining(
        critic=plan_critic(task, seed, size),
        env_steps=size.online_steps,
        num_envs=size.num_envs,
        warmup=0,
        updates_per_step=size.updates_per_step,
        evaluate_every=size.evaluate_every,
        episodes=size.episodes,
    )


def format_results(results: Sequence[str | Path]) -> str:
    """Return the results of several tasks as text: each task's mean, and the interquartile mean of all.

    Intervals are 95 %: bootstrap over seeds for a task, stratified bootstrap for the interquartile mean.
    Arms go by the names of :func:`list_arms`; those of all runs are pooled.

    Args:
        results: files that :func:`~qsteer.experiments.protocol_run.run_protocol` wrote, with equally many
            seeds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or the numbers of seeds differ.
    """
    runs = [read_results(path) for path in results]
    if len(set(counts := [len(run["seeds"]) for run in runs])) != 1:
        raise ValueError(f"results: expected one or more with equally many seeds, got {counts}")
    tables = [
        {
            (name, phase): row[phase]
            for name, row in list_arms(run).items()
            for phase in PHASES
            if phase in row
        }
        for run in runs
    ]
    lines = [f"{'arm':<22}{'phase':<10}{'task':<24}{'success':>8}   95 %"]
    for arm, phase in dict.fromkeys(key for table in tables for key in table):
        found = [table.get((arm, phase)) for table in tables]
        for run, column in zip(runs, found, strict=True):
            if column is None:
                continue
            mean, low, high = seed_bootstrap(column)
            task = f"{run['domain']} {run['task']}"
            lines.append(f"{arm:<22}{phase:<10}{task:<24}{mean:>8.0%}   {low:.0%} .. {high:.0%}")
        if None in found:
            continue
        scores = np.array(found).T
        iqm, interval = interquartile_mean(scores), stratified_bootstrap(scores)
        lines.append(
            f"{arm:<22}{phase:<10}{'all, IQM':<24}{iqm:>8.0%}   {interval.low:.0%} .. {interval.high:.0%}"
        )
    return "\n".join(lines)


def list_arms(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a run's rows by the names of their arms without strengths, which may differ between tasks.

    Of several strengths in one run the first has the name; the others go by their spec.
    """
    from qsteer.evaluation.arms import parse

    rows: dict[str, dict[str, Any]] = {}
    for row in run["arms"]:
        name = parse(row["spec"]).name
        rows[row["spec"] if name in rows else name] = row
    return rows


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a run's results.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    found = read_json(Path(path))
    keys = {"domain", "task", "seeds", "arms"}
    arms = found["arms"] if isinstance(found, dict) and keys <= found.keys() else None
    rates = (
        [row.get(phase) for row in arms for phase in PHASES if phase in row]
        if isinstance(arms, list) and all(isinstance(row, dict) and "spec" in row for row in arms)
        else []
    )
    if not rates or not all(
        isinstance(each, list)
        and len(each) == len(found["seeds"])
        and all(isinstance(rate, int | float) and 0 <= rate <= 1 for rate in each)
        for each in rates
    ):
        raise ValueError(
            f"{path}: expected the results.json of qsteer protocol (domain, task, seeds, and the success of "
            "each seed by arm and phase), got another JSON; name the file in a run directory"
        )
    return found

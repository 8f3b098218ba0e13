"""OGBench from offline to online, as QPILOTS and QAM measure it, and the settings that all domains share.

QPILOTS (arXiv:2606.14801, section 5.1, appendix C) takes over the protocol of QAM (Li and Levine,
arXiv:2601.14234): 10 domains of 5 tasks, 10^6 offline updates, then 5 x 10^5 environment steps with one
update each on offline and online data, drawn uniformly; 8 seeds; success over 50 episodes at the end.

A :class:`~qsteer.experiments.tasks.Task` holds what differs between domains. :func:`plan_policy`,
:func:`plan_critic` and :func:`plan_online` make settings of it, which :func:`dataclasses.replace` scales
down.

What differs here: the policy is cloned first and stays frozen, where the papers go on cloning with a
moving average of the policy while the critic learns; networks are as qsteer builds them (GELU).
"""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qsteer.experiments.tasks import TASKS, Task
from qsteer.files import read_json
from qsteer.online.settings import OnlineTraining
from qsteer.statistics import interquartile_mean, seed_bootstrap, stratified_bootstrap
from qsteer.training.critic import CriticTraining
from qsteer.training.policy import PolicyTraining

SEEDS = tuple(range(8))
OFFLINE_STEPS, ONLINE_STEPS = 1_000_000, 500_000
EVALUATE_EVERY, EPISODES = 50_000, 50
BATCH_SIZE, LEARNING_RATE, GRADIENT_CLIP = 256, 3e-4, 1.0
HIDDEN = (512, 512, 512, 512)
MEMBERS, EMA = 10, 0.005
EULER_STEPS = 10
DOMAINS = {task.domain: task for task in TASKS.values()}
"""The tasks by the protocol's names, which tell sparse rewards from dense ones."""


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


def plan_policy(task: Task, seed: int = 0) -> PolicyTraining:
    """Return how the policy is cloned offline."""
    return PolicyTraining(
        steps=OFFLINE_STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        gradient_clip=GRADIENT_CLIP,
        seed=seed,
        horizon=task.horizon,
        hidden=HIDDEN,
    )


def plan_critic(task: Task, seed: int = 0) -> CriticTraining:
    """Return how the critic learns: TD, the next action being that of the steered policy."""
    return CriticTraining(
        steps=OFFLINE_STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        gradient_clip=GRADIENT_CLIP,
        seed=seed,
        target="td",
        horizon=task.horizon,
        gamma=task.gamma,
        ema=EMA,
        members=MEMBERS,
        rho=task.rho,
        hidden=HIDDEN,
    )


def plan_online(task: Task, seed: int = 0) -> OnlineTraining:
    """Return how the offline critic goes on online; it steers from the first step on."""
    return OnlineTraining(
        critic=plan_critic(task, seed),
        env_steps=ONLINE_STEPS,
        num_envs=1,
        warmup=0,
        evaluate_every=EVALUATE_EVERY,
        episodes=EPISODES,
    )


def run_protocol(
    task: Task,
    number: int,
    data: str | Path,
    out: str | Path,
    *,
    seeds: Sequence[int] = SEEDS,
    scale: float = 1.0,
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Run the protocol on one task, all seeds at once, and write ``out/results.json``; resumable.

    ``out/seedN/policy`` are the cloned policies, ``out/offline`` the stack of critics after the offline
    phase, ``out/online`` what :func:`~qsteer.online.train_online` leaves. In the end every seed's
    base and steered policy meet the evaluation episodes.

    Args:
        task: one of :data:`DOMAINS`.
        number: of its goal, 1 to 5.
        data: the data set's .npz file, official or generated.
        out: run directory.
        seeds: of initial weights.
        scale: of all numbers of steps; 1: the paper's.
        device: where to train; with several seeds small networks fill a GPU.
        progress: show progress bars.

    Raises:
        ValueError: there is no such goal, or ``out`` holds a run with other settings.
    """
    from qsteer.critics import LiveCritic
    from qsteer.data import Chunks, Episodes
    from qsteer.envs import ogbench
    from qsteer.evaluation.arms import parse
    from qsteer.evaluation.compare import compare
    from qsteer.files import write_json
    from qsteer.online.actors import StateActor
    from qsteer.online.run import train_online
    from qsteer.samplers import Euler
    from qsteer.training import train_critic, train_policy
    from qsteer.training.critic import LEARNERS, fresh_critic

    name, out = task.environment(number), Path(out)
    episodes = Episodes.from_ogbench(ogbench.load(name, data, sparse=task.sparse)[0])
    make_env = partial(ogbench.make, name, sparse=task.sparse)

    def steps(n: int) -> int:
        return max(1, round(scale * n))

    policies = []
    for seed in seeds:
        training = replace(plan_policy(task, seed), steps=steps(OFFLINE_STEPS))
        policy = train_policy(
            episodes, out / f"seed{seed}" / "policy", training, device=device, progress=progress
        )
        policies.append(policy.to(device))

    learning = replace(plan_critic(task, seeds[0]), steps=steps(OFFLINE_STEPS))
    config = learning.critic_config(episodes.observations.shape[1], episodes.actions.shape[1])
    actor = StateActor(policies, fresh_critic(config, seeds))
    act = actor.sample_under(task.rule, Euler(steps=EULER_STEPS, clip="policy"))
    critic = train_critic(
        episodes, out / "offline", learning, act=act, seeds=seeds, device=device, progress=progress
    )

    live = LiveCritic(critic)
    online = plan_online(task, seeds[0])
    online = replace(online, env_steps=steps(ONLINE_STEPS), evaluate_every=steps(EVALUATE_EVERY))
    chunks = Chunks(episodes.to(device), task.horizon, task.gamma, LEARNERS[learning.target].need)
    critic = train_online(
        make_env,
        StateActor(policies, live),
        live,
        out / "online",
        online,
        rule=task.rule,
        offline=chunks,
        act=act,
        progress=progress,
    )

    arms = [parse("base"), parse(f"tweedie={task.alpha}")]
    critics = critic.unstacked() if len(seeds) > 1 else [critic]
    rows = []
    for seed, policy, own in zip(seeds, policies, critics, strict=True):
        report, _ = compare(make_env, policy.cpu(), own.cpu(), arms, episodes=EPISODES, progress=progress)
        rows.append({"seed": seed} | {arm["name"]: arm["success"] for arm in report["arms"]})
    result = {"domain": task.domain, "task": number, "scale": scale, "episodes": EPISODES, "seeds": rows}
    return write_json(result, out / "results.json")


def format_results(results: Sequence[str | Path]) -> str:
    """Return the results of several tasks as text: each task's mean, and the interquartile mean of all.

    Intervals are 95 %: bootstrap over seeds for a task, stratified bootstrap for the interquartile mean.

    Args:
        results: files that :func:`run_protocol` wrote, with equally many seeds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or the numbers of seeds differ.
    """
    runs = [_read_results(Path(path)) for path in results]
    if len(set(counts := [len(run["seeds"]) for run in runs])) != 1:
        raise ValueError(f"results: expected one or more with equally many seeds, got {counts}")
    lines = [f"{'task':<24}{'arm':<10}{'success':>8}   95 %"]
    for arm in ("base", "tweedie"):
        scores = np.array([[row[arm] for row in run["seeds"]] for run in runs]).T
        for run, column in zip(runs, scores.T, strict=True):
            mean, low, high = seed_bootstrap(column)
            task = f"{run['domain']} {run['task']}"
            lines.append(f"{task:<24}{arm:<10}{mean:>8.0%}   {low:.0%} .. {high:.0%}")
        iqm, interval = interquartile_mean(scores), stratified_bootstrap(scores)
        lines.append(f"{'all, IQM':<24}{arm:<10}{iqm:>8.0%}   {interval.low:.0%} .. {interval.high:.0%}")
    return "\n".join(lines)


def _read_results(path: Path) -> dict[str, Any]:
    """Read what :func:`run_protocol` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    found = read_json(path)
    keys = {"domain", "task", "seeds"}
    seeds = found["seeds"] if isinstance(found, dict) and keys <= found.keys() else None
    rates = (
        [row.get(arm) for row in seeds for arm in ("base", "tweedie")]
        if (isinstance(seeds, list) and all(isinstance(row, dict) for row in seeds))
        else []
    )
    if not rates or not all(isinstance(rate, int | float) and 0 <= rate <= 1 for rate in rates):
        raise ValueError(
            f"{path}: expected the results.json of qsteer protocol (domain, task, and the success of base "
            "and tweedie of each of seeds), got another JSON; name the file in a run directory"
        )
    return found

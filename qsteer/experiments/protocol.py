"""OGBench from offline to online, as QPILOTS and QAM measure it: settings of each domain, and of all.

QPILOTS (arXiv:2606.14801, section 5.1, appendix C) takes over the protocol of QAM (Li and Levine,
arXiv:2601.14234): 10 domains of 5 tasks, 10^6 offline updates, then 5 x 10^5 environment steps with one
update each on offline and online data, drawn uniformly; 8 seeds; success over 50 episodes at the end.

A :class:`Domain` holds what differs between domains, and makes the settings objects of
:mod:`qsteer.training`, which :func:`dataclasses.replace` scales down.

What is otherwise here: the policy is cloned first and stays frozen, where the papers go on cloning with a
moving average of the policy while the critic learns; networks are as qsteer builds them (GELU).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qsteer.rules import Tweedie
from qsteer.statistics import interquartile_mean, seed_bootstrap, stratified_bootstrap
from qsteer.training.critic import CriticTraining
from qsteer.training.policy import PolicyTraining

if TYPE_CHECKING:  # needs gymnasium
    from qsteer.online.settings import OnlineTraining

TASKS = (1, 2, 3, 4, 5)
"""Numbers of the tasks of every domain."""
SEEDS = tuple(range(8))
OFFLINE_STEPS, ONLINE_STEPS = 1_000_000, 500_000
EVALUATE_EVERY, EPISODES = 50_000, 50
BATCH_SIZE, LEARNING_RATE, GRADIENT_CLIP = 256, 3e-4, 1.0
HIDDEN = (512, 512, 512, 512)
MEMBERS, EMA = 10, 0.005
EULER_STEPS, POSTERIOR_SAMPLES = 10, 8


@dataclass(frozen=True)
class Domain:
    """A domain of OGBench with its settings (QPILOTS, table 2).

    Attributes:
        name: key in :data:`DOMAINS`.
        data: OGBench's name of the data set, which all tasks share.
        horizon: actions per chunk.
        gamma: discount per step.
        rho: pessimism of the critic, in standard deviations over its members.
        alpha: strength of the guidance, relative to the velocity's norm.
        sparse: the reward is -1 until the task is solved, not minus the number of its unmet goals
            (``qsteer.envs.ogbench.make`` and ``load`` take it).
        large: the papers use OGBench's data set of 100 million transitions, not the standard one.
        tuning_tasks: on which ``alpha`` was chosen; results on the others are held out.
        published: the settings are the paper's, not this project's for a quick experiment.
    """

    name: str
    data: str
    horizon: int
    gamma: float
    rho: float
    alpha: float
    sparse: bool = False
    large: bool = False
    tuning_tasks: tuple[int, ...] = (2, 4)
    published: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.horizon < 1:
            raise ValueError(f"horizon: expected at least 1, got {self.horizon}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma: expected a number between 0 and 1, got {self.gamma}")
        for name in ("rho", "alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    @property
    def rule(self) -> Tweedie:
        """QPILOTS-U; the other method of the paper is ``Posterior(domain.alpha)`` with 8 samples."""
        return Tweedie(self.alpha)

    def policy(self, seed: int = 0) -> PolicyTraining:
        """Return how the policy is cloned offline."""
        return PolicyTraining(
            steps=OFFLINE_STEPS,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            gradient_clip=GRADIENT_CLIP,
            seed=seed,
            horizon=self.horizon,
            hidden=HIDDEN,
        )

    def critic(self, seed: int = 0) -> CriticTraining:
        """Return how the critic learns: TD, the next action being that of the steered policy."""
        return CriticTraining(
            steps=OFFLINE_STEPS,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            gradient_clip=GRADIENT_CLIP,
            seed=seed,
            target="td",
            horizon=self.horizon,
            gamma=self.gamma,
            ema=EMA,
            members=MEMBERS,
            rho=self.rho,
            hidden=HIDDEN,
        )

    def online(self, seed: int = 0) -> "OnlineTraining":
        """Return how the offline critic goes on online; it steers from the first step on.

        Raises:
            ModuleNotFoundError: gymnasium is not installed.
        """
        from qsteer.online.settings import OnlineTraining

        return OnlineTraining(
            critic=self.critic(seed),
            env_steps=ONLINE_STEPS,
            num_envs=1,
            warmup=0,
            evaluate_every=EVALUATE_EVERY,
            episodes=EPISODES,
        )


DOMAINS = {
    domain.name: domain
    for domain in (
        Domain("antmaze-large", "antmaze-large-navigate-v0", 1, 0.99, 0.5, 0.2, tuning_tasks=(1, 4)),
        Domain("antmaze-giant", "antmaze-giant-navigate-v0", 1, 0.995, 0.5, 0.3, tuning_tasks=(1, 4)),
        Domain(
            "humanoidmaze-medium", "humanoidmaze-medium-navigate-v0", 1, 0.995, 0.0, 0.2, tuning_tasks=(1, 4)
        ),
        Domain(
            "humanoidmaze-large", "humanoidmaze-large-navigate-v0", 1, 0.995, 0.0, 0.2, tuning_tasks=(1, 4)
        ),
        Domain("cube-double", "cube-double-play-v0", 5, 0.99, 0.5, 0.3),
        Domain("cube-triple", "cube-triple-play-v0", 5, 0.99, 0.5, 0.5),
        Domain("cube-quadruple", "cube-quadruple-play-v0", 5, 0.99, 0.5, 0.5, large=True),
        Domain("scene-sparse", "scene-play-v0", 5, 0.99, 0.5, 0.2, sparse=True),
        Domain("puzzle-3x3-sparse", "puzzle-3x3-play-v0", 5, 0.99, 0.5, 0.3, sparse=True),
        Domain("puzzle-4x4-sparse", "puzzle-4x4-play-v0", 5, 0.99, 0.5, 2.0, sparse=True, large=True),
        Domain("cube-single", "cube-single-play-v0", 5, 0.99, 0.5, 0.2, tuning_tasks=(2,), published=False),
        Domain(
            "pointmaze-medium",
            "pointmaze-medium-navigate-v0",
            5,
            0.99,
            0.5,
            0.3,
            tuning_tasks=(1,),
            published=False,
        ),
    )
}
"""The domains of the papers, and two small ones which this project adds."""


def task_name(domain: str, number: int) -> str:
    """Return OGBench's name of a task: ``task_name("cube-double", 2)``.

    Raises:
        ValueError: there is no such domain or task.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {domain!r}")
    if number not in TASKS:
        raise ValueError(f"number: expected the number of a task, 1 to 5, got {number}")
    data, _, version = DOMAINS[domain].data.rpartition("-")
    return f"{data}-singletask-task{number}-{version}"


def run(
    domain: str,
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
    phase, ``out/online`` what :func:`~qsteer.online.loop.train_online` leaves. In the end every seed's
    base and steered policy meet the evaluation episodes.

    Args:
        domain: key of :data:`DOMAINS`.
        number: of the task, 1 to 5.
        data: the data set's .npz file, official or generated.
        out: run directory.
        seeds: of initial weights.
        scale: of all numbers of steps; 1: the paper's.
        device: where to train; with several seeds small networks fill a GPU.
        progress: show progress bars.

    Raises:
        ValueError: there is no such task, or ``out`` holds a run with other settings.
    """
    from qsteer.critics import LiveCritic
    from qsteer.data import Chunks, Episodes
    from qsteer.envs import ogbench
    from qsteer.evaluation.arms import parse
    from qsteer.evaluation.compare import compare
    from qsteer.files import write_json
    from qsteer.online.actors import StateActor
    from qsteer.online.loop import train_online
    from qsteer.samplers import Euler
    from qsteer.training import train_critic, train_policy
    from qsteer.training.critic import LEARNERS, fresh_critic

    name, settings, out = task_name(domain, number), DOMAINS[domain], Path(out)
    episodes = Episodes.from_ogbench(ogbench.load(name, data, sparse=settings.sparse)[0])
    make_env = partial(ogbench.make, name, sparse=settings.sparse)

    def steps(n: int) -> int:
        return max(1, round(scale * n))

    policies = []
    for seed in seeds:
        training = replace(settings.policy(seed), steps=steps(OFFLINE_STEPS))
        policy = train_policy(
            episodes, out / f"seed{seed}" / "policy", training, device=device, progress=progress
        )
        policies.append(policy.to(device))

    learning = replace(settings.critic(seeds[0]), steps=steps(OFFLINE_STEPS))
    config = learning.critic_config(episodes.observations.shape[1], episodes.actions.shape[1])
    actor = StateActor(policies, fresh_critic(config, seeds))
    act = actor.sample_under(settings.rule, Euler(steps=EULER_STEPS, clip=(-1.0, 1.0)))
    critic = train_critic(
        episodes, out / "offline", learning, act=act, seeds=seeds, device=device, progress=progress
    )

    live = LiveCritic(critic)
    online = settings.online(seeds[0])
    online = replace(online, env_steps=steps(ONLINE_STEPS), evaluate_every=steps(EVALUATE_EVERY))
    chunks = Chunks(episodes.to(device), settings.horizon, settings.gamma, LEARNERS[learning.target].need)
    critic = train_online(
        make_env,
        StateActor(policies, live),
        live,
        out / "online",
        online,
        rule=settings.rule,
        offline=chunks,
        act=act,
        progress=progress,
    )

    arms = [parse("base"), parse(f"tweedie={settings.alpha}")]
    critics = critic.unstacked() if len(seeds) > 1 else [critic]
    rows = []
    for seed, policy, own in zip(seeds, policies, critics, strict=True):
        report, _ = compare(make_env, policy.cpu(), own.cpu(), arms, episodes=EPISODES, progress=progress)
        rows.append({"seed": seed} | {arm["name"]: arm["success"] for arm in report["arms"]})
    result = {"domain": domain, "task": number, "scale": scale, "episodes": EPISODES, "seeds": rows}
    return write_json(result, out / "results.json")


def table(results: Sequence[str | Path]) -> str:
    """Return the results of several tasks as text: each task's mean, and the interquartile mean of all.

    Intervals are 95 %: bootstrap over seeds for a task, stratified bootstrap for the interquartile mean.

    Args:
        results: files that :func:`run` wrote, with equally many seeds.

    Raises:
        ValueError: the numbers of seeds differ.
    """
    runs = [json.loads(Path(path).read_text()) for path in results]
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

"""The OGBench protocol, run: policies and critics offline, each arm online, and its evaluation."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qsteer.checks import list_differences
from qsteer.critics import Critic, LiveCritic
from qsteer.data import Chunks, Episodes
from qsteer.envs import ogbench
from qsteer.envs.rollouts import MakeEnv
from qsteer.evaluation.arms import Arm, parse
from qsteer.evaluation.compare import compare
from qsteer.experiments.protocol import PAPERS, SEEDS, Size, plan_critic, plan_online, plan_policy
from qsteer.experiments.tasks import Task
from qsteer.files import read_json, write_json
from qsteer.online.actors import StateActor
from qsteer.online.run import train_online
from qsteer.policies import FlowPolicy
from qsteer.training import train_critic, train_policy
from qsteer.training.critic import ACTING, LEARNERS, SteeredPolicy, fresh_critic
from qsteer.training.loop import METRICS

TENTHS = 10


def run_protocol(
    task: Task,
    number: int,
    data: str | Path,
    out: str | Path,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    size: Size = PAPERS,
    online: bool = True,
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Run the protocol on one task, all seeds at once, and write ``out/results.json``; resumable.

    ``out/seedN/policy`` are the cloned policies. Each arm gets a folder of its name, with what
    :func:`~qsteer.online.train_online` leaves in ``online``. The critics of the offline phase are in
    ``seedN/critic`` and, as a stack, in ``offline``: of the arm's folder or, if their target asks nothing of
    the arm, of ``out``. Each arm meets the evaluation episodes under the offline critic and, unless it is a
    control, under its own after the online phase. An arm whose results are there is not run again.

    Args:
        task: one of :data:`DOMAINS`.
        number: of its goal, 1 to 5.
        data: the data set's .npz file, official or generated.
        out: run directory.
        arms: ways of acting, see :func:`qsteer.evaluation.arms.parse`; none: QPILOTS-U, ``tweedie=ALPHA``.
        seeds: of initial weights.
        size: how large.
        online: False: the arms are measured under the offline critic alone.
        device: where to train; with several seeds small networks fill a GPU.
        progress: show progress bars.

    Raises:
        ValueError: there is no such goal or arm, an arm needs a map, or ``out`` holds a run of another size.
    """
    name, out = task.environment(number), Path(out)
    parsed = [parse(spec) for spec in arms or [f"tweedie={task.alpha}"]]
    header = {"domain": task.domain, "task": number, "size": asdict(size), "seeds": list(seeds)}
    results: dict[str, Any] = header | {"arms": []}
    path = out / "results.json"
    if path.exists():
        results = read_json(path)
        earlier = {key: value for key, value in results.items() if key != "arms"}
        if differences := list_differences(json.loads(json.dumps(header)), earlier):
            expected, found = differences
            raise ValueError(
                f"{path}: expected a run with {expected}, got one with {found}; use another --out"
            )
    run = _Run(
        task,
        size,
        tuple(seeds),
        partial(ogbench.make, name, sparse=task.sparse),
        Episodes.from_ogbench(ogbench.load(name, data, sparse=task.sparse)[0]),
        out,
        device,
        progress,
    )
    rows = {row["spec"]: row for row in results["arms"]}
    for arm in (parse("base"), *parsed):
        rows[arm.spec] = run.measure(arm, rows.get(arm.spec, {}), online)
        write_json(results | {"arms": list(rows.values())}, path)
    return path


@dataclass(frozen=True)
class _Run:
    """A run on one task; what is trained already is read."""

    task: Task
    size: Size
    seeds: tuple[int, ...]
    make_env: MakeEnv
    episodes: Episodes
    out: Path
    device: str
    progress: bool

    def measure(self, arm: Arm, known: dict[str, Any], online: bool) -> dict[str, Any]:
        """Return the success of an arm: of each seed after the offline and the online phase, and between.

        Args:
            arm: how to act.
            known: what was measured of it before.
            online: whether to learn online if the arm does.
        """
        row = {"spec": arm.spec, "kind": arm.kind} | known
        online = online and arm.kind == "steered" and "online" not in row
        if "offline" in row and not online:
            return row
        policies = self.train_policies()
        offline = self.fresh_critics() if arm.spec == "base" else self.train_offline(arm, policies)
        if "offline" not in row:
            row["offline"] = self.evaluate(arm, policies, offline)
        if online:
            critics = self.train_online(arm, policies, offline)
            row |= {"online": self.evaluate(arm, policies, critics), "curve": self.read_curves(arm)}
            if self.size.clones:
                row["unsteered"] = self.evaluate(parse("base"), policies, critics)
        return row

    def train_policies(self) -> list[FlowPolicy]:
        """Return every seed's policy as it was cloned offline."""
        return [
            train_policy(
                self.episodes,
                self.out / f"seed{seed}" / "policy",
                plan_policy(self.task, seed, self.size),
                device=self.device,
                progress=self.progress,
            ).to(self.device)
            for seed in self.seeds
        ]

    def train_offline(self, arm: Arm, policies: Sequence[FlowPolicy]) -> Critic:
        """Return the critics after the offline phase, as a stack if there are several seeds."""
        training = plan_critic(self.task, self.seeds[0], self.size)
        directory = self.offline_directory(arm)
        critics = train_critic(
            self.episodes,
            directory,
            training,
            act=self.act(arm, StateActor(policies, self.fresh_critics())),
            seeds=self.seeds,
            device=self.device,
            progress=self.progress,
        )
        for seed, critic in zip(self.seeds, self.split(critics), strict=True):
            critic.save_pretrained(directory.parent / f"seed{seed}" / "critic")
        return critics

    def train_online(self, arm: Arm, policies: Sequence[FlowPolicy], offline: Critic) -> Critic:
        """Return the critics after the online phase; policies that go on cloning change in place."""
        training, live = plan_online(self.task, self.seeds[0], self.size), LiveCritic(offline)
        actor = StateActor(policies, live)
        need = LEARNERS[training.critic.target].need
        return train_online(
            self.make_env,
            actor,
            live,
            self.directory(arm) / "online",
            training,
            rule=arm.rule,
            sampler=arm.sampler,
            offline=Chunks(self.episodes.to(self.device), self.task.horizon, self.task.gamma, need),
            act=self.act(arm, actor),
            start=self.offline_directory(arm),
            cloning=plan_policy(self.task, self.seeds[0], self.size) if self.size.clones else None,
            progress=self.progress,
        )

    def fresh_critics(self) -> Critic:
        """Return untrained critics."""
        shape = self.episodes.observations.shape[1], self.episodes.actions.shape[1]
        return fresh_critic(plan_critic(self.task, size=self.size).critic_config(*shape), self.seeds)

    def evaluate(self, arm: Arm, policies: Sequence[FlowPolicy], critics: Critic) -> list[float]:
        """Return each seed's success on the evaluation episodes."""
        episodes, progress = self.size.episodes, self.progress
        reports = [
            compare(self.make_env, policy.cpu(), critic.cpu(), [arm], episodes=episodes, progress=progress)[0]
            for policy, critic in zip(policies, self.split(critics), strict=True)
        ]
        for policy in policies:
            policy.to(self.device)
        return [report["arms"][0]["success"] for report in reports]

    def split(self, critics: Critic) -> list[Critic]:
        """Return each seed's critic by itself."""
        return critics.unstacked() if len(self.seeds) > 1 else [critics]

    def act(self, arm: Arm, actor: StateActor) -> SteeredPolicy | None:
        """Return how the next action comes about, for targets that ask."""
        return actor.sample_under(arm.rule, arm.sampler) if self.size.target in ACTING else None

    def directory(self, arm: Arm) -> Path:
        """Return where an arm's own runs go."""
        return self.out / arm.spec

    def offline_directory(self, arm: Arm) -> Path:
        """Return where the critics of the offline phase go."""
        return (self.directory(arm) if self.size.target in ACTING else self.out) / "offline"

    def read_curves(self, arm: Arm) -> list[list[float | None]]:
        """Return the success of each seed's own episodes, by tenths of its steps; None: none ended."""
        out = self.directory(arm) / "online"
        runs = [out] if len(self.seeds) == 1 else [out / f"seed{s}" for s in range(len(self.seeds))]
        return [read_tenths(run / METRICS, self.size.online_steps) for run in runs]


def read_tenths(path: Path, steps: int) -> list[float | None]:
    """Return the mean success of the episodes that ended in each tenth of so many environment steps."""
    ended, solved = np.zeros(TENTHS), np.zeros(TENTHS)
    for line in map(json.loads, path.read_text().splitlines()):
        if line["episodes"]:
            tenth = min(TENTHS - 1, (line["env_steps"] - 1) * TENTHS // steps)
            ended[tenth] += line["episodes"]
            solved[tenth] += line["episodes"] * line["success"]
    return [float(s / n) if n else None for s, n in zip(solved, ended, strict=True)]

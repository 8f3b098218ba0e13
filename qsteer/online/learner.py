"""A critic that learns from rows of a replay while a frozen policy acts: the half without environments."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qsteer.contract import Contract, check_contract
from qsteer.critics.critic import Critic, CriticConfig
from qsteer.critics.live import LiveCritic
from qsteer.data.episodes import Chunks
from qsteer.data.layout import Rows
from qsteer.data.replay import Replay
from qsteer.files import append_json_line, mend_directory, replacing_directory, trim_json_lines
from qsteer.fingerprints import describe, warn_unknown
from qsteer.online.actors import Steered
from qsteer.online.health import Health
from qsteer.online.logs import LogWindow, Tracker
from qsteer.online.rewards import RewardGuard
from qsteer.online.settings import OnlineTraining
from qsteer.online.sources import StackedSource, make_layout
from qsteer.trace import Trace
from qsteer.training.checkpoints import resume, save, start_from
from qsteer.training.critic import LEARNERS, CriticTraining, SteeredPolicy
from qsteer.training.generators import list_generators
from qsteer.training.loop import METRICS, SPEED, descend, differentiator
from qsteer.types import Rule, Sampler

CHECK_EVERY = 10
"""Gradient steps between two checks of the critic's health, if so many are due at once."""

LOSSES = "refused", "failed"
"""What the environments lost so far: rows that were refused, and simulators that were replaced."""


@runtime_checkable
class Ledger(Protocol):
    """What became of the episodes in N environments; see :class:`~qsteer.online.collect.Collector`."""

    @property
    def finished(self) -> list[tuple[int, bool, float, int]]:
        """``(environment, success, sum of rewards, length)`` since it was emptied."""
        ...

    @property
    def refused(self) -> np.ndarray:
        """Rows of each environment that were refused: (N,)."""
        ...

    @property
    def failed(self) -> np.ndarray:
        """How often each environment was replaced: (N,)."""
        ...


def add_contract(
    config: CriticConfig, actor: Steered, settings: CriticTraining, offline: Chunks | None
) -> CriticConfig:
    """Return a critic's configuration with what it will have been trained on.

    Raises:
        ValueError: the critic, or the offline data, are of another contract than the actor's policy, or the
            critic learnt with another discount.
    """
    policy: Contract = getattr(actor, "contract", Contract())
    before = config.contract or Contract()
    check_contract(before, policy)
    if before.discount not in (None, settings.gamma):
        raise ValueError(
            f"critic: expected one that learnt with the discount gamma = {settings.gamma} of its further "
            f"training, got {before.discount}; train with gamma={before.discount}, or a new critic"
        )
    data = Contract() if offline is None else offline.episodes.contract
    return replace(config, contract=before | settings.contract(config, data, policy))


class OnlineLearner:
    """The state of a run that learns online: counters, learner, replay, and where they are kept."""

    def __init__(
        self,
        actor: Steered,
        critic: LiveCritic,
        out: Path,
        training: OnlineTraining,
        rule: Rule | None,
        sampler: Sampler | None,
        offline: Chunks | None = None,
        act: SteeredPolicy | None = None,
        compared: Mapping[str, Any] | None = None,
        start: Path | None = None,
    ) -> None:
        self.steered, self.live, self.out, self.training = actor, critic, out, training
        self.rule, self.sampler = rule, sampler
        settings = training.critic
        critic.critic.config = config = add_contract(critic.config, actor, settings, offline)
        self.stack = config.stack
        out.mkdir(parents=True, exist_ok=True)
        kind = LEARNERS[settings.target]
        self.replay = Replay(make_layout(config, training), directory=out / "replay", device=critic.device)
        own = [range(s * training.num_envs, (s + 1) * training.num_envs) for s in range(self.stack)]
        self.source = StackedSource(self.replay, own, offline, training.offline_share)
        learning = deepcopy(critic.critic).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.learner = kind(learning, self.source, settings, act).to(critic.device)
        if start is not None:
            start_from(start, self.learner, target=settings.target, gamma=settings.gamma)
        self.optimizer = settings.optimizer([p for p in self.learner.parameters() if p.requires_grad])
        self.differentiate = differentiator(self.learner, self.optimizer, settings)
        device = critic.device
        drawing = [part for part in (rule, sampler) if part is not None]
        others = [g for part in drawing for g in part.generators(device)] + self.learner.generators(device)
        self.generators = list_generators(settings.seed, device, others)
        self.generator = self.generators[0]
        self.health = Health(gamma=settings.gamma**training.row)
        self.rewards = RewardGuard(self.health, self.replay, out, training)
        if offline is not None:
            self.rewards.read_offline(offline)
        same: dict[str, Any] = {"critic": config, "rule": rule, "sampler": sampler, **(compared or {})}
        described = asdict(training) | {"critic": settings.describe()}
        self.identity = {"training": described} | {k: describe(v) for k, v in same.items()}
        self.update = resume(out, self.learner, self.optimizer, self.generators, self.identity)
        if self.update:
            warn_unknown(str(out), self.identity)
            self.rewards.drop_outliers()
        for directory in self.seed_directories:
            for name in ("last", "best"):
                mend_directory(directory / name)
            trim_json_lines(directory / METRICS)
            trim_json_lines(directory / SPEED)
            if not self.finished:  # killed between its last line of metrics and its last checkpoint
                for name in (METRICS, SPEED):
                    trim_json_lines(directory / name, training.env_steps - 1, key="env_steps")
        if self.update:
            critic.publish(self.learner.target)
            self.health.keep(self.learner, self.optimizer)
        actor.trace = Trace(steps=False, keep=1)
        self.stream = torch.cuda.Stream(critic.device) if critic.device.type == "cuda" else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.env_steps >= self.training.env_steps and self.update >= self.due

    @property
    def due(self) -> int:
        """Gradient steps that should have been made by now."""
        training, steps = self.training, self.env_steps
        return int(steps * training.updates_per_step) if steps > training.warmup else 0

    @property
    def env_steps(self) -> int:
        """Environment steps of each seed so far; rows count in full."""
        return self.replay.added * self.training.row // self.stack

    @property
    def seed_directories(self) -> list[Path]:
        """Where the metrics and critics of each seed go."""
        return [self.out] if self.stack == 1 else [self.out / f"seed{s}" for s in range(self.stack)]

    def store(self, rows: Rows, lanes: Sequence[int] | None = None) -> None:
        """Keep a row of every lane, or of some. When this returns, they are stored."""
        self.replay.add(rows, lanes)
        self.health.observe_rewards(rows.rewards if rows.kept is None else rows.rewards[rows.kept])

    def crossed(self, before: int, every: int) -> bool:
        """Return whether the steps since ``before`` have passed a multiple of ``every``; 0: there is none."""
        return every > 0 and before // every < self.env_steps // every

    @property
    def steers(self) -> bool:
        """Whether the critic has learnt something and is healthy."""
        return self.update > 0 and self.health.steers

    def steer(self, allowed: bool = True) -> None:
        """Steer while the critic may (:attr:`steers`) and it is allowed; else leave the policy alone."""
        steering = self.steers and allowed
        self.steered.steer(self.rule if steering else None, self.sampler if steering else None)

    def learn(self, window: LogWindow) -> None:
        """Make the gradient steps that are due, and publish the moving average."""
        due = self.due
        if self.update >= due or not self.source.ready():
            return
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            self.catch_up(due, window)

    def catch_up(self, due: int, window: LogWindow) -> None:
        """Make the gradient steps up to number ``due``; on CUDA on a stream of their own."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.default_stream(self.live.device))
        while self.update < due:
            for _ in range(min(CHECK_EVERY, due - self.update)):
                info = self.step()
            self.watch(info, window)
        self.live.publish(self.learner.target)

    def step(self) -> dict[str, Tensor]:
        """Make one gradient step, before the first all that precedes it; return its metrics."""
        if not self.update:
            self.rewards.drop_outliers()
            self.fit_normalisation()
            self.health.keep(self.learner, self.optimizer)
        self.update += 1
        loss, info = self.differentiate(self.generator)
        descend(self.learner, self.optimizer, self.training.critic, self.update)
        return {"loss": loss} | info

    def watch(self, info: dict[str, Tensor], window: LogWindow) -> None:
        """Restore the last good state if the critic is ill, else keep this one."""
        if reason := self.health.check(info, self.learner.parameters()):
            tqdm.write(
                f"{self.out.name}: {reason}; back to the last good critic, unsteered until it recovers"
            )
            self.health.restore(self.learner, self.optimizer)
            self.rewards.drop_outliers()
        else:
            self.health.keep(self.learner, self.optimizer)
            window.info = info

    def settle(self) -> None:
        """Wait for the learner's stream."""
        if self.stream is not None:
            self.stream.synchronize()

    def fit_normalisation(self) -> None:
        """Standardise the critic's inputs by what the warm-up saw, unless the critic came with statistics."""
        if not bool(self.learner.critic.normalizer.mean.any()):
            seen = self.source.sample(4096 * self.stack, self.generator).observations
            for critic in (self.learner.critic, self.learner.target):
                critic.fit_normalisation(seen)

    def critics(self) -> list[Critic]:
        """Return each seed's moving-average critic."""
        return [self.learner.target] if self.stack == 1 else self.learner.target.unstacked()

    def log(
        self,
        window: LogWindow,
        ledger: Ledger,
        scores: Sequence[dict[str, float]],
        tracker: Tracker,
    ) -> dict[str, float]:
        """Write a line of metrics for each seed; return the last one, for the progress bar."""
        counts = {"step": self.update, "env_steps": self.env_steps}
        self.settle()
        shared = {name: float(value) for name, value in window.info.items()}
        shared |= {"steered": float(self.health.steers), "trips": float(self.health.trips)}
        shared["outliers"] = float(self.health.scale.outliers)
        trace = self.steered.trace
        shared |= {"fallbacks": float(trace.fallbacks), "gated": float(trace.gated)}
        found = trace.arrays()
        for name in ("strength", "displacement"):
            if found[name].size:
                shared[name] = float(np.nanmean(found[name]))
        trace.actions.clear()
        trace.displacements.clear()
        trace.steps = True
        speed = window.speed(self.env_steps, self.update)
        line: dict[str, float] = {}
        for s, directory in enumerate(self.seed_directories):
            lanes = slice(s * self.training.num_envs, (s + 1) * self.training.num_envs)
            mine = [outcome for lane, *outcome in ledger.finished if lanes.start <= lane < lanes.stop]
            means = map(np.mean, zip(*mine, strict=True))
            episodes = (
                dict(zip(("success", "return", "length"), map(float, means), strict=True)) if mine else {}
            )
            counted = {"episodes": float(len(mine))}
            counted |= {name: float(getattr(ledger, name)[lanes].sum()) for name in LOSSES}
            line = episodes | counted | shared | scores[s]
            append_json_line(directory / METRICS, counts | line)
            append_json_line(directory / SPEED, counts | speed)
            tracker.log({f"{directory.name}/{k}": v for k, v in (line | speed).items()}, self.env_steps)
        ledger.finished.clear()
        shown = [name for name in ("success", "return", "q", "strength") if name in line]
        lost = [name for name in LOSSES if line[name]]
        return {name: line[name] for name in (*shown, *lost)} | {"updates/s": speed["updates/s"]}

    def save(self) -> None:
        """Write the learner's checkpoint and each seed's last critic."""
        self.settle()
        save(self.out, self.learner, self.optimizer, self.generators, self.update, self.identity)
        self.save_critics()

    def save_critics(self) -> None:
        """Write each seed's last critic."""
        for directory, critic in zip(self.seed_directories, self.critics(), strict=True):
            with replacing_directory(directory / "last") as fresh:
                critic.save_pretrained(fresh)

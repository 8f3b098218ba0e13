"""The online loop: a frozen policy acts, a critic learns from what happens, and steers the policy."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from qsteer.contract import Contract, check_contract
from qsteer.critics.critic import Critic, CriticConfig
from qsteer.critics.live import LiveCritic
from qsteer.data.episodes import Chunks
from qsteer.data.replay import Replay
from qsteer.envs.seeds import VALIDATION_SEED
from qsteer.files import (
    append_json_line,
    mend_directory,
    replacing_directory,
    trim_json_lines,
    write_json,
)
from qsteer.fingerprints import describe, warn_unknown
from qsteer.online.actors import Actor, Decision, StateActor
from qsteer.online.health import Health
from qsteer.online.logs import LogWindow, Tracker
from qsteer.online.rewards import RewardGuard
from qsteer.online.settings import OnlineTraining
from qsteer.online.sources import StackedSource, make_layout
from qsteer.trace import Trace
from qsteer.training.critic import LEARNERS, CriticTraining, SteeredPolicy
from qsteer.training.generators import list_generators
from qsteer.training.loop import METRICS, SPEED, descend, differentiator, resume, save
from qsteer.types import Observation, Rule, Sampler

if TYPE_CHECKING:  # needs gymnasium
    from qsteer.online.collect import Collector

CHECK_EVERY = 10
"""Gradient steps between two checks of the critic's health, if so many are due at once."""

LOSSES = "refused", "failed"
"""What the simulators lost so far: rows that were refused, and simulators that were replaced."""


def add_contract(
    config: CriticConfig, actor: Actor, settings: CriticTraining, offline: Chunks | None
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


class OnlineLoop:
    """The state of a run: counters, learner, replay, and where they are kept."""

    def __init__(
        self,
        actor: Actor,
        critic: LiveCritic,
        out: Path,
        training: OnlineTraining,
        rule: Rule | None,
        sampler: Sampler | None,
        offline: Chunks | None,
        act: SteeredPolicy | None,
    ) -> None:
        self.actor, self.live, self.out, self.training = actor, critic, out, training
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
        self.fast = actor.fast if isinstance(actor, StateActor) else None
        compared: dict[str, Any] = {"critic": config, "rule": rule, "sampler": sampler}
        if self.fast is not None:  # it is asked for other rows, and rounds otherwise
            compared["actor"] = self.fast.kept.mode
        described = asdict(training) | {"critic": settings.describe()}
        self.identity = {"training": described} | {k: describe(v) for k, v in compared.items()}
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

    def run(self, collector: "Collector", log: Tracker, bar: tqdm) -> None:
        """Act and learn until the environment steps are used up."""
        training = self.training
        window = LogWindow(self.env_steps, self.update)
        self.learn(window)  # what a killed run had not learnt yet
        while (before := self.env_steps) < training.env_steps:
            self.round(collector, window)
            after = self.env_steps
            bar.update(after - before)
            evaluates, logs, saves = (
                every > 0 and before // every < after // every and after < training.env_steps
                for every in (training.evaluate_every, training.log_every, training.checkpoint_every)
            )
            if evaluates or logs:
                self.report(window, collector, log, bar, evaluates)
                window = LogWindow(self.env_steps, self.update)
            if saves:
                self.save()
        self.learn(window)
        self.report(window, collector, log, bar, training.evaluate_every > 0)
        self.save()

    def report(
        self, window: LogWindow, collector: "Collector", log: Tracker, bar: tqdm, evaluates: bool
    ) -> None:
        """Write a line of metrics, after an evaluation if it is due."""
        scores: list[dict[str, float]] = [{} for _ in range(self.stack)]
        if evaluates:
            with window.share("evaluate"):
                scores = self.evaluate(collector)
        shown = self.log(window, collector, scores, log)
        bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)

    def round(self, collector: "Collector", window: LogWindow) -> None:
        """Send a row of actions to every simulator, learn while they work, and store the outcome."""
        self.steer()
        with window.share("act"):
            collector.send(self.act, self.generator)
        with window.share("learn"):
            self.learn(window)
        with window.share("wait"):
            rows = collector.receive()
        with window.share("store"):
            self.replay.add(rows)
            self.rewards.list_outliers(collector.outliers, self.env_steps)
        self.health.observe_rewards(rows.rewards[rows.kept])

    def steer(self) -> None:
        """Steer once the critic has learnt something and while it is healthy; else leave the policy alone."""
        steering = self.update > 0 and self.health.steers
        self.actor.steer(self.rule if steering else None, self.sampler if steering else None)

    def act(self, obs: Observation, lanes: np.ndarray) -> Decision:
        """Return chunks for the environments that ask.

        A stack is asked for equally many of each seed; a compiled actor, always for all.
        """
        trace = self.actor.trace
        trace.steps = trace.steps and not trace.actions  # one traced action a line of metrics
        if self.stack == 1 and self.fast is None:
            return self.actor.act(obs, self.noise(len(lanes)))
        seed = lanes // self.training.num_envs
        place = np.arange(len(lanes)) - np.searchsorted(seed, seed)  # within the seed; lanes are sorted
        rows = np.zeros((self.stack, self.training.num_envs if self.fast else place.max() + 1), int)
        rows[seed, place] = np.arange(len(lanes))
        padded = tree_map(itemgetter(rows.ravel()), obs)
        decision = self.actor.act(padded, self.noise(rows.size))
        return tree_map(itemgetter(seed * rows.shape[1] + place), decision)

    def noise(self, n: int) -> Tensor:
        """Return the noise of n chunks."""
        device = self.generator.device
        return torch.randn(n, *self.actor.noise_shape, generator=self.generator, device=device)

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
        if not self.update:
            self.rewards.drop_outliers()
            self.fit_normalisation()
            self.health.keep(self.learner, self.optimizer)
        while self.update < due:
            for _ in range(min(CHECK_EVERY, due - self.update)):
                self.update += 1
                loss, info = self.differentiate(self.generator)
                descend(self.learner, self.optimizer, self.training.critic, self.update)
            self.watch({"loss": loss} | info, window)
        self.live.publish(self.learner.target)

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

    def evaluate(self, collector: "Collector") -> list[dict[str, float]]:
        """Roll out what would act now on the fixed episodes, seed by seed; running ones are cut for it."""
        self.settle()
        self.live.publish(self.learner.target)
        self.steer()
        scores = []
        for directory, actor, critic in zip(
            self.seed_directories, self.actors(), self.critics(), strict=True
        ):
            run = collector.rollout(
                partial(_executed, actor),
                episodes=self.training.episodes,
                seed=VALIDATION_SEED,
                noise_shape=actor.noise_shape,
                progress=False,
            )
            means = {"success": run.success, "return": run.sum_reward, "length": run.length}
            score = {f"evaluation/{name}": float(values.mean()) for name, values in means.items()}
            scores.append(score)
            self.keep_best(directory / "best", critic, score)
        collector.abandon()
        self.replay.cut()
        return scores

    def keep_best(self, directory: Path, critic: Critic, score: Mapping[str, float]) -> None:
        """Save the critic if it is the best so far, in success and then in return."""
        path = directory / "evaluation.json"
        former = json.loads(path.read_text()) if path.exists() else None
        order = "evaluation/success", "evaluation/return"
        if former is None or [score[name] for name in order] > [former[name] for name in order]:
            with replacing_directory(directory) as fresh:
                critic.save_pretrained(fresh)
                write_json({"env_steps": self.env_steps, **score}, fresh / path.name)

    def actors(self) -> Sequence[Actor]:
        """Return each seed's actor by itself."""
        return [self.actor] if self.stack == 1 else self.actor.unstacked()

    def critics(self) -> list[Critic]:
        """Return each seed's moving-average critic."""
        return [self.learner.target] if self.stack == 1 else self.learner.target.unstacked()

    def log(
        self,
        window: LogWindow,
        collector: "Collector",
        scores: Sequence[dict[str, float]],
        tracker: Tracker,
    ) -> dict[str, float]:
        """Write a line of metrics for each seed; return the last one, for the progress bar."""
        counts = {"step": self.update, "env_steps": self.env_steps}
        self.settle()
        shared = {name: float(value) for name, value in window.info.items()}
        shared |= {"steered": float(self.health.steers), "trips": float(self.health.trips)}
        shared["outliers"] = float(self.health.scale.outliers)
        trace = self.actor.trace
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
            mine = [outcome for lane, *outcome in collector.finished if lanes.start <= lane < lanes.stop]
            means = map(np.mean, zip(*mine, strict=True))
            episodes = (
                dict(zip(("success", "return", "length"), map(float, means), strict=True)) if mine else {}
            )
            counted = {"episodes": float(len(mine))}
            counted |= {name: float(getattr(collector, name)[lanes].sum()) for name in LOSSES}
            line = episodes | counted | shared | scores[s]
            append_json_line(directory / METRICS, counts | line)
            append_json_line(directory / SPEED, counts | speed)
            tracker.log({f"{directory.name}/{k}": v for k, v in (line | speed).items()}, self.env_steps)
        collector.finished.clear()
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


def _executed(actor: Actor, obs: Observation, noise: Tensor) -> Tensor:
    return actor.act(obs, noise).executed

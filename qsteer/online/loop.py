"""The online loop: a frozen policy acts, a critic learns from what happens, and steers the policy."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from qsteer.critics.critic import Critic
from qsteer.critics.live import LiveCritic
from qsteer.data.episodes import Chunks
from qsteer.envs.seeds import VALIDATION_SEED
from qsteer.files import replacing_directory, write_json
from qsteer.online.actors import Actor, Decision, StateActor
from qsteer.online.cloning import OnlineCloning
from qsteer.online.learner import OnlineLearner
from qsteer.online.logs import LogWindow, Tracker
from qsteer.online.settings import OnlineTraining
from qsteer.policies import FlowPolicy
from qsteer.training.critic import SteeredPolicy
from qsteer.training.policy import PolicyTraining
from qsteer.types import Observation, Rule, Sampler

if TYPE_CHECKING:  # needs gymnasium
    from qsteer.online.collect import Collector


class OnlineLoop(OnlineLearner):
    """A run in simulators."""

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
        start: Path | None = None,
        cloning: PolicyTraining | None = None,
    ) -> None:
        self.actor, self.fast = actor, actor.fast if isinstance(actor, StateActor) else None
        # A compiled actor is asked for other rows, and rounds otherwise.
        compared: dict[str, Any] = {} if self.fast is None else {"actor": self.fast.kept.mode}
        compared |= {} if cloning is None else {"cloning": cloning.describe()}
        policies = [] if cloning is None else check_policies(actor, critic.config.stack)
        super().__init__(actor, critic, out, training, rule, sampler, offline, act, compared, start)
        self.cloning = None
        if cloning is not None:
            self.cloning = OnlineCloning(policies, self.source, cloning, training.critic.ema)
            self.cloning.resume(out / "cloning", self.identity)

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
                self.crossed(before, every) and after < training.env_steps
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

    @override
    def step(self) -> dict[str, Tensor]:
        info = super().step()
        if self.cloning is not None:
            self.cloning.step(self.update, self.generator)
        return info

    @override
    def save(self) -> None:
        if self.cloning is not None:  # first: it never makes a step twice
            self.cloning.save(self.out / "cloning", self.identity, self.seed_directories)
        super().save()

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
            self.store(rows)
            self.rewards.list_outliers(collector.outliers, self.env_steps)

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


def check_policies(actor: Actor, stack: int) -> Sequence[FlowPolicy]:
    """Return an actor's policies, which are to go on cloning.

    Raises:
        ValueError: it acts with others than flow policies on states, its actions are compiled, or the critics
            of a stack share a policy.
    """
    if not isinstance(actor, StateActor) or actor.fast is not None or len(actor.policies) != stack:
        found = type(actor).__name__
        if isinstance(actor, StateActor):
            found += f" of {len(actor.policies)} policies" + (", compiled" if actor.fast else "")
        raise ValueError(
            f"cloning: expected an eager StateActor with a policy for each of {stack} seeds, got a {found}; "
            "leave cloning out, or give it such an actor"
        )
    return actor.policies


def _executed(actor: Actor, obs: Observation, noise: Tensor) -> Tensor:
    return actor.act(obs, noise).executed

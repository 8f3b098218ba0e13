"""A lerobot policy in a lerobot environment, as arms act with it: the processors of both around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qsteer.adapters import host_of
from qsteer.compiling.kept import Mode
from qsteer.critics import Critic, LiveCritic
from qsteer.critics.encoders import pooled
from qsteer.envs.lerobot import LerobotSimulator, unflatten
from qsteer.evaluation.arms import Arm
from qsteer.evaluation.compare import Driver
from qsteer.online.actors import HostActor
from qsteer.sampling import acting, sample
from qsteer.steering.opening import Opened, open_action
from qsteer.trace import Trace

ROUNDS = 5
"""Timed actions of each arm."""


def read_lerobot(obs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return observations of lerobot's environments as its processors take them."""
    from lerobot.envs import preprocess_observation

    return preprocess_observation(unflatten({key: column.cpu().numpy() for key, column in obs.items()}))


def read_named(obs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return observations that have a policy's names, with images in [0, 1]: :mod:`qsteer.envs.libero`."""
    return {key: column / 255 if column.dtype == torch.uint8 else column for key, column in obs.items()}


def unchanged(value: Any) -> Any:
    """Return what is given: the processor of an environment that needs none."""
    return value


@dataclass(frozen=True)
class LerobotPolicy:
    """A frozen lerobot policy between an environment's observations and its actions.

    Observations go through lerobot's ``preprocess_observation``, the environment's processor and the
    policy's; actions come back through the policy's postprocessor and the environment's, step by step, as in
    lerobot's own rollouts. Executed are the policy's ``n_action_steps`` of a chunk.

    Attributes:
        policy: on its device.
        preprocessor: the policy's.
        postprocessor: the policy's.
        env_processors: the environment's, before the policy and after it.
        instruction: the task in words.
        read: makes of an environment's observations what its processor takes.
    """

    policy: Any
    preprocessor: Callable[[Any], Any]
    postprocessor: Callable[[Any], Any]
    env_processors: tuple[Callable[[Any], Any], Callable[[Any], Any]]
    instruction: str
    read: Callable[[Mapping[str, Tensor]], dict[str, Any]] = read_lerobot

    @property
    def horizon(self) -> int:
        """Executed steps of a chunk."""
        host = host_of(self.policy)
        return int(host.read(self.policy, host.executed))

    @property
    def action_dim(self) -> int:
        """Entries of an action, without padding."""
        return host_of(self.policy).action_dim(self.policy)

    @torch.no_grad()
    def features(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the policy's pooled features (B, F) of a batch; torch's random state stays as it is."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return pooled(open_action(self.policy, dict(batch)).field.features)

    def batch(self, obs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what the policy takes, for what the simulators give."""
        rows = len(next(iter(obs.values())))
        return self.preprocessor(self.env_processors[0](self.read(obs) | {"task": [self.instruction] * rows}))

    def open(self, obs: Mapping[str, Tensor], critic: Critic) -> Opened:
        """Return velocity, value and noise of an observation; torch's random state stays as it is."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return open_action(self.policy, self.batch(obs), critic)

    def act(self, arm: Arm, critic: Critic, trace: Trace | None, obs: Any, noise: Tensor) -> Tensor:
        """Return the environment's actions (B, H, A) of an arm."""
        with acting(critic):
            field, value, like = self.open(obs, critic)
            x = noise.to(like)
            chunk = sample(field, value, x, rule=arm.rule, sampler=arm.sampler, trace=trace)
        return self.execute(chunk[:, : self.horizon, : self.action_dim])

    def execute(self, chunk: Tensor) -> Tensor:
        """Return the environment's actions (B, H, A) for the policy's."""
        steps = [self.postprocessor(step) for step in chunk.unbind(1)]
        return torch.stack([self.env_processors[1]({"action": step})["action"] for step in steps], 1).cpu()

    def driver(self, critic: Critic, first: Mapping[str, Tensor]) -> Driver:
        """Return what acts, for ``compare_driven``.

        Args:
            critic: on the policy's device.
            first: an observation of one row.

        Raises:
            ValueError: the critic cannot steer the policy.
        """
        shape = self.open(first, critic).noise.shape[1:]

        def agent(arm: Arm, trace: Trace | None, compile: Mode | None, rows: int) -> Any:
            if compile is not None:
                raise ValueError(
                    f"compile: expected None for a lerobot policy, got {compile!r}; leave --compile out"
                )
            return partial(self.act, arm, critic, trace)

        return Driver(self.horizon, tuple(shape), agent, partial(self.open, critic=critic), first, ROUNDS)

    def actor(self, critic: LiveCritic, obs: Mapping[str, Tensor]) -> HostActor:
        """Return what acts while a critic learns, see :func:`qsteer.online.train_online`.

        Args:
            critic: on the policy's device.
            obs: an observation of the environment, of any number of rows.
        """

        def preprocess(raw: dict[str, Any]) -> Mapping[str, Any]:
            shown = {key: raw[key] for key in raw if key != "task"}
            boxes = {key: (v * 255).round().to(torch.uint8) if v.ndim > 2 else v for key, v in shown.items()}
            return self.batch(boxes)

        with torch.random.fork_rng(range(torch.cuda.device_count())):
            shape = tuple(open_action(self.policy, self.batch(obs)).noise.shape[1:])
        return HostActor(self.policy, critic, preprocess, self.execute, self.instruction, shape)


def place(
    config: Any, task_id: int | None, policy: Any, processors: tuple[Any, Any]
) -> tuple[Callable[[], LerobotSimulator], LerobotPolicy, dict[str, Tensor]]:
    """Return what makes the environment, the policy in it, and an observation of one row.

    Args:
        config: of the environment, see :func:`qsteer.envs.lerobot.env_config`.
        task_id: which task of a suite.
        policy: a lerobot policy.
        processors: the policy's own, before and after it.

    Raises:
        KeyError: the environment does not show what the policy sees.
    """
    from lerobot.envs import make_env_pre_post_processors

    make = partial(LerobotSimulator, config, task_id)
    probe = make()
    first = {key: torch.as_tensor(value)[None] for key, value in probe.reset(seed=0)[0].items()}
    instruction = probe.instruction
    probe.close()
    around = make_env_pre_post_processors(config, policy.config)
    whole = LerobotPolicy(policy, *processors, around, instruction)
    seen = whole.batch(first)
    if missing := [key for key in policy.config.input_features if key not in seen]:
        raise KeyError(
            f"environment: expected {sorted(policy.config.input_features)}, which the policy sees, got no "
            f"{missing} among {sorted(seen)}; take the environment that the policy was trained for"
        )
    return make, whole, first


def drive(
    config: Any, task_id: int | None, policy: Any, processors: tuple[Any, Any], critic: Critic
) -> tuple[Callable[[], LerobotSimulator], Driver]:
    """Return what makes the environment, and what acts in it, for ``compare_driven``.

    The arguments are those of :func:`place`, and a critic on the policy's device.

    Raises:
        ValueError: the critic cannot steer the policy.
        KeyError: as for :func:`place`.
    """
    make, whole, first = place(config, task_id, policy, processors)
    return make, whole.driver(critic, first)

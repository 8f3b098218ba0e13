"""Actors turn observations into actions while a critic learns: a frozen policy, steered or not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsteer.adapters import contract_of
from qsteer.compiling.kept import Mode
from qsteer.contract import Contract, agreed
from qsteer.critics.critic import Critic, CriticConfig
from qsteer.critics.encoders import to_unit_view
from qsteer.critics.live import LiveCritic
from qsteer.flow import field
from qsteer.policies import FlowPolicy
from qsteer.samplers import Euler
from qsteer.sampling import FastSampling, acting, sample
from qsteer.steering.handle import steer
from qsteer.trace import Trace
from qsteer.types import Bindable, Field, Observation, Rule, Sampler, Value


class Decision(NamedTuple):
    """Chunks for N observations.

    Attributes:
        executed: (N, H, A) in the environment's own action space.
        actions: (N, H, A) the same as the critic sees them: model space, without padding.
        observations: what the critic saw, on its device.
    """

    executed: Float[Tensor, "N H A"]
    actions: Float[Tensor, "N H A"]
    observations: Observation


@runtime_checkable
class Steered(Protocol):
    """A frozen policy whose steering can be changed while it acts.

    Attributes:
        trace: records the guided steps of the latest actions.
    """

    trace: Trace

    def steer(self, rule: Rule | None, sampler: Sampler | None) -> None:
        """Choose how to act from now on; neither rule nor sampler: the unsteered policy."""
        ...


@runtime_checkable
class Actor(Steered, Protocol):
    """A frozen policy and the critic that may steer it.

    Attributes:
        noise_shape: of one chunk's noise.
    """

    noise_shape: tuple[int, ...]

    def act(self, obs: Any, noise: Tensor) -> Decision:
        """Return a chunk for each of the environment's own observations ``obs``, on the CPU."""
        ...

    def unstacked(self) -> Sequence["Actor"]:
        """Return each seed's actor by itself, under the weights that act now."""
        ...


class StateActor:
    """Acts with :class:`~qsteer.policies.FlowPolicy` on states; actions are clipped to its bounds.

    Args:
        policies: one frozen policy for all, or one for each critic of a stack.
        critic: on the policies' device.
        compile: how actions are made fast, see :func:`qsteer.sample`; the first of a kind waits for the
            compiler.
    """

    def __init__(
        self, policies: Sequence[FlowPolicy], critic: LiveCritic | Critic, *, compile: Mode | None = None
    ) -> None:
        config = policies[0].config
        self.fast = None if compile is None else FastSampling(compile, wait=True)
        self.policies, self.critic = tuple(policies), critic
        self.noise_shape: tuple[int, ...] = (config.horizon, config.action_dim)
        self.trace = Trace(steps=False)
        self.steer(None, None)

    @property
    def contract(self) -> Contract:
        """What all policies' observations and actions are."""
        return agreed([policy.contract for policy in self.policies])

    def steer(self, rule: Rule | None, sampler: Sampler | None) -> None:
        """Choose how to act from now on."""
        self.rule, self.sampler = rule, sampler or Euler(clip="policy")

    def act(self, obs: Tensor, noise: Float[Tensor, "N H A"]) -> Decision:
        """Return a chunk for each observation."""
        obs = obs.to(noise.device)
        with acting(self.critic):
            actions = sample(
                self.field(obs),
                self.critic.bind(obs),
                noise,
                rule=self.rule,
                sampler=self.sampler,
                trace=self.trace,
                compile=self.fast,
            )
        return Decision(actions, actions, obs)

    def sample(
        self,
        critic: Bindable,
        obs: Float[Tensor, "N O"],
        noise: Float[Tensor, "N H A"],
        rule: Rule | None,
        sampler: Sampler,
    ) -> Float[Tensor, "N H A"]:
        """Return chunks under another critic."""
        return sample(self.field(obs), critic.bind(obs), noise, rule=rule, sampler=sampler)

    def sample_under(self, rule: Rule | None, sampler: Sampler) -> Callable[[Critic, Tensor, Tensor], Tensor]:
        """Return ``(critic, obs, noise) -> actions``, for learners that ask for actions."""
        return lambda critic, obs, noise: self.sample(critic, obs, noise, rule, sampler)

    def field(self, obs: Float[Tensor, "N O"]) -> Field:
        """Return the policies' field; of several, each for its group of rows."""
        if len(self.policies) == 1:
            return self.policies[0].field(obs)
        groups = obs.chunk(len(self.policies))
        with torch.no_grad():
            z = torch.cat([policy.encode(group) for policy, group in zip(self.policies, groups, strict=True)])
        return field(self._velocity, context=z)

    def _velocity(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        n = len(self.policies)
        parts = zip(self.policies, x.chunk(n), t.chunk(n), z.chunk(n), strict=True)
        return torch.cat([policy.velocity(xs, ts, zs) for policy, xs, ts, zs in parts])

    def unstacked(self) -> list["StateActor"]:
        """Return each seed's actor by itself, under the weights that act now."""
        with acting(self.critic):
            critics = cast(Critic, getattr(self.critic, "critic", self.critic)).unstacked()
        policies = self.policies * (len(critics) // len(self.policies))
        actors = [StateActor([policy], critic) for policy, critic in zip(policies, critics, strict=True)]
        for actor in actors:
            actor.steer(self.rule, self.sampler)
        return actors


class HostActor:
    """Acts with a pretrained policy of lerobot, such as pi0, pi0.5 or SmolVLA, which it steers in place.

    What the critic sees is taken from the policy's own batch, after ``preprocess``: its normalised state, its
    views at the critic's size, and its pooled prefix if the critic has features. So the finished critic
    steers the policy anywhere: ``qsteer.steer(policy, critic, rule)``. None of it leaves the device.

    Args:
        policy: on the critic's device; ``actor.handle.remove()`` gives it back.
        critic: sees the first ``critic.config.horizon`` steps of a chunk, and those are executed.
        preprocess: turns the environment's observations, with images in [0, 1] and the instruction of each
            row under ``"task"``, into the policy's batch; lerobot's pre-processor.
        postprocess: turns chunks of the policy into the environment's actions; lerobot's post-processor.
        instruction: the task in words, for the policy.
        noise_shape: of one chunk's noise; None: that of pi0, pi0.5 and SmolVLA.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`qsteer.steer`.
        ValueError: the critic is a stack.

    Cost: of an action, the policy's own (one prefix), what the rule adds, and resizing the critic's views.

    Example:
        >>> pre, post = make_pre_post_processors(policy.config, path)  # doctest: +SKIP
        >>> task = libero.make(26)  # doctest: +SKIP
        >>> actor = HostActor(policy, critic, pre, post, task.task_description)  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Any,
        critic: LiveCritic | Critic,
        preprocess: Callable[[dict[str, Any]], Mapping[str, Any]],
        postprocess: Callable[[Tensor], Tensor],
        instruction: str = "",
        noise_shape: tuple[int, ...] | None = None,
    ) -> None:
        if critic.config.stack > 1:
            raise ValueError(
                f"critic: expected one, got a stack of {critic.config.stack}; a pretrained policy trains one "
                "critic at a time"
            )
        self.preprocess, self.postprocess, self.instruction = preprocess, postprocess, instruction
        self.noise_shape = noise_shape or (policy.config.chunk_size, policy.config.max_action_dim)
        self._critic = _RememberingCritic(critic)
        self.handle = steer(policy, self._critic, critic_inputs=self._select_inputs)

    @property
    def contract(self) -> Contract:
        """What the policy gets and gives; of a chunk, the steps that the critic sees are executed."""
        return contract_of(self.handle.policy) | Contract(horizon=self._critic.config.horizon)

    @property
    def critic(self) -> LiveCritic | Critic:
        """The critic."""
        return self._critic.critic

    @property
    def seen(self) -> Observation:
        """What the critic saw of the latest observations."""
        return self._critic.seen

    @property
    def trace(self) -> Trace:
        """Records the guided steps of the latest actions."""
        return self.handle.trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        self.handle.trace = trace

    def steer(self, rule: Rule | None, sampler: Sampler | None) -> None:
        """Choose how to act from now on; neither rule nor sampler: the unsteered policy, bit for bit."""
        self.handle.swap(rule=rule, sampler=sampler)

    def act(self, obs: Mapping[str, Tensor], noise: Float[Tensor, "N H A"]) -> Decision:
        """Return a chunk for each observation.

        Args:
            obs: the environment's, images (N, 3, h, w) as uint8 or in [0, 1].
            noise: of ``noise_shape`` per observation, on the policy's device.

        Raises:
            KeyError: the policy's batch lacks what the critic sees.
        """
        raw: dict[str, Any] = {key: _to_unit(value.to(noise.device)) for key, value in obs.items()}
        batch = self.preprocess(raw | {"task": [self.instruction] * len(noise)})
        chunk = self.handle.policy.predict_action_chunk(batch, noise=noise)
        actions = chunk[:, : self._critic.config.horizon]
        return Decision(self.postprocess(actions), actions, self._critic.seen)

    def unstacked(self) -> list["HostActor"]:
        """Return this actor alone: it has one seed."""
        return [self]

    def _select_inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the part of the policy's batch that the critic sees, as a replay stores it."""
        config = self._critic.config
        state = (config.observation_key,) * (config.obs_dim > 0)
        if missing := [key for key in (*state, *config.views) if key not in batch]:
            raise KeyError(
                f"policy's batch: expected what the critic sees, got no {missing} among {sorted(batch)}; "
                "name CriticConfig.observation_key and views as the policy does"
            )
        like = torch.empty(0, device=next(self.handle.policy.parameters()).device)
        views = {key: to_unit_view(batch[key], config.view_size, like) for key in config.views}
        return {key: batch[key].to(like) for key in state} | {
            key: (255 * view).round().to(torch.uint8) for key, view in views.items()
        }


class _RememberingCritic:
    """A critic that keeps its last observation: a prefix is encoded once, to act and to learn."""

    def __init__(self, critic: LiveCritic | Critic) -> None:
        self.critic = critic
        self.seen: Observation = {}

    @property
    def config(self) -> CriticConfig:
        return self.critic.config

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.critic.parameters()

    def acting(self) -> AbstractContextManager[None]:
        return acting(self.critic)

    def bind(self, obs: Mapping[str, Tensor]) -> Value:
        self.seen = obs
        return self.critic.bind(obs)


def _to_unit(value: Tensor) -> Tensor:
    """Return bytes as numbers in [0, 1]."""
    return value.float() / 255 if value.dtype == torch.uint8 else value

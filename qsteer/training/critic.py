"""Training critics on chunk transitions: SARSA, TD, FQL, Monte Carlo, IQL, each as short as its formula."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from inspect import getclosurevars
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, ClassVar, Literal, cast, override

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_map

from qsteer.checks import check_bounds, check_choice, check_fraction
from qsteer.contract import Contract, check_contract
from qsteer.critics.critic import Critic, CriticConfig, warn_of_few_members
from qsteer.critics.networks import EnsembleMLP
from qsteer.critics.targets import (
    expectile_loss,
    iql_target,
    pessimistic,
    sarsa_target,
    td_target,
)
from qsteer.data.episodes import Chunks, Episodes, Need, Source, Transitions
from qsteer.flow import clip_actions
from qsteer.maps.flow_maps import FlowMap, MapConfig
from qsteer.training.loop import Learner, Training, fit
from qsteer.types import Bounds, Observation, Rule, Sampler

type SteeredPolicy = Callable[[Critic, Any, Tensor], Tensor]
"""``(critic, obs, noise: (B, H, A)) -> a: (B, H, A)``: what a policy does under a critic."""


@dataclass(frozen=True, kw_only=True)
class CriticTraining(Training):
    """How to train a :class:`~qsteer.critics.Critic`.

    Attributes:
        target: what to regress on.
        horizon: actions per chunk, which are also the steps of an n-step return.
        gamma: discount per step, in (0, 1].
        ema: step of the target critic's moving average, in (0, 1].
        expectile: of IQL's V, in (0, 1].
        distilled: rows per update on which FQL's student follows the steered policy.
        bounds: of the policy's actions, to which FQL's student is clipped; None: they have none.
        members: J, size of the ensemble.
        rho: pessimism, in the targets and of the finished critic.
        hidden: widths of the hidden layers.
        observation_key: where a host's batch holds the observation.
    """

    steps: int = 30_000
    target: Literal["sarsa", "td", "monte_carlo", "iql", "fql"] = "iql"
    horizon: int = 5
    gamma: float = 0.99
    ema: float = 0.02
    expectile: float = 0.9
    distilled: int = 32
    bounds: Bounds = (-1.0, 1.0)
    members: int = 4
    rho: float = 0.5
    hidden: Sequence[int] = (256, 256, 256)
    observation_key: str = "observation.state"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_choice(self, "target", LEARNERS)
        check_fraction(self, "gamma", "ema", "expectile")
        check_bounds(self.bounds)

    def contract(self, config: CriticConfig, data: Contract, policy: Contract | None = None) -> Contract:
        """Return the contract of a critic trained like this.

        Args:
            config: of the critic.
            data: of what it is trained on.
            policy: of the policy that gave the actions; None: not known.

        Raises:
            ValueError: the data are not of such a policy.
        """
        policy = policy or Contract()
        own = data | Contract(
            observations=[(config.observation_key, (config.obs_dim,))] if config.obs_dim else None,
            horizon=config.horizon,
            action_dim=config.action_dim,
            discount=self.gamma,
            target=self.target,
        )
        check_contract(own, policy)
        return replace(policy, action_low=None, action_high=None) | own

    def critic_config(self, obs_dim: int, action_dim: int) -> CriticConfig:
        """Return the shape of a critic of states."""
        return CriticConfig(
            obs_dim, action_dim, self.horizon, self.hidden, self.members, self.rho, self.observation_key
        )


class CriticLearner(Learner):
    """``E sum_j (Q_j(s, a) - y)^2``. The target critic Q' is a moving average of Q, and is what is saved.

    Args:
        critic: learns. If it is a stack of S critics, every batch has S equal groups of rows.
        source: of batches; must offer what the learner needs (``need``).
        settings: ``batch_size`` rows for each critic of a stack.
        act: for learners that need actions which are not in the data.

    Raises:
        ValueError: the source is of chunks for another need.
    """

    need: ClassVar[Need] = "next_state"

    def __init__(
        self, critic: Critic, source: Source, settings: CriticTraining, act: SteeredPolicy | None = None
    ) -> None:
        super().__init__()
        given = source.need if isinstance(source, Chunks) else self.need
        if given != self.need:
            raise ValueError(
                f"{type(self).__name__}: expected chunks for need={self.need!r}, got need={given!r}; build "
                f"Chunks(..., need={self.need!r})"
            )
        warn_of_few_members(settings.rho, critic.config.members)
        self.critic, self.target = critic, deepcopy(critic).requires_grad_(False)
        self.source, self.settings, self.stack = source, settings, critic.config.stack
        self.frozen = (act,)  # in a tuple: a module is no part of what is learnt and stored
        self._average = get_ema_multi_avg_fn(1 - settings.ema)
        self._averaged = list(self.target.parameters()), list(self.critic.parameters())

    @abstractmethod
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        """Return the regression target."""

    @override
    def sample(self, generator: torch.Generator) -> Transitions:
        return self.source.sample(self.settings.batch_size * self.stack, generator)

    @override
    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed squared error of the members, and of the critics of a stack, on ``batch``."""
        with torch.no_grad():
            y = self.y(batch, generator)
        q = self.critic.members(self.critic.encode(batch.observations, augment=generator), batch.actions)
        seen = q.detach()
        info = {"q": seen.mean(), "q_min": seen.amin(), "q_max": seen.amax()}
        info |= {"q_std": seen.std(0, correction=0).mean(), "y": y.mean()}
        return self.stack * (q - y).square().mean(1).sum(), info

    @override
    def after_step(self) -> None:
        self._average(*self._averaged, 0)  # theta' <- theta' + ema (theta - theta')

    def q_target(self, obs: Any, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the pessimistic value ``Qbar'`` of the target critic."""
        return pessimistic(self.target.members(self.target.encode(obs), a), self.settings.rho)

    @override
    def generators(self, device: torch.device) -> list[torch.Generator]:
        return [g for part in list_parts(self.frozen[0]) for g in part.generators(device)]

    def act(self, obs: Observation, like: Float[Tensor, "B H A"], generator: torch.Generator) -> Tensor:
        """Return what the policy does under the target critic."""
        noise = torch.randn(like.shape, generator=generator, device=like.device)
        return cast(SteeredPolicy, self.frozen[0])(self.target, obs, noise)


class Sarsa(CriticLearner):
    """``y = R + gamma^H Qbar'(s', a'_stored)``."""

    need = "next_actions"

    @override
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        next_actions = cast(Tensor, batch.next_actions)  # promised by ``need``
        next_q = self.q_target(batch.next_observations, next_actions)
        return sarsa_target(batch.rewards, batch.discount, batch.masks, next_q)


class TD(CriticLearner):
    """``y = R + gamma^H Qbar'(s', a')`` with ``a' = act(Q', s', noise)``."""

    @override
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        next_q = self.q_target(batch.next_observations, self.next_actions(batch, generator))
        return td_target(batch.rewards, batch.discount, batch.masks, next_q)

    def next_actions(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B H A"]:
        """Return a'."""
        return self.act(batch.next_observations, batch.actions, generator)


class FQL(TD):
    """TD with ``a' = mu(s', noise)``, where mu learns in one step what ``act`` does in many (FQL eq. 8, 9).

    ``act`` is called on ``settings.distilled`` rows per update instead of a whole batch.
    """

    def __init__(
        self, critic: Critic, source: Source, settings: CriticTraining, act: SteeredPolicy | None = None
    ) -> None:
        super().__init__(critic, source, settings, act)
        shape = critic.config
        if shape.stack > 1:
            raise ValueError(
                f"target 'fql': expected one critic, got a stack of {shape.stack}; train one seed"
            )
        self.student = FlowMap(
            MapConfig(shape.horizon, shape.action_dim, shape.context, hidden=settings.hidden, harmonics=1)
        )

    def mu(self, obs: Observation, noise: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Return the student's actions."""
        zero = noise.new_zeros(len(noise))
        z = self.student.net.encode(self.target.context(obs).detach())
        return noise + self.student.average_velocity(z, noise, zero, zero + 1, None)

    @override
    def next_actions(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B H A"]:
        noise = torch.randn(batch.actions.shape, generator=generator, device=batch.actions.device)
        return clip_actions(self.mu(batch.next_observations, noise), self.settings.bounds)

    @override
    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, info = super().batch_loss(batch, generator)
        few = self.settings.distilled
        obs = tree_map(lambda column: column[:few], batch.observations)
        noise = torch.randn(batch.actions[:few].shape, generator=generator, device=batch.actions.device)
        a = cast(SteeredPolicy, self.frozen[0])(self.target, obs, noise).detach()
        student = (self.mu(obs, noise) - a).square().mean()
        return loss + student, info | {"student": student.detach()}


class MonteCarlo(CriticLearner):
    """``y = sum_k gamma^k r_{t+k}`` over the rest of the trajectory."""

    need = "returns"

    @override
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        return cast(Tensor, batch.returns)  # promised by ``need``


class IQL(CriticLearner):
    """``y = R + gamma^H V(s')``, V fitted to ``Qbar'(s, a)`` by expectile regression."""

    def __init__(
        self, critic: Critic, source: Source, settings: CriticTraining, act: SteeredPolicy | None = None
    ) -> None:
        super().__init__(critic, source, settings, act)
        self.value = EnsembleMLP(1, critic.config.context, 0, settings.hidden, critic.config.stack)

    def v(self, obs: Observation) -> Float[Tensor, "B"]:
        """Return the state value (B,), computed on the critic's encoders, which it does not train."""
        return self.value(self.value.encode(self.critic.context(obs).detach()))[0]

    @override
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        return iql_target(batch.rewards, batch.discount, batch.masks, self.v(batch.next_observations))

    @override
    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, info = super().batch_loss(batch, generator)
        with torch.no_grad():
            q = self.q_target(batch.observations, batch.actions)
        v = self.v(batch.observations)
        value_loss = self.stack * expectile_loss(q - v, self.settings.expectile).mean()
        return loss + value_loss, info | {"v": v.detach().mean()}


LEARNERS: dict[str, type[CriticLearner]] = {
    "sarsa": Sarsa,
    "td": TD,
    "monte_carlo": MonteCarlo,
    "iql": IQL,
    "fql": FQL,
}


def fresh_critic(
    config: CriticConfig, seeds: Sequence[int], observations: Observation | None = None
) -> Critic:
    """Return an untrained critic, or a stack of them for several seeds; sets the global seed.

    Args:
        config: of one critic.
        seeds: of the initial weights.
        observations: to take the normalisation from.
    """
    critics = []
    for seed in seeds:
        torch.manual_seed(seed)
        critics.append(Critic(config))
        if observations is not None:
            critics[-1].fit_normalisation(observations)
    return critics[0] if len(critics) == 1 else Critic.stacked(critics)


def list_parts(act: Any) -> list[Rule | Sampler]:
    """Return the rules and samplers that a function refers to: they may keep generators of their own.

    Looked for among what it closes over, its defaults, the globals of its module that it names, and the
    attributes of the object that it is a method of; in functions of its module that it calls, too.
    """
    found: dict[int, Rule | Sampler] = {}
    seen: set[int] = set()
    left = [act]
    while left:
        given = left.pop()
        if id(given) in seen:
            continue
        seen.add(id(given))
        if isinstance(given, Rule | Sampler):
            found[id(given)] = given
        elif isinstance(given, partial):
            left += [given.func, *given.args, *given.keywords.values()]
        elif isinstance(given, MethodType):
            left += [given.__func__, *vars(given.__self__).values()]
        elif isinstance(given, FunctionType) and given.__module__ in (None, _module_of(act)):
            names = getclosurevars(given)
            left += [*names.nonlocals.values(), *names.globals.values(), *(given.__defaults__ or ())]
            left += (given.__kwdefaults__ or {}).values()
        elif given is act:
            left += getattr(given, "__dict__", {}).values()
    return list(found.values())[::-1]


def _module_of(act: Any) -> str | None:
    while isinstance(act, partial):
        act = act.func
    return getattr(act, "__module__", None)


ACTING = ("td", "fql")
"""Targets that need actions of the policy."""


def train_critic(
    episodes: Episodes,
    out: str | Path,
    training: CriticTraining | None = None,
    *,
    act: SteeredPolicy | None = None,
    seeds: Sequence[int] | None = None,
    contract: Contract | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Critic:
    """Train a critic; ``Critic.from_pretrained`` reads the result in ``out``.

    The returned critic is the moving average (target) critic. A run that was interrupted goes on from its
    last checkpoint; a finished run is returned as it is.

    Args:
        episodes: the data; held in memory on ``device``.
        out: run directory.
        training: how to train; defaults to ``CriticTraining()``.
        act: for ``target="td"`` and ``"fql"``, ``(critic, obs: (B, O), noise: (B, H, A)) -> a: (B, H, A)``,
            the next action under the current target critic: ``lambda q, s, x0:
            qsteer.sample(policy.field(s), q.bind(s), x0, rule=Tweedie())``. What it draws from torch's global
            generators, or from those of a rule or sampler that it refers to, resumes to the bit.
        seeds: train a stack of critics at once, one per seed of initial weights, each on batches of its own;
            None: one, of ``training.seed``.
        contract: of the policy that the critic is to steer, such as ``policy.contract`` or
            ``qsteer.adapters.contract_of(policy)``; the data are compared with it, and it becomes part of the
            critic's. None: the critic's has only what the data say.
        device: where to train.
        progress: show a progress bar.

    Raises:
        ValueError: ``act`` is missing or superfluous, or ``out`` holds a run with other settings or other
            data; or the data are not of a policy of that contract.
    """
    out, training = Path(out), training or CriticTraining()
    if (act is None) == (training.target in ACTING):
        raise ValueError(
            f"train_critic: expected act= when target is one of {ACTING} and only then, got act={act} with "
            f"target {training.target!r}; the others need no actions but the stored ones"
        )
    config = training.critic_config(episodes.observations.shape[1], episodes.actions.shape[1])
    config = replace(config, contract=training.contract(config, episodes.contract, contract))
    with torch.random.fork_rng(devices=[]):
        critic = fresh_critic(config, seeds or [training.seed], episodes.observations)
        kind = LEARNERS[training.target]
        chunks = Chunks(episodes.to(device), training.horizon, training.gamma, kind.need)
        learner = kind(critic.to(device), chunks, training, act).to(device)
    identity = (
        training.describe() | {"data": episodes.fingerprint()} | ({"seeds": list(seeds)} if seeds else {})
    )
    fit(learner, out, training, identity, progress=progress)
    learner.target.eval().save_pretrained(out)
    return learner.target

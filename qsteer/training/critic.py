"""Training critics on chunk transitions: SARSA, TD, Monte Carlo and IQL, each as short as its formula."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast, override

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qsteer.critics.critic import Critic, CriticConfig
from qsteer.critics.networks import EnsembleMLP
from qsteer.critics.targets import (
    expectile_loss,
    iql_target,
    monte_carlo_target,
    pessimistic,
    sarsa_target,
    td_target,
)
from qsteer.training.data import Chunks, Episodes, Need, Transitions
from qsteer.training.loop import Learner, Training, fit

type Act = Callable[[Critic, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CriticTraining(Training):
    """How to train a :class:`~qsteer.critics.Critic`.

    Attributes:
        target: what to regress on.
        horizon: actions per chunk, which are also the steps of an n-step return.
        gamma: discount per step.
        ema: step of the target critic's moving average.
        expectile: of IQL's V.
        members: size of the ensemble.
        rho: pessimism, in the targets and of the finished critic.
        hidden: widths of the hidden layers.
        observation_key: where a host's batch holds the observation.
    """

    steps: int = 30_000
    target: Literal["sarsa", "td", "monte_carlo", "iql"] = "iql"
    horizon: int = 5
    gamma: float = 0.99
    ema: float = 0.02
    expectile: float = 0.9
    members: int = 4
    rho: float = 0.5
    hidden: Sequence[int] = (256, 256, 256)
    observation_key: str = "observation.state"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.target not in LEARNERS:
            raise ValueError(f"target: expected one of {sorted(LEARNERS)}, got {self.target!r}")
        for name in ("gamma", "ema", "expectile"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {getattr(self, name)}")


class CriticLearner(Learner):
    """``E sum_j (Q_j(s, a) - y)^2``. The target critic Q' is a moving average of Q; it steers in the end."""

    need: ClassVar[Need] = "next_state"

    def __init__(
        self, critic: Critic, episodes: Episodes, settings: CriticTraining, act: Act | None = None
    ) -> None:
        """Learn ``critic`` from ``episodes``; ``act`` is for TD alone."""
        super().__init__()
        self.critic, self.target = critic, deepcopy(critic).requires_grad_(False)
        self.settings = settings
        self.chunks = Chunks(episodes, settings.horizon, settings.gamma, self.need)
        self._average = get_ema_multi_avg_fn(1 - settings.ema)
        self._averaged = list(self.target.parameters()), list(self.critic.parameters())

    @abstractmethod
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        """Return the regression target."""

    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the members' summed squared error on ``batch``."""
        with torch.no_grad():
            y = self.y(batch, generator)
        q = self.critic.members(self.critic.encode(batch.observations), batch.actions)
        info = {"q": q.detach().mean(), "q_std": q.detach().std(0, correction=0).mean(), "y": y.mean()}
        return (q - y).square().mean(1).sum(), info

    @override
    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.batch_loss(self.chunks.sample(self.settings.batch_size, generator), generator)

    @override
    def after_step(self) -> None:
        self._average(*self._averaged, 0)  # theta' <- theta' + ema (theta - theta')

    def q_target(self, obs: Float[Tensor, "B O"], a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the pessimistic value ``Qbar'`` of the target critic."""
        return pessimistic(self.target.members(self.target.encode(obs), a), self.settings.rho)


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

    def __init__(self, critic: Critic, episodes: Episodes, settings: CriticTraining, act: Act) -> None:
        """Learn ``critic`` from ``episodes`` and the actions of ``act``."""
        super().__init__(critic, episodes, settings)
        self.act = (act,)  # in a tuple: a module is no part of what is learnt and stored

    @override
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        noise = torch.randn(batch.actions.shape, generator=generator, device=batch.actions.device)
        (act,) = self.act
        next_q = self.q_target(batch.next_observations, act(self.target, batch.next_observations, noise))
        return td_target(batch.rewards, batch.discount, batch.masks, next_q)


class MonteCarlo(CriticLearner):
    """``y = sum_k gamma^k r_{t+k}`` over the rest of the trajectory."""

    def __init__(
        self, critic: Critic, episodes: Episodes, settings: CriticTraining, act: Act | None = None
    ) -> None:
        """Learn ``critic`` from the returns in ``episodes``."""
        super().__init__(critic, episodes, settings)
        self.returns = monte_carlo_target(episodes.rewards, episodes.terminals, episodes.ends, settings.gamma)

    @override
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        return self.returns[batch.rows]


class IQL(CriticLearner):
    """``y = R + gamma^H V(s')``, V fitted to ``Qbar'(s, a)`` by expectile regression."""

    def __init__(
        self, critic: Critic, episodes: Episodes, settings: CriticTraining, act: Act | None = None
    ) -> None:
        """Learn ``critic`` and a state value from ``episodes``."""
        super().__init__(critic, episodes, settings)
        self.value = EnsembleMLP(1, critic.config.obs_dim, 0, settings.hidden).to(episodes.actions.device)

    def v(self, obs: Float[Tensor, "B O"]) -> Float[Tensor, "B"]:
        """Return the state value."""
        return self.value(self.value.encode(self.critic.normalizer(obs)))[0]

    @override
    def y(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B"]:
        return iql_target(batch.rewards, batch.discount, batch.masks, self.v(batch.next_observations))

    @override
    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, info = super().batch_loss(batch, generator)
        with torch.no_grad():
            q = self.q_target(batch.observations, batch.actions)
        v = self.v(batch.observations)
        return loss + expectile_loss(q - v, self.settings.expectile).mean(), info | {"v": v.detach().mean()}


LEARNERS: dict[str, type[CriticLearner]] = {"sarsa": Sarsa, "td": TD, "monte_carlo": MonteCarlo, "iql": IQL}


def train_critic(
    episodes: Episodes,
    out: str | Path,
    training: CriticTraining | None = None,
    *,
    act: Act | None = None,
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
        act: for ``target="td"``, ``(critic, obs: (B, O), noise: (B, H, A)) -> a: (B, H, A)``, the next action
            under the current target critic: ``lambda q, s, x0: qsteer.sample(policy.field(s), q.bind(s), x0,
            rule=Tweedie())``.
        device: where to train.
        progress: show a progress bar.

    Raises:
        ValueError: ``act`` is missing or superfluous, or ``out`` holds a run with other settings or other
            data.
    """
    out, training = Path(out), training or CriticTraining()
    if (act is None) == (training.target == "td"):
        raise ValueError(
            f"train_critic: expected act= when target is 'td' and only then, got act={act} with target "
            f"{training.target!r}; only TD asks for actions that are not in the data"
        )
    config = CriticConfig(
        episodes.observations.shape[1],
        episodes.actions.shape[1],
        training.horizon,
        training.hidden,
        training.members,
        training.rho,
        training.observation_key,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        critic = Critic(config)
        critic.fit_normalisation(episodes.observations)
        learner = LEARNERS[training.target](critic.to(device), episodes.to(device), training, act)
    fit(learner, out, training, asdict(training) | {"data": episodes.fingerprint()}, progress=progress)
    learner.target.eval().save_pretrained(out)
    return learner.target

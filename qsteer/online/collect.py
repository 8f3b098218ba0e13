"""Environments that run while a critic learns: rows of their episodes, for a replay."""

import warnings
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.utils._pytree import tree_map

from qsteer.data.layout import Rows, find_finite
from qsteer.data.outliers import Outlier, RewardScale
from qsteer.envs.cluster import Cluster
from qsteer.envs.limits import Limits
from qsteer.envs.rollouts import MakeEnv, Simulators, to_tensors
from qsteer.online.actors import Decision
from qsteer.types import Observation

IN_A_ROW = 5
"""Failures in a row, without a success between them, after which a run stops."""


type LaneActor = Callable[[Any, Int[np.ndarray, "N"]], Decision]


class Collector(Simulators):
    """Environments in processes of their own, all of which advance by one row of their chunks at a time.

    An environment whose chunk is used up asks for another; one whose episode is over starts a new one. A row
    with a reward or an observation that is not finite is refused (``Rows.kept``), and its episode given up;
    so is the row in which an environment raises, gives what its spaces do not hold, hangs or dies, and the
    environment is replaced.

    The n-th episode of an environment has the same seed whatever befalls the others, and whether or not the
    environment was replaced.

    Args:
        make_env: makes one environment, as for :class:`~qsteer.envs.rollouts.Simulators`.
        horizon: H, actions per chunk.
        num_envs: N, environments.
        row: n, actions per row. With n = 1 every step is observed; with n = H only decisions are, and an
            environment with ``cameras`` renders nothing else.
        gamma: discount of the rewards within a row.
        closing: observe what follows an episode's last chunk (n = H), which costs one more action.
        limits: of time, and of failures of one environment in a row; None: ``Limits()``.
        cluster: of Ray, on whose nodes the environments run; None: on this machine.
        scale: refuses rows whose reward is an outlier, unless it is positive and the episode a success; None:
            none is refused for that.

    Attributes:
        finished: ``(environment, success, sum of rewards, length)`` of the episodes that ended since it was
            emptied.
        refused: rows of each environment that were refused: (N,).
        outliers: those refused for their reward, since it was emptied.

    Raises:
        ValueError: as for ``Simulators``, or rows do not divide a chunk.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        *,
        horizon: int,
        num_envs: int = 8,
        row: int = 1,
        gamma: float = 1.0,
        closing: bool = True,
        limits: Limits | None = None,
        cluster: Cluster | None = None,
        scale: RewardScale | None = None,
    ) -> None:
        if row < 1 or horizon % row:
            raise ValueError(f"row: expected a divisor of the horizon {horizon}, got {row}")
        super().__init__(
            make_env, horizon=horizon, num_envs=num_envs, gamma=gamma, limits=limits, cluster=cluster
        )
        self.finished: list[tuple[int, bool, float, int]] = []
        self.refused: np.ndarray = np.zeros(num_envs, int)
        self.outliers: list[Outlier] = []
        self._scale, self._episode = scale, np.full(num_envs, -1)
        self._barren = 0  # rounds in a row in which no row was kept
        self._horizon, self._row, self._closes = horizon, row, closing
        self._seed: int | None = None  # of all episodes
        self._begun: np.ndarray = np.zeros(num_envs, int)  # episodes of each environment
        self._next: np.ndarray = np.zeros(num_envs, int)  # first action of the next row in the pending chunk
        self._over: np.ndarray = np.ones(num_envs, bool)
        self._raw: Any = None  # the environments' observations
        self._seen: Any = None  # the same as the critic sees them, before the row
        self._executed: Any = None  # pending chunks (N, H, A) as the environment takes them,
        self._actions: Any = None  # and as the critic sees them
        self._act: Any = None

    def __enter__(self) -> "Collector":
        return self

    def send(self, act: LaneActor, generator: torch.Generator) -> None:
        """Start the next row in every environment, and return while the simulators work.

        Args:
            act: asked for chunks for the environments that need one: their observations and their numbers,
                ascending.
            generator: asked once for the seed of all episodes.

        Raises:
            ValueError: the policy gives actions that are not finite.
            RuntimeError: an environment gives no finite observation after several resets, or failed too often
                in a row.
        """
        self._act = act
        if self._over.any():
            self._reset(generator)
        self._next = np.where(self._over, 0, (self._next + self._row) % self._horizon)
        self._seen = to_tensors(self._raw)
        if (asking := np.flatnonzero(self._next == 0)).size:
            decision = act(tree_map(itemgetter(asking), self._seen), asking)
            if not decision.executed.isfinite().all():
                raise ValueError(
                    "act: expected finite actions, got NaN or infinity for finite observations of the "
                    "environment; look at the policy and at what prepares its inputs"
                )
            if self._executed is None:
                shape = self.num_envs, self._horizon
                self._executed = np.zeros((*shape, *decision.executed.shape[2:]), np.float32)
                self._actions = decision.actions.new_zeros(*shape, *decision.actions.shape[2:])
            self._executed[asking] = decision.executed.float().cpu().numpy()
            self._actions[torch.from_numpy(asking)] = decision.actions
            if self._row == self._horizon:  # all ask at once
                self._seen = decision.observations
        low, high = self._chunk.low[: self._row], self._chunk.high[: self._row]
        actions = self._executed[np.arange(self.num_envs)[:, None], self._steps()]
        self._workers.start("step", dict(enumerate(actions.clip(low, high))))

    def receive(self) -> Rows:
        """Wait for the simulators and return the row that :meth:`send` started.

        Raises:
            RuntimeError: several rounds in a row gave no row that is finite, or an environment failed too
                often in a row.
        """
        answers, _ = self._workers.finish()
        self._raw = self._workers.observations
        answered = np.isin(np.arange(self.num_envs), list(answers))
        self._workers.in_a_row[answered] = 0
        rewards, executed = np.zeros(self.num_envs), np.full(self.num_envs, self._row)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for i, (rewards[i], terminated[i], truncated[i], info) in answers.items():
            executed[i] = info["executed"]
        ended = terminated | truncated
        kept = answered & self._sift({"reward": rewards, "observation": self._raw}, answered)
        if self._scale is not None:
            infos = {i: info for i, (*_, info) in answers.items()}
            kept &= self._weigh(self._scale, rewards, infos, kept)
        following = to_tensors(self._raw)
        if self._row == self._horizon:
            kept &= self._sift({"prepared observation": self._seen}, kept)
            following = self._closing(following, ended & kept) if self._closes else None
            if following is not None:
                kept &= self._sift({"prepared observation": following}, ended & kept)
        self._over = ended | ~kept
        self.refused += ~kept
        self._barren = 0 if kept.any() else self._barren + 1
        if self._barren == IN_A_ROW:
            raise RuntimeError(
                f"environments: expected finite rewards and observations, got none in {IN_A_ROW} rounds in a "
                "row; look at the sensors and at the reward"
            )
        for i in np.flatnonzero(ended & kept).tolist():
            *_, info = answers[i]
            self.finished.append((i, info["success"], info["sum_reward"], info["length"]))
        steps = torch.from_numpy(self._steps())
        return Rows(
            observations=self._seen,
            actions=self._actions[torch.arange(self.num_envs)[:, None], steps],
            rewards=torch.from_numpy(rewards.astype(np.float32)),
            terminals=torch.from_numpy(terminated),
            truncations=torch.from_numpy(truncated & ~terminated),
            executed=torch.from_numpy(executed),
            next_observations=following,
            kept=torch.from_numpy(kept),
        )

    def abandon(self) -> None:
        """Give up all running episodes; the next row begins new ones."""
        self._over = np.ones(self.num_envs, bool)

    def step(self, act: LaneActor, generator: torch.Generator) -> Rows:
        """Return one row of every environment. Cost: one round trip to the environments."""
        self.send(act, generator)
        return self.receive()

    def _steps(self) -> Int[np.ndarray, "N n"]:
        return self._next[:, None] + np.arange(self._row)

    def _reset(self, generator: torch.Generator) -> None:
        """Start episodes where one is over, again where the first observation is not finite."""
        if self._seed is None:
            self._seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        over = self._over.copy()
        self._episode += over
        for _ in range(IN_A_ROW):
            self._workers.start(
                "reset", {i: self._next_seed(self._seed, i) for i in np.flatnonzero(over).tolist()}
            )
            answers, _ = self._workers.finish()
            self._raw = self._workers.observations
            answered = np.isin(np.arange(self.num_envs), list(answers))
            finite = self._sift({"first observation": self._raw}, answered)
            self.refused += answered & ~finite
            over &= ~(answered & finite)
            if not over.any():
                return
        raise RuntimeError(
            f"environment {over.argmax()}: expected a finite observation after a reset, got NaN or infinity "
            f"{IN_A_ROW} times in a row; look at its sensors"
        )

    def _next_seed(self, first: int, lane: int) -> int:
        """Return the seed of an environment's next episode."""
        self._begun[lane] += 1
        words = np.random.SeedSequence((first, lane, int(self._begun[lane])))
        return int(words.generate_state(1)[0] >> 1)

    def _sift(self, given: dict[str, Any], lanes: np.ndarray | None = None) -> np.ndarray:
        """Return where all is finite, and say where it is not; of other than ``lanes`` nothing is said."""
        kept = np.ones(self.num_envs, bool)
        columns = {
            (f"{name}[{key!r}]" if key else name): torch.as_tensor(column)
            for name, value in given.items()
            for key, column in (value if isinstance(value, Mapping) else {"": value}).items()
        }
        for name, column in columns.items():
            if not column.is_floating_point():
                continue
            found = find_finite(column)
            for i in np.flatnonzero(~found if lanes is None else ~found & lanes):
                warnings.warn(
                    f"environment {i}: expected a finite {name}, got NaN or infinity: the row is refused and "
                    "its episode given up (said once, counted in the metrics)",
                    RuntimeWarning,
                    skip_file_prefixes=(str(Path(__file__).parents[1]),),
                )
            kept &= found
        return kept

    def _weigh(
        self, scale: RewardScale, rewards: np.ndarray, infos: dict[int, Any], lanes: np.ndarray
    ) -> np.ndarray:
        """Return where rewards are no outliers, and note and say where they are."""
        success = np.array([i in infos and infos[i]["success"] for i in range(self.num_envs)], bool)
        praised = (rewards > 0) & success  # rare and large as it may be
        judged = np.where(lanes & ~praised, rewards, 0.0).astype(np.float32)
        found = scale.sift(torch.from_numpy(judged)).numpy()
        for i in np.flatnonzero(found):
            length, reward = int(infos[i]["length"]), float(rewards[i])
            self.outliers.append(Outlier(int(i), int(self._episode[i]), length, reward, scale.limit))
            warnings.warn(
                f"environment {i}: expected a reward of the usual size, below {scale.limit:.4g}, got "
                f"{reward:.6g} in step {length} of episode {self._episode[i]}: the row is refused and its "
                "episode given up (counted in the metrics, listed in outliers.jsonl); if the task gives such "
                "rewards, set "
                "refuse_outliers=False",
                RuntimeWarning,
                skip_file_prefixes=(str(Path(__file__).parents[1]),),
            )
        return ~found

    def _closing(self, raw: Any, over: np.ndarray) -> Observation:
        """Return what the critic would see after the row; only entries of episodes that ended are read."""
        ended = np.flatnonzero(over)
        if not ended.size:
            return self._seen
        closing, at = self._act(tree_map(itemgetter(ended), raw), ended).observations, torch.from_numpy(ended)
        return tree_map(lambda seen, last: seen.index_copy(0, at.to(seen.device), last), self._seen, closing)

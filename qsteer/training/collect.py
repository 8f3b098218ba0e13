"""Environments that run while something learns: steps of their episodes, for a replay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsteer.evaluation.rollouts import MakeEnv, Simulators


class Collector(Simulators):
    """Environments in processes of their own, all of which advance by one step of their chunks at a time.

    An environment whose chunk is used up asks for another; one whose episode is over starts a new one.

    Args:
        make_env: makes one environment, as for :class:`~qsteer.evaluation.rollouts.Simulators`.
        horizon: H, actions per chunk.
        num_envs: N, environments.

    Attributes:
        finished: ``(success, sum of rewards)`` of the episodes that ended since it was emptied.

    Raises:
        ValueError: as for ``Simulators``.
    """

    def __init__(self, make_env: MakeEnv, *, horizon: int, num_envs: int = 8) -> None:
        super().__init__(make_env, horizon=1, num_envs=num_envs)
        self.finished: list[tuple[bool, float]] = []
        self._horizon = horizon
        self._pending = np.zeros((num_envs, horizon, *self._chunk.shape[1:]), np.float32)
        self._next: np.ndarray = np.zeros(num_envs, int)  # action of the pending chunk
        self._over: np.ndarray = np.ones(num_envs, bool)
        self._observations = np.zeros(0)

    def step(self, act: Callable[[Tensor], Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Advance every environment by one action.

        Args:
            act: ``(obs: (n, O)) -> (n, H, A)``, a chunk for each of those n <= N environments that need one;
                it is clipped to the environment's bounds.
            generator: of the seeds of new episodes.

        Returns:
            ``observations``, ``actions``, ``rewards``, ``next_observations``, ``terminals`` and ``begins``
            (the first step of an episode), of one row per environment.

        Cost: one round trip to the environments.
        """
        begins = self._over
        if begins.any():
            draws = torch.randint(2**31, (self.num_envs,), generator=generator, device=generator.device)
            seeds: list[int | None] = [*draws.tolist()]
            self._observations, _ = self._envs.reset(seed=seeds, options={"reset_mask": begins.copy()})
        self._next = np.where(begins, 0, (self._next + 1) % self._horizon)
        if (asking := np.flatnonzero(self._next == 0)).size:
            chunks = act(torch.from_numpy(self._observations[asking]).float()).cpu().numpy()
            self._pending[asking] = chunks.clip(self._chunk.low, self._chunk.high)

        observations = self._observations
        actions = self._pending[np.arange(self.num_envs), self._next]
        self._observations, rewards, terminated, truncated, info = self._envs.step(actions[:, None])
        self._over = terminated | truncated
        self.finished += [
            (bool(info["success"][i]), info["sum_reward"][i]) for i in np.flatnonzero(self._over)
        ]
        columns: dict[str, Any] = {
            "observations": observations.astype(np.float32),
            "actions": actions,
            "rewards": rewards.astype(np.float32),
            "next_observations": self._observations.astype(np.float32),
            "terminals": terminated,
            "begins": begins,
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}

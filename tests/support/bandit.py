"""A toy environment for the loops that learn while they act."""

from typing import Any

import gymnasium
import numpy as np


class Bandit(gymnasium.Env):
    """A few steps, each of which costs the squared distance of the action to 0.6."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    steps = 2

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.clock, self.place = 0, self.np_random.normal()
        return np.array([self.place, 0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.clock += 1
        cost = float((action[0] - 0.6) ** 2)
        return np.array([self.place, float(self.clock)]), -cost, self.clock == self.steps, False, {}

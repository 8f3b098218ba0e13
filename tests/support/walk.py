"""A toy environment of rollouts. Without torch: simulators start sooner."""

from typing import Any

import gymnasium
import numpy as np

A = 2


class Walk(gymnasium.Env):
    """A point moved by its actions from a place drawn at reset; the episode lasts ``limit(seed)`` steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (A + 1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (A,), np.float32)

    def __init__(self, says: str | None = "success", reach: float = np.inf) -> None:
        self.says, self.reach = says, reach

    def _observe(self) -> np.ndarray:
        return np.array([*self.place, self.clock], float)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.clock = self.np_random.uniform(-1, 1, A), 0
        self.limit = int(self.np_random.integers(4, 12))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.clock < self.limit, "stepped past the end"
        self.place, self.clock = self.place + action, self.clock + 1
        lucky = bool(self.place[0] > self.place[1])  # may come and go: success is success at any step
        terminated = bool(np.abs(self.place).max() > self.reach)
        info = {self.says: lucky} if self.says else {}
        return self._observe(), float(self.place[0]), terminated, self.clock == self.limit, info

    def render(self) -> np.ndarray:
        frame = np.zeros((40, 40, 3), np.uint8)
        frame[:, : 3 * self.clock] = 200
        return frame


class Longer(Walk):
    def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
        result = super().reset(**options)
        self.limit += 1
        return result

"""Observations, actions and rewards as LIBERO's; no simulator, and no torch: it starts sooner."""

from typing import Any

import gymnasium
import numpy as np

STATE = "observation.state"
VIEWS = ("observation.images.image", "observation.images.image2")
SIZE, LIMIT, GOAL = 32, 20, 0.25


class StandIn(gymnasium.Env):
    """A gripper that is pushed by its actions; it succeeds when it has left its place far enough."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        {STATE: gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)}
        | {view: gymnasium.spaces.Box(0, 255, (3, SIZE, SIZE), np.uint8) for view in VIEWS}
    )
    task_description = "put the black bowl on top of the cabinet"
    scale, black = 1.0, False

    def cameras(self, on: bool) -> None:
        self.on = on

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.on, self.clock = True, 0
        self.place = self.np_random.uniform(-0.3, 0.3, 8)
        self.begin = self.place.copy()
        return self._observe(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.clock += 1
        self.place[:7] += 0.05 * action
        success = bool(np.abs(self.place - self.begin)[:3].max() > GOAL)
        late = self.clock >= LIMIT and not success
        return self._observe(), 0.0 if success else -1.0, success, late, {"success": success}

    def _observe(self) -> dict[str, np.ndarray]:
        bright = 0 if self.black or not self.on else int(np.clip(120 + 100 * self.place[0], 1, 255))
        views = {view: np.full((3, SIZE, SIZE), bright, np.uint8) for view in VIEWS}
        return {STATE: (self.scale * self.place).astype(np.float32), **views}


class Millimetres(StandIn):
    """Its state is in other units than the policy's statistics."""

    scale = 1000.0


class Dark(StandIn):
    """Its cameras show nothing."""

    black = True


def make(task: int, **_: Any) -> StandIn:
    """Stand in for ``qsteer.envs.libero.make``."""
    return StandIn()

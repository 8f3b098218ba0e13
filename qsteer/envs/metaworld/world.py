"""lerobot's MetaworldEnv with a light observation."""

from typing import Any

import gymnasium
import numpy as np

from qsteer.envs.metaworld.configuration import BLACK, FULL, GRIPPER
from qsteer.envs.platform import choose_graphics

try:
    choose_graphics()  # before MuJoCo is imported, which chooses then
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS, MetaworldEnv
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'expected MetaWorld, got {error}: pip install "qsteer[metaworld]", in an environment of its own'
    ) from error

KEPT = [0, 1, 2, 3, 4, 5, 6, 36, 37, 38]
"""Of MetaWorld's 39 numbers: hand, gripper, object, goal."""


class LightWorld(MetaworldEnv):
    """One task; the arguments are those of :class:`~qsteer.envs.metaworld.configuration.MetaworldLight`.

    The reward is -1 for each step until the task's own success, which ends the episode. With a camera, only
    the frames that :meth:`cameras` asks for are rendered, without shadows and reflections.

    Cost: 350 to 1400 steps a second on a CPU core without a camera.

    Attributes:
        raw: MetaWorld's own observation (39,).

    Raises:
        ValueError: MetaWorld has no such task.
    """

    def __init__(self, task: str, episode_length: int = 120, camera: int = 0) -> None:
        if task not in TASK_DESCRIPTIONS:
            raise ValueError(f"task: expected one of {sorted(TASK_DESCRIPTIONS)}, got {task!r}")
        super().__init__(task, obs_type="pixels_agent_pos")
        self._max_episode_steps, self._camera = episode_length, camera
        self._frames, self._steps = True, 0
        edge, size = (camera, GRIPPER) if camera else (BLACK, FULL)
        self._black = np.zeros((edge, edge, 3), np.uint8)
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            {
                "pixels": box(0, 255, self._black.shape, np.uint8),
                "agent_pos": box(-1000.0, 1000.0, (size,), np.float32),
            }
        )

    def cameras(self, on: bool) -> None:
        """Render the frames of the steps from now on, or leave them black."""
        self._frames = on

    def reset(self, seed: int | None = None, **kwargs: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin the episode of a seed."""
        self._steps = 0
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act; ``info["is_success"]`` is MetaWorld's."""
        steps = self._steps + 1
        seen, _, success, _, info = super().step(action)  # begins the next episode after a success
        self._steps = steps
        return seen, float(success) - 1.0, success, steps >= self._max_episode_steps, info

    def _ensure_env(self) -> None:
        """Build MetaWorld's environment, if there is none, with a renderer of the right size."""
        if self._env is not None:
            return
        super()._ensure_env()
        if self._camera:
            env: Any = self._env
            model, renderer = env.model, env.mujoco_renderer
            renderer.width = renderer.height = self._camera
            model.light_castshadow[:] = 0
            model.mat_reflectance[:] = 0

    def _format_raw_obs(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        self.raw = raw
        seen = raw[:GRIPPER] if self._camera else raw[KEPT]
        shown = self.render() if self._camera and self._frames else self._black
        return {"pixels": np.ascontiguousarray(shown), "agent_pos": seen.astype(np.float32)}

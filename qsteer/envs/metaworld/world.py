"""lerobot's MetaworldEnv with a light observation."""

from typing import Any

import gymnasium
import numpy as np

from qsteer.envs.metaworld.configuration import BLACK, FULL, GRIPPER
from qsteer.envs.platform import choose_graphics

KEPT = [0, 1, 2, 3, 4, 5, 6, 36, 37, 38]
"""Of MetaWorld's 39 numbers: hand, gripper, object, goal."""


class LightWorld(gymnasium.Env):
    """One task; the arguments are those of :class:`~qsteer.envs.metaworld.configuration.MetaworldLight`.

    The reward is -1 for each step until the task's own success, which ends the episode. With a camera, only
    the frames that :meth:`cameras` asks for are rendered, without shadows and reflections.

    Cost: 350 to 1400 steps a second on a CPU core without a camera; a frame of 64 pixels takes 20 ms.

    Attributes:
        task_description: the instruction.
        expert: MetaWorld's scripted policy.
        raw: MetaWorld's own observation (39,).

    Raises:
        ModuleNotFoundError: MetaWorld is not installed.
        RuntimeError: there is a camera, and no graphics library.
        ValueError: MetaWorld has no such task.
    """

    metadata = {"render_fps": 80, "render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium's)
    render_mode = "rgb_array"

    def __init__(self, task: str, episode_length: int = 120, camera: int = 0) -> None:
        choose_graphics(needed=camera > 0)  # before MuJoCo is imported, which chooses then
        self._world = _make_unseen(task)
        self.task, self.task_description = task, self._world.task_description
        self.expert = self._world.expert_policy
        self.action_space = self._world.action_space
        self._max_episode_steps, self._camera = episode_length, camera
        self._frames, self._steps, self._built = True, 0, False
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

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin the episode of a seed."""
        super().reset(seed=seed)
        self._build()
        self._steps = 0
        raw, info = self._world.reset(seed=seed)
        return self._observe(raw), info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act; ``info["is_success"]`` is MetaWorld's."""
        if self._world._env is None:
            raise gymnasium.error.ResetNeeded("expected a reset before the first step; call reset(seed=...)")
        self._steps += 1
        raw, *_, info = self._world._env.step(action)  # lerobot's own begins the next episode after a success
        success, late = bool(info["success"]), self._steps >= self._max_episode_steps
        return self._observe(raw), float(success) - 1.0, success, late, {"is_success": success}

    def render(self) -> np.ndarray:
        """Return the scene; its edge is the camera's, or without a camera MetaWorld's 480 pixels."""
        self._build()
        return np.ascontiguousarray(self._world.render())

    def close(self) -> None:
        """Free the simulation."""
        self._world.close()

    def _build(self) -> None:
        """Build the simulation, if there is none, with a renderer of the camera's size."""
        if self._built:
            return
        self._world._ensure_env()
        self._built = True
        if self._camera:
            model, renderer = self._world._env.model, self._world._env.mujoco_renderer
            renderer.width = renderer.height = self._camera
            model.light_castshadow[:] = 0
            model.mat_reflectance[:] = 0

    def _observe(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        self.raw = raw
        seen = raw[:GRIPPER] if self._camera else raw[KEPT]
        shown = self.render() if self._camera and self._frames else self._black
        return {"pixels": shown, "agent_pos": seen.astype(np.float32)}


def _make_unseen(task: str) -> Any:
    """Return lerobot's environment, whose observation is MetaWorld's numbers: nothing is rendered."""
    try:
        from lerobot.envs.metaworld import TASK_DESCRIPTIONS, MetaworldEnv
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'expected MetaWorld, got {error}: pip install "qsteer[metaworld]", in an environment of its own'
        ) from error
    if task not in TASK_DESCRIPTIONS:
        raise ValueError(f"task: expected one of {sorted(TASK_DESCRIPTIONS)}, got {task!r}")

    class Unseen(MetaworldEnv):
        def _format_raw_obs(self, raw: np.ndarray) -> Any:
            return raw

    return Unseen(task, obs_type="pixels_agent_pos")

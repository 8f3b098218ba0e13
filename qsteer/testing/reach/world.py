"""The reaching world: a point in a plane, in millimetres; its demonstrator, and a LeRobotDataset of it."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from qsteer.testing.reach.configuration_reach import ACTION, IMAGE, PIXELS, STATE, TASKS

GOALS = {TASKS[0]: (-200.0, 150.0), TASKS[1]: (200.0, 150.0)}
RADIUS, STRIDE, EDGE = 25.0, 45.0, 400.0
"""Of a goal; the longest step; of the plane, from its middle. All in mm."""
REPLANS, ERROR, TREMOR = 4, 150.0, 5.0
"""The demonstrator aims anew every so many steps, at so many mm from the goal, with a hand that trembles."""


class ReachEnv(gymnasium.Env):
    """Move a point to the goal of the task within ``episode_length`` steps.

    The state is its position, the action its next step, both in mm; the picture shows point and goal. The
    reward is -1 for each step until the goal is reached.

    Args:
        task: one of the instructions.
        episode_length: after so many steps the episode is truncated.
    """

    metadata = {"render_fps": 10, "render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium's)
    render_mode = "rgb_array"

    def __init__(self, task: str = TASKS[0], episode_length: int = 30) -> None:
        if task not in GOALS:
            raise ValueError(f"task: expected one of {list(GOALS)}, got {task!r}")
        self.task = self.task_description = task
        self._max_episode_steps, self.goal = episode_length, np.array(GOALS[task])
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            {
                "agent_pos": box(-EDGE, EDGE, (2,), np.float32),
                "pixels": box(0, 255, (PIXELS, PIXELS, 3), np.uint8),
            }
        )
        self.action_space = box(-STRIDE, STRIDE, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict]:
        """Put the point somewhere at the lower edge."""
        super().reset(seed=seed)
        self.position = self.np_random.uniform((-150, -350), (150, -250))
        self.steps = 0
        return self._observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """Move."""
        move = np.clip(action, -STRIDE, STRIDE)
        self.position = np.clip(self.position + move, -EDGE, EDGE)
        self.steps += 1
        reached = bool(np.linalg.norm(self.position - self.goal) < RADIUS)
        info = {"is_success": reached}
        return self._observe(), reached - 1.0, reached, self.steps >= self._max_episode_steps, info

    def render(self) -> np.ndarray:
        """Return the picture."""
        picture = np.full((PIXELS, PIXELS, 3), 230, np.uint8)
        for place, colour in ((self.goal, (200, 40, 40)), (self.position, (20, 20, 120))):
            x, y = ((place + EDGE) / (2 * EDGE) * (PIXELS - 3)).astype(int)
            picture[PIXELS - 3 - y : PIXELS - y, x : x + 3] = colour
        return picture

    def _observe(self) -> dict[str, np.ndarray]:
        return {"agent_pos": self.position.astype(np.float32), "pixels": self.render()}


def demonstrate(env: ReachEnv, seed: int) -> tuple[list[dict[str, Any]], bool]:
    """Play an episode clumsily; return its frames and whether it reached the goal."""
    draw = np.random.default_rng(seed)
    seen, _ = env.reset(seed=seed)
    frames: list[dict[str, Any]] = []
    over = reached = False
    while not over:
        if len(frames) % REPLANS == 0:
            aim = env.goal + draw.normal(0, ERROR, 2)
        way = aim - env.position
        action = way * min(1.0, STRIDE / max(np.abs(way).max(), 1e-6)) + draw.normal(0, TREMOR, 2)
        action = np.clip(action, -STRIDE, STRIDE).astype(np.float32)
        frame = {STATE: seen["agent_pos"], IMAGE: seen["pixels"], ACTION: action, "task": env.task}
        seen, _, reached, truncated, _ = env.step(action)
        frames.append(frame)
        over = reached or truncated
    return frames, reached


def record_dataset(
    root: str | Path, episodes: int = 200, seed: int = 0, *, success: bool = True, videos: bool = False
) -> Any:
    """Write clumsy demonstrations of both tasks in turns as a LeRobotDataset, and return it.

    Args:
        root: a directory that does not exist.
        episodes: how many.
        seed: of the first; the next ones count on.
        success: with a column ``next.success``; without it nothing says which episodes failed.
        videos: store videos instead of pictures.
    """
    from lerobot.datasets import LeRobotDataset

    features: dict[str, Any] = {
        STATE: {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        ACTION: {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        IMAGE: {
            "dtype": "video" if videos else "image",
            "shape": (PIXELS, PIXELS, 3),
            "names": ["height", "width", "channels"],
        },
    }
    if success:
        features["next.success"] = {"dtype": "bool", "shape": (1,), "names": None}
    dataset = LeRobotDataset.create("qsteer/reach", 10, features, root, use_videos=videos)
    for number in range(episodes):
        frames, reached = demonstrate(ReachEnv(TASKS[number % len(TASKS)]), seed + number)
        for frame in frames:
            if success:
                frame["next.success"] = np.array([reached and frame is frames[-1]])
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDataset("qsteer/reach", root=root)

"""Play in MetaWorld: its scripted experts work towards goals of their own; a LeRobotDataset of that."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qsteer.envs.metaworld.configuration import ACTION, IMAGE, STATE
from qsteer.envs.metaworld.world import LightWorld

GOALS = {
    "push-v3": ((-0.35, 0.55, 0.015), (0.35, 0.95, 0.015)),
    "pick-place-v3": ((-0.30, 0.60, 0.03), (0.30, 0.95, 0.30)),
}
"""Where an object may be brought, in metres: much wider than the task's own goals."""
HAND = ((-0.35, 0.45, 0.06), (0.35, 0.90, 0.40))
"""Where the hand wanders in a task whose goal cannot be moved."""
TASK = 0.2
"""How often the goal is the task's own, where goals can be moved."""
NOISE = (0.0, 0.1, 0.2, 0.4)
"""Standard deviations of an episode's noise on the actions, drawn anew for each episode."""
SUCCESS = "next.success"


def play(task: str, seed: int, *, camera: int = 0, length: int = 150) -> list[dict[str, Any]]:
    """Play one episode; return its frames.

    Args:
        task: MetaWorld's name.
        seed: of the episode.
        camera: see :class:`~qsteer.envs.metaworld.configuration.MetaworldLight`.
        length: of an episode that does not succeed, in steps.
    """
    draw = np.random.default_rng(seed)
    world = _make(task, camera, length)
    seen, _ = world.reset(seed=int(draw.integers(2**31)))
    noise, remaining, frames = draw.choice(NOISE), 0, []
    goal: np.ndarray | None = None
    over = False
    while not over:
        if remaining == 0:
            goal, remaining = _choose(task, world, draw), int(draw.integers(20, 50))
        aim = _act(task, world, goal) + noise * draw.normal(size=4)
        action = np.clip(aim, -1, 1).astype(np.float32)
        remaining -= _counts(task, world)
        frame = {STATE: seen["agent_pos"], IMAGE: seen["pixels"], ACTION: action}
        seen, _, success, truncated, _ = world.step(action)
        over = success or truncated
        frames.append(frame | {SUCCESS: np.array([success]), "task": world.task_description})
    return frames


@lru_cache(maxsize=8)
def _make(task: str, camera: int, length: int) -> LightWorld:
    """Return this process's world: building one takes as long as playing an episode."""
    return LightWorld(task, length, camera)


def _choose(task: str, world: LightWorld, draw: np.random.Generator) -> np.ndarray | None:
    """Return the next goal; None: the task's own."""
    if task in GOALS:
        return None if draw.random() < TASK else draw.uniform(*GOALS[task])
    return None if draw.random() < 0.5 else draw.uniform(*HAND)


def _act(task: str, world: LightWorld, goal: np.ndarray | None) -> np.ndarray:
    """Return the expert's action, or where goals cannot be moved the way of the hand there."""
    if goal is None or task in GOALS:
        seen = world.raw if goal is None else np.concatenate([world.raw[:36], goal])
        return np.asarray(world.expert.get_action(seen))
    return np.append(10 * (goal - world.raw[:3]), -1.0)


def _counts(task: str, world: LightWorld) -> bool:
    """Return whether a step counts for the goal: where the object must be held, once it is."""
    hand, thing = world.raw[:3], world.raw[4:7]
    near = np.linalg.norm(hand[:2] - thing[:2]) < 0.03 and abs(hand[2] - thing[2]) < 0.05
    return task not in GOALS or bool(near)


def record_play(
    root: str | Path,
    tasks: Sequence[str],
    episodes: int,
    *,
    camera: int = 0,
    length: int = 150,
    seed: int = 0,
    processes: int = 2,
) -> Any:
    """Write episodes of play of each task, in turns, as a LeRobotDataset, and return it.

    Of them few succeed: the data are for cloning a policy that is able but aimless, and for a critic.

    Args:
        root: a directory that does not exist.
        tasks: MetaWorld's names.
        episodes: of each task.
        camera: see :class:`~qsteer.envs.metaworld.configuration.MetaworldLight`.
        length: of an episode that does not succeed, in steps.
        seed: of the first episode; the next ones count on.
        processes: simulators at once.
    """
    from lerobot.datasets import LeRobotDataset

    world = _make(tasks[0], camera, length)
    space: Any = world.observation_space
    numbers = {STATE: space["agent_pos"].shape, ACTION: world.action_space.shape}
    features: dict[str, Any] = {
        key: {"dtype": "float32", "shape": shape, "names": None} for key, shape in numbers.items()
    }
    names = ["height", "width", "channels"]
    features[IMAGE] = {"dtype": "image", "shape": space["pixels"].shape, "names": names}
    features[SUCCESS] = {"dtype": "bool", "shape": (1,), "names": None}
    dataset = LeRobotDataset.create("qsteer/metaworld", 80, features, root, use_videos=False)
    played = _play_all(tasks, episodes, camera, length, seed, processes)
    for frames in tqdm(played, "play", episodes * len(tasks), unit="episode"):
        for frame in frames:
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDataset("qsteer/metaworld", root=root)


def _play_all(
    tasks: Sequence[str], episodes: int, camera: int, length: int, seed: int, processes: int
) -> Iterator[list[dict[str, Any]]]:
    number = episodes * len(tasks)
    turns = [tasks[i % len(tasks)] for i in range(number)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        play_one = partial(play, camera=camera, length=length)
        yield from pool.map(play_one, turns, range(seed, seed + number), chunksize=4)

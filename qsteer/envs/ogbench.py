"""OGBench (Park et al. 2025, arXiv:2410.20092): state-based tasks, their data sets, a generator for the data.

OGBench has three kinds of names. A user of this module gives the first two, the third follows:

* task ``cube-single-play-singletask-v0``: one goal with its rewards (``-singletask-task4-v0``: another goal);
* data set ``cube-single-play-v0``: the name of the official file, shared by all tasks of an environment;
* environment ``cube-single-v0``: where the data is collected.

:func:`generate` collects data with OGBench's scripted oracles, so that nothing has to be downloaded;
:func:`load` reads such a file, or an official one, and has OGBench relabel it for one task;
:func:`make` builds the environment in which that task is evaluated.
"""

import contextlib
import multiprocessing
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qsteer.checks import check_finite
from qsteer.envs.platform import seed_numpy
from qsteer.files import check_npz

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'expected gymnasium, got {error}: pip install "qsteer[ogbench]"') from error

type Columns = dict[str, np.ndarray]
type Info = Mapping[str, Any]

# How the official data sets were collected (OGBench, data_gen_scripts/commands.sh).
KINDS = {"cube": "play", "scene": "play", "puzzle": "play", "pointmaze": "navigate"}
LEARNT_EXPERTS = ("antmaze", "humanoidmaze", "antsoccer")
EPISODE_TRANSITIONS = 1000
GIANT_EPISODE_TRANSITIONS = 2000
PLAN_NOISE, PLAN_NOISE_SMOOTHING = 0.1, 0.5
POINT_NOISE = 0.5
STACKING = {
    "single": (0.0, 0.0),
    "double": (0.0, 0.25),
    "triple": (0.05, 0.35),
    "quadruple": (0.1, 0.5),
    "octuple": (0.0, 0.35),
}
DTYPES = {"terminals": np.bool_, "button_states": np.int64}

UNSOLVED = -1.0
"""The lower of the two sparse rewards."""

NO_RENDERING = ("disable", "disabled", "off", "false", "0")


def dataset_name(task: str) -> str:
    """Return the data set of a task: ``cube-single-play-singletask-task4-v0`` -> ``cube-single-play-v0``.

    Raises:
        ValueError: ``task`` is not a single-task name.
    """
    dataset, single, suffix = task.partition("-singletask-")
    if not single or "-" not in dataset:
        raise ValueError(
            f"expected a single-task name such as 'cube-single-play-singletask-v0', got {task!r}: put "
            "'-singletask' (or '-singletask-task4') between the data set's name and its version"
        )
    return f"{dataset}-{suffix.rpartition('-')[2]}"


def make(name: str, *, sparse: bool = False, render: bool = False) -> gymnasium.Env:
    """Return the environment of one task: terminates at the goal, truncates at the task's own time limit.

    Observations are float64 states, actions lie in [-1, 1], and the reward is minus the number of unmet goals
    (one per object; mazes have one). ``info["success"]``, the reward and the termination judge the state
    *before* the step, as the rewards of the data do. Unlike in OGBench itself, ``reset(seed=...)`` fixes the
    initial state of every task.

    Args:
        name: task, such as ``"cube-single-play-singletask-v0"``.
        sparse: the reward is -1 until all goals are met, then 0: the "sparse" domains of QAM and QPILOTS.
        render: ``env.render()`` returns RGB frames, 480 x 480. MuJoCo chooses its graphics library once in a
            process, when it is first imported. Where ``MUJOCO_GL`` is not set, this module sets it to
            ``disabled``, or to ``egl`` (``glfw`` off Linux) if its first call is one with ``render``.

    Raises:
        ModuleNotFoundError: OGBench is not installed.
        RuntimeError: ``render`` where ``MUJOCO_GL`` rules it out.
        ValueError: ``name`` is not a task of OGBench.
    """
    dataset_name(name)
    ogbench = _import_ogbench(render=render)
    options = {"render_mode": "rgb_array", "width": 480, "height": 480} if render else {}
    try:
        env = _SeededReset(ogbench.make_env_and_datasets(name, env_only=True, **options))
    except gymnasium.error.Error as error:
        raise ValueError(f"expected a single-task name of OGBench, got {name!r}: {error}") from error
    return gymnasium.wrappers.ClipReward(env, min_reward=UNSOLVED) if sparse else env


def load(name: str, path: str | os.PathLike[str], *, sparse: bool = False) -> tuple[Columns, Columns]:
    """Return training and validation data of one task, as OGBench itself does.

    Each is a dict of float32 arrays with one row a transition: ``observations``, ``actions``,
    ``next_observations``, ``terminals`` (1 in the last row of an episode, which here means out of time),
    ``rewards`` (as in :func:`make`, 0 where ``observations`` is solved) and ``masks`` (0 there, else 1).

    Args:
        name: task, such as ``"cube-single-play-singletask-v0"``.
        path: the data set's file, generated or official; the validation split is ``...-val.npz`` beside it.
        sparse: see :func:`make`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ModuleNotFoundError: OGBench is not installed.
        ValueError: ``name`` is not a task of OGBench, ``path`` does not end in ``.npz``, a file is broken, or
            a column holds NaN or infinity.
    """
    dataset = dataset_name(name)
    files = _name_files(path)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"expected OGBench data, got no file {str(file)!r}: collect both splits with "
                f"qsteer.envs.ogbench.generate({dataset!r}, {str(files[0])!r}), or put the official "
                f"{dataset}.npz and {dataset}-val.npz under these names"
            )
        check_npz(file, ("observations", "actions", "terminals", "qpos"))
    with contextlib.closing(make(name)) as env:
        splits = _import_ogbench().make_env_and_datasets(
            name, dataset_path=str(files[0]), compact_dataset=False, dataset_only=True, cur_env=env
        )
    for file, split in zip(files, splits, strict=True):
        for column, values in split.items():
            check_finite(f"{file}: {column}", torch.from_numpy(values), "leave its trajectory out")
    if sparse:
        for split in splits:
            split["rewards"] = split["rewards"].clip(min=UNSOLVED)
    return splits


def generate(
    name: str,
    path: str | os.PathLike[str],
    *,
    transitions: int = 1_000_000,
    val_transitions: int = 100_000,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Collect a data set with OGBench's scripted oracles, and write it in OGBench's format.

    The procedure is that of the official data sets. Manipulation (``cube-*-play``, ``scene-play``,
    ``puzzle-*-play``): noisy plans, each of which takes an object to a random target. Point mazes
    (``pointmaze-*-navigate``): noisy steps along the shortest path to one random cell after another.

    Each episode is seeded by ``(seed, split, episode)`` alone: the arrays do not depend on ``workers``. Those
    are spawned processes: unless ``workers=1``, a script calls this under ``if __name__ == "__main__":``.

    Args:
        name: data set, such as ``"cube-single-play-v0"``.
        path: ends in ``.npz``; the validation split goes to ``...-val.npz`` beside it. Files which exist are
            replaced once the new ones are complete.
        transitions: in the training split. An episode has 1000 (2000 in giant mazes), the last one the rest.
            In the file it has one more row, for its last state.
        val_transitions: in the validation split.
        seed: of the whole data set, non-negative.
        workers: processes; ``None`` means one a core.
        progress: show a progress bar, counted in transitions.

    Raises:
        ModuleNotFoundError: OGBench is not installed.
        ValueError: OGBench has no scripted oracle for ``name``, or another argument is out of range.

    Cost: 100 to 350 transitions a second and core in manipulation, 1500 to 3500 in point mazes.
    """
    environment = _find_environment(name)
    files = _name_files(path)
    for argument, value, least in (
        ("transitions", transitions, 1),
        ("val_transitions", val_transitions, 1),
        ("seed", seed, 0),
        ("workers", 1 if workers is None else workers, 1),
    ):
        if value < least:
            raise ValueError(f"expected {argument} >= {least}, got {value}")
    _import_ogbench()
    files[0].parent.mkdir(parents=True, exist_ok=True)

    sizes = (transitions, val_transitions)
    episodes = [
        _Episode(environment, seed, split, index, length)
        for split, size in enumerate(sizes)
        for index, length in enumerate(_split_into_episodes(environment, size))
    ]
    splits: tuple[list[Columns], list[Columns]] = ([], [])
    with (
        tqdm(total=sum(sizes), desc=name, disable=not progress) as bar,
        _open_collector(min(workers or os.cpu_count() or 1, len(episodes))) as collect,
    ):
        for episode, columns in zip(episodes, collect(episodes), strict=True):
            splits[episode.split].append(columns)
            bar.update(episode.length)
    for file, parts in zip(files, splits, strict=True):
        _write(file, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


@dataclass(frozen=True)
class _Episode:
    """All that determines a collected episode."""

    environment: str
    seed: int
    split: int
    index: int
    length: int

    def collect(self) -> Columns:
        """Try until an episode is accepted; rows are its states, ``length + 1`` of them."""
        behaviour = _make_behaviour(self.environment)
        attempts = np.random.SeedSequence((self.seed, self.split, self.index))
        while True:
            columns = _roll_out(behaviour, self.length + 1, attempts.spawn(1)[0])
            if behaviour.accepts(columns):
                return columns


class _Behaviour(ABC):
    """What collects data: an environment and a scripted oracle in it."""

    env: Any

    @abstractmethod
    def begin(self, seed: int, rng: np.random.Generator) -> tuple[np.ndarray, Info]:
        """Reset to a random state with a random target."""

    @abstractmethod
    def act(self, ob: np.ndarray, info: Info) -> np.ndarray:
        """Return the next action, before it is clipped."""

    @abstractmethod
    def advance(self, info: Info) -> None:
        """Choose a new target if the step just taken has finished with the old one."""

    @abstractmethod
    def accepts(self, columns: Columns) -> bool:
        """Return whether a finished episode may enter the data set."""


class _Play(_Behaviour):
    """Carries out one plan after another, each on one object."""

    def __init__(self, environment: str) -> None:
        from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
        from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
        from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

        self._family, size, *_ = environment.split("-")
        self._stacking = STACKING.get(size, (0.5, 0.5))
        self.env = _make_endless(environment, mode="data_collection")
        plan = {"env": self.env, "noise": PLAN_NOISE, "noise_smoothing": PLAN_NOISE_SMOOTHING}
        self._oracles = {
            "cube": CubePlanOracle(**plan),
            "button": ButtonPlanOracle(gripper_always_closed=self._family == "puzzle", **plan),
            "drawer": DrawerPlanOracle(**plan),
            "window": WindowPlanOracle(**plan),
        }

    def begin(self, seed: int, rng: np.random.Generator) -> tuple[np.ndarray, Info]:
        self._p_stack = rng.uniform(*self._stacking)
        ob, info = self.env.reset(seed=seed)
        self._pursue(ob, info)
        return ob, info

    def act(self, ob: np.ndarray, info: Info) -> np.ndarray:
        return self._oracle.select_action(ob, info)

    def advance(self, info: Info) -> None:
        if self._oracle.done:
            self._pursue(*self.env.set_new_target(p_stack=self._p_stack))

    def accepts(self, columns: Columns) -> bool:
        if self._family != "scene":
            return True
        y, z = columns["qpos"][:, 15:17].T  # The cube: it has to stay in view, or in the drawer.
        return not np.any((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08))))

    def _pursue(self, ob: np.ndarray, info: Info) -> None:
        self._oracle = self._oracles[info["privileged/target_task"]]
        self._oracle.reset(ob, info)


class _Navigate(_Behaviour):
    """Walks the shortest path to one cell after another, with noise on every step."""

    def __init__(self, environment: str) -> None:
        self.env = _make_endless(environment)
        free = self.env.maze_map == 0
        up, down, left, right = (np.roll(free, shift, axis) for axis in (0, 1) for shift in (1, -1))
        corridor = (up & down & ~left & ~right) | (left & right & ~up & ~down)
        self._starts, self._goals = np.argwhere(free), np.argwhere(free & ~corridor)

    def begin(self, seed: int, rng: np.random.Generator) -> tuple[np.ndarray, Info]:
        self._rng = rng
        task = {"init_ij": rng.choice(self._starts), "goal_ij": rng.choice(self._goals)}
        return self.env.reset(seed=seed, options={"task_info": task})

    def act(self, ob: np.ndarray, info: Info) -> np.ndarray:
        xy = self.env.get_xy()
        subgoal, _ = self.env.get_oracle_subgoal(xy, self.env.cur_goal_xy)
        step = subgoal - xy
        return step / (np.linalg.norm(step) + 1e-6) + self._rng.normal(0.0, POINT_NOISE, step.shape)

    def advance(self, info: Info) -> None:
        if info["success"]:
            centre = self.env.ij_to_xy(self._rng.choice(self._goals))
            self.env.set_goal(goal_xy=self.env.add_noise(centre))

    def accepts(self, columns: Columns) -> bool:
        return True


def _make_endless(environment: str, **options: Any) -> Any:
    """Return OGBench's own class, without gymnasium's wrappers: neither goal nor time ends an episode."""
    return gymnasium.make(environment, terminate_at_goal=False, disable_env_checker=True, **options).unwrapped


class _SeededReset(gymnasium.Wrapper):
    """``reset(seed=...)`` also seeds numpy's global generator, which places the agent in OGBench's mazes."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        with contextlib.nullcontext() if seed is None else seed_numpy(seed):
            return super().reset(seed=seed, options=options)


@lru_cache(maxsize=1)
def _make_behaviour(environment: str) -> _Behaviour:
    _import_ogbench()
    family = environment.partition("-")[0]
    return _Navigate(environment) if KINDS[family] == "navigate" else _Play(environment)


def _roll_out(behaviour: _Behaviour, rows: int, sequence: np.random.SeedSequence) -> Columns:
    """Return an episode in OGBench's format: each row is a state and the action taken there."""
    columns: dict[str, list[Any]] = defaultdict(list)
    seed = int(sequence.generate_state(1)[0])
    with seed_numpy(seed):
        ob, info = behaviour.begin(seed, np.random.default_rng(sequence))
        for row in range(rows):
            action = np.clip(behaviour.act(ob, info), -1.0, 1.0).astype(np.float32)
            next_ob, _, _, _, info = behaviour.env.step(action)
            behaviour.advance(info)
            columns["observations"].append(ob)
            columns["actions"].append(action)
            columns["terminals"].append(row == rows - 1)
            for key in ("qpos", "qvel", "button_states"):
                if f"prev_{key}" in info:
                    columns[key].append(info[f"prev_{key}"])
            ob = next_ob
    return {key: np.asarray(values, DTYPES.get(key, np.float32)) for key, values in columns.items()}


@contextlib.contextmanager
def _open_collector(workers: int) -> Iterator[Callable[[Iterable[_Episode]], Iterator[Columns]]]:
    """Give a function that collects episodes in order: in this process, or in spawned ones."""
    if workers == 1:
        yield lambda episodes: map(_Episode.collect, episodes)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield lambda episodes: pool.map(_Episode.collect, episodes)


def _split_into_episodes(environment: str, size: int) -> list[int]:
    """Return episode lengths, in transitions, that add up to ``size``."""
    full = GIANT_EPISODE_TRANSITIONS if "-giant-" in environment else EPISODE_TRANSITIONS
    count, rest = divmod(size, full)
    return [full] * count + [rest] * (rest > 0)


def _find_environment(dataset: str) -> str:
    """Turn ``cube-single-play-v0`` into ``cube-single-v0``, if a scripted oracle can collect the data."""
    family, *rest = dataset.split("-")
    if family in LEARNT_EXPERTS:
        raise ValueError(
            f"expected a data set with a scripted oracle, got {dataset!r}, which takes a learnt expert: get "
            f"the official {dataset}.npz and {dataset}-val.npz, and give their path to load()"
        )
    if rest[-2:-1] != [KINDS.get(family)]:
        raise ValueError(
            f"expected a data set with a scripted oracle, got {dataset!r}: use one named 'cube-*-play-v0', "
            "'scene-play-v0', 'puzzle-*-play-v0' or 'pointmaze-*-navigate-v0'"
        )
    return "-".join((family, *rest[:-2], rest[-1]))


def _name_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the files of the training and the validation split, named as OGBench's loader does."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"expected a path that ends in '.npz', got {str(path)!r}")
    return path, Path(str(path).replace(".npz", "-val.npz"))


def _write(path: Path, columns: Columns) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **columns)  # type: ignore[arg-type]  # mypy takes a column for an option
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _import_ogbench(*, render: bool = False) -> ModuleType:
    """Import OGBench, which registers its environments; see :func:`make` for the graphics library."""
    graphics = "egl" if sys.platform == "linux" else "glfw"
    chosen = os.environ.setdefault("MUJOCO_GL", graphics if render else "disabled")
    if render and chosen.lower() in NO_RENDERING:
        raise RuntimeError(
            f"expected a graphics library for render=True, got MUJOCO_GL={chosen!r} (preset by an earlier "
            f"call without render, unless you set it): start the process with MUJOCO_GL={graphics}"
        )
    try:
        import ogbench
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'expected ogbench, got {error}: pip install "qsteer[ogbench]"') from error
    # OGBench makes its action space anew at each access, of float64 bounds, and gymnasium warns each time.
    warnings.filterwarnings("ignore", "(?s).*precision lowered by casting", module="gymnasium")
    return ogbench

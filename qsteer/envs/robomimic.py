"""RoboMimic (Mandlekar et al. 2021, arXiv:2108.03298): two tasks of robosuite, and demonstrations of them.

:func:`make` builds the environment of ``can`` or ``square``; :func:`load` reads the official ``low_dim``
files, such as ``can/mh/low_dim_v15.hdf5`` (multi-human, the data of FMQ and QC).

An observation is ``[robot0_eef_pos (3), robot0_eef_quat (4), robot0_gripper_qpos (2), object (14)]``. What
``object`` holds changes with robosuite: 1.4 says where the object is, then where it is from the gripper; 1.5
has it the other way round. So data and environment must be of the same version: ``v141`` files go with
robosuite 1.4, ``v15`` files with 1.5.

Rewards are those of QC (Li et al. 2025, arXiv:2507.07969), which FMQ follows: -1 per step, 0 at success. The
files have 0 and 1.
"""

import contextlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat

import numpy as np
import torch

from qsteer.checks import check_finite
from qsteer.data.episodes import Episodes
from qsteer.envs.platform import choose_graphics, seed_numpy

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'expected gymnasium, got {error}: pip install "qsteer[robomimic]"') from error

KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
"""What an observation is made of, as the files name it."""
OBSERVATION, ACTION = 23, 7
FRAME = 480


@dataclass(frozen=True)
class Task:
    """A task as robosuite names it.

    Attributes:
        environment: robosuite's name.
        limit: most steps of an episode, as in QC.
    """

    environment: str
    limit: int


TASKS = {"can": Task("PickPlaceCan", 300), "square": Task("NutAssemblySquare", 400)}


def make(name: str, *, render: bool = False) -> gymnasium.Env:
    """Return the environment of one task: terminates at success, truncates at the task's time limit.

    A Panda arm acts at 20 Hz: displacement of the gripper (3), its rotation (3) and its fingers (1, -1 is
    open), all in [-1, 1]. Observations are float64 states; the module says of what. The reward is -1 per step
    and 0 at success, which ``info["success"]`` says. An episode depends on its seed alone.

    Args:
        name: ``"can"`` or ``"square"``.
        render: ``env.render()`` returns RGB frames, 480 x 480.

    Raises:
        ModuleNotFoundError: robosuite is not installed.
        RuntimeError: there is no graphics library, which robosuite may load even if it does not render.
        ValueError: there is no such task.

    Cost: some 60 to 100 steps a second on one CPU core, 0.3 s a reset.
    """
    if name not in TASKS:
        raise ValueError(f"name: expected one of {', '.join(TASKS)}, got {name!r}")
    return gymnasium.wrappers.TimeLimit(RobosuiteEnv(TASKS[name].environment, render), TASKS[name].limit)


def load(path: str | os.PathLike[str]) -> Episodes:
    """Read all demonstrations of an official ``low_dim`` file, in their order.

    Terminals are the steps that end in success, with reward 0; all other rewards are -1. Some demonstrations
    go on after that, so a terminal need not be the last row. In a file without ``next_obs`` a row is followed
    by the next one, and the last row of a demonstration by itself.

    Args:
        path: for example ``can/mh/low_dim_v15.hdf5``.

    Warns:
        UserWarning: the file is of another version than the robosuite that is installed.

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: a demonstration lacks a column.
        ModuleNotFoundError: h5py is not installed.
        ValueError: the actions do not lie in [-1, 1] (files with absolute actions), rewards are neither 0
            nor 1 (files with dense ones), a column holds NaN or infinity or is not as long as the others,
            there is no demonstration, or the file is broken.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'expected h5py, got {error}: pip install "qsteer[robomimic]"') from error
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected RoboMimic data, got no file {str(path)!r}: robomimic.github.io says where the "
            "official low_dim files are"
        )
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "next_observations", "actions", "rewards", "terminals", "ends")
    }
    with _reading(path), h5py.File(path, "r") as file:
        if not (data := file.get("data")):
            raise ValueError(
                f"{path}: expected demonstrations in a group 'data', got {sorted(file)}, and none; use a "
                "low_dim file of RoboMimic"
            )
        _check_version(path, data.attrs.get("env_args"))
        for name in sorted(data, key=partial(_number, path)):
            demo = data[name]
            needed = ["actions", "rewards", *(f"obs/{key}" for key in KEYS)]
            if missing := [column for column in needed if column not in demo]:
                raise KeyError(
                    f"{path}, {name}: expected {needed}, got no {missing}; use a low_dim file, not a raw one"
                )
            states, rewards = _read_states(demo["obs"]), demo["rewards"][:]
            rewards = rewards[:, 0] if rewards.shape[1:] == (1,) else rewards
            following = (
                _read_states(demo["next_obs"])
                if "next_obs" in demo
                else np.concatenate([states[1:], states[-1:]])
            )
            read = {"observations": states, "next_observations": following, "actions": demo["actions"][:]}
            _check_demo(f"{path}, {name}", read | {"rewards": rewards})
            for column, values in read.items():
                columns[column].append(values)
            columns["rewards"].append(rewards - 1.0)
            columns["terminals"].append(rewards > 0)
            columns["ends"].append(np.arange(len(states)) == len(states) - 1)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    if np.abs(arrays["actions"]).max() > 1:
        raise ValueError(
            f"{path}: expected actions in [-1, 1], got some up to {np.abs(arrays['actions']).max():.3g}; use "
            "a file whose actions are relative"
        )
    if not np.isin(arrays["rewards"], (-1, 0)).all():
        raise ValueError(f"{path}: expected rewards 0 and 1, got others; use a file with sparse rewards")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Episodes(**{k: v if v.dtype == torch.bool else v.float() for k, v in tensors.items()})


class RobosuiteEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A task of robosuite with a Panda arm, without time limit; see :func:`make`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (gymnasium's)

    def __init__(self, environment: str, render: bool = False) -> None:
        robosuite = _import_robosuite()
        self.render_mode = "rgb_array" if render else None
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATION,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
        self._simulation = robosuite.make(
            environment,
            robots="Panda",
            controller_configs=_load_controller(robosuite),
            has_renderer=False,
            has_offscreen_renderer=render,
            use_camera_obs=False,
            reward_shaping=False,
            control_freq=20,
            ignore_done=True,  # the end of an episode is decided here
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; without a seed, one drawn from the generator of the last seed."""
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**31))
        if hasattr(self._simulation, "rng"):  # since 1.5; shared by its parts, so it is set in place
            self._simulation.rng.bit_generator.state = np.random.default_rng(episode).bit_generator.state
        with seed_numpy(episode):  # until then
            self._simulation.reset()
        # What reset() returns is in part of the episode before.
        return self._state(self._simulation._get_observations(force_update=True)), {"success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Execute one action (7,), 1/20 s."""
        raw, reward, _, _ = self._simulation.step(np.asarray(action, np.float64))
        success = bool(reward > 0)
        return self._state(raw), float(success) - 1.0, success, False, {"success": success}

    def render(self) -> np.ndarray:
        """Return the scene, (480, 480, 3).

        Raises:
            RuntimeError: the environment was made without ``render``.
        """
        if self.render_mode is None:
            raise RuntimeError(
                "expected an environment that renders, got one without: make(..., render=True)"
            )
        return self._simulation.sim.render(width=FRAME, height=FRAME, camera_name="agentview")[::-1]

    def close(self) -> None:
        """Free the simulation."""
        self._simulation.close()

    def _state(self, raw: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([raw["object-state" if key == "object" else key] for key in KEYS], dtype=float)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what h5py says of a broken file into an error that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: expected an HDF5 file, got {Path(path).stat().st_size} bytes that are none, or not all "
            f"of one ({error}); fetch it again"
        ) from error


def _number(path: str | os.PathLike[str], name: str) -> int:
    """Return the number at the end of a demonstration's name: ``demo_1``, or ``demo1``."""
    if (found := re.search(r"\d+$", name)) is None:
        raise ValueError(
            f"{path}: expected demonstrations named demo_0, demo_1, ..., got {name!r}; rename it"
        )
    return int(found[0])


def _check_demo(where: str, columns: dict[str, np.ndarray]) -> None:
    """Check that a demonstration's columns have one finite row a step."""
    shapes = {name: values.shape for name, values in columns.items()}
    lengths = {shape[:1] for shape in shapes.values()}
    vectors = all(len(shape) == (1 if name == "rewards" else 2) for name, shape in shapes.items())
    if len(lengths) != 1 or lengths == {(0,)} or not vectors:
        raise ValueError(
            f"{where}: expected one row per step in every column, got shapes {shapes}; repair it"
        )
    for name, values in columns.items():
        check_finite(f"{where}, {name}", torch.from_numpy(values), "leave the demonstration out")


def _read_states(group: Any) -> np.ndarray:
    return np.concatenate([group[key][:] for key in KEYS], axis=1)


def _load_controller(robosuite: ModuleType) -> dict[str, Any]:
    """Return the demonstrations' controller: OSC_POSE, relative to the gripper, along the world's axes."""
    if hasattr(robosuite.controllers, "load_controller_config"):  # up to 1.4
        return robosuite.controllers.load_controller_config(default_controller="OSC_POSE")
    config = robosuite.controllers.load_composite_controller_config(controller="BASIC")
    return config | {"body_parts": {"right": config["body_parts"]["right"] | {"input_ref_frame": "world"}}}


def _check_version(path: str | os.PathLike[str], env_args: str | None) -> None:
    try:
        installed = version("robosuite")
    except PackageNotFoundError:
        return
    collected = json.loads(env_args).get("env_version") if env_args else None
    if collected is not None and collected.split(".")[:2] != installed.split(".")[:2]:
        warnings.warn(
            f"{path}: expected data of robosuite {installed}, got {collected}: observations are ordered "
            f"otherwise there; pip install robosuite=={collected} to evaluate on the task of the data",
            skip_file_prefixes=(os.path.dirname(__file__),),
        )


def _import_robosuite() -> ModuleType:
    if "robosuite" not in sys.modules:
        choose_graphics()
        # It warns that an optional file of settings is missing.
        logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno > logging.WARNING)
    try:
        import robosuite
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'expected robosuite, got {error}: pip install "qsteer[robomimic]"'
        ) from error
    return robosuite

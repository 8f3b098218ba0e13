"""LIBERO (Liu et al. 2023, arXiv:2306.03310): language tasks of a Panda arm, seen by two cameras.

:func:`make` builds the environment of one task, without LIBERO's prompts; :data:`TASKS` are the six tasks of
QPILOTS. What a policy is given has the names and the conventions of lerobot and openpi:

* ``observation.state`` (8,): position of the gripper, its orientation as axis times angle, its two fingers;
* ``observation.images.image`` (3, h, w): the scene, turned by half a turn as in the data sets;
* ``observation.images.image2`` (3, h, w): the same from the wrist.
"""

import contextlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat

import numpy as np

from qsteer.envs.platform import choose_graphics, seed_numpy

try:
    import gymnasium
    from gymnasium.spaces import Box, Dict
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'expected gymnasium, got {error}: pip install "qsteer[libero]"') from error

STATE = "observation.state"
VIEWS = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}
"""Name of each view in an observation, and of its camera in the simulation."""

STEPS = {
    "libero_spatial": 280,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Time limit of each suite's tasks, as in lerobot: somewhat more than the longest demonstration."""

SETTLING = 10
"""Steps at the start of an episode in which objects fall into place and the open gripper waits."""
STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
ASSETS = "QSTEER_LIBERO_ASSETS"
"""Environment variable that names the folder of LIBERO's assets."""

FETCH_ASSETS = (
    "fetch them once with 'hf download lerobot/libero-assets --repo-type dataset --local-dir FOLDER', then "
    f"pass assets=FOLDER or set {ASSETS}=FOLDER"
)


@dataclass(frozen=True)
class Task:
    """A task as LIBERO names it, and what a policy is told."""

    name: str
    instruction: str


TASKS = {
    26: Task(
        "KITCHEN_SCENE4_put_the_wine_bottle_in_the_bottom_drawer_of_the_cabinet",
        "put the wine bottle in the bottom drawer of the cabinet",
    ),
    31: Task(
        "KITCHEN_SCENE5_put_the_black_bowl_on_top_of_the_cabinet",
        "put the black bowl on top of the cabinet",
    ),
    38: Task(
        "KITCHEN_SCENE8_put_the_right_moka_pot_on_the_stove",
        "put the right moka pot on the stove",
    ),
    59: Task(
        "LIVING_ROOM_SCENE3_pick_up_the_tomato_sauce_and_put_it_in_the_tray",
        "pick up the tomato sauce and put it in the tray",
    ),
    60: Task(
        "LIVING_ROOM_SCENE4_pick_up_the_black_bowl_on_the_left_and_put_it_in_the_tray",
        "pick up the black bowl on the left and put it in the tray",
    ),
    64: Task(
        "LIVING_ROOM_SCENE4_stack_the_right_bowl_on_the_left_bowl_and_place_them_in_the_tray",
        "stack the right bowl on the left bowl and place them in the tray",
    ),
}
"""The six tasks of LIBERO-90 on which QPILOTS steers pi0.5, by number."""


def make(
    task: int,
    *,
    suite: str = "libero_90",
    size: int = 256,
    assets: str | os.PathLike[str] | None = None,
    max_steps: int | None = None,
) -> "LiberoEnv":
    """Return the environment of one task: terminates at success, truncates at the suite's time limit.

    The reward is -1 per step and 0 at success, which ``info["success"]`` says. Actions are the displacement
    of the gripper (3), its rotation (3) and the opening of its fingers (1, -1 is open), all in [-1, 1].

    Everything is set up without prompts: LIBERO's configuration, unless there is one, goes to the user's
    cache, and its assets are looked for in ``assets``, in the folder that ``QSTEER_LIBERO_ASSETS``
    names, and where LIBERO itself does: in its package, then on the Hugging Face hub.

    Args:
        task: number within the suite.
        suite: ``libero_90``, ``libero_10``, ``libero_goal``, ``libero_object`` or ``libero_spatial``.
        size: height and width of the views, in pixels.
        assets: folder of LIBERO's assets.
        max_steps: time limit; None: the suite's.

    Raises:
        FileNotFoundError: there are no assets.
        ModuleNotFoundError: LIBERO is not installed.
        RuntimeError: MuJoCo has no graphics library.
        ValueError: there is no such task, or a number is out of range.

    Cost: some seconds of imports here. The first reset builds the scene, 5 to 12 s; the others take 0.3 s. On
    one CPU core 55 steps a second without frames, 8 with, and 30 with those of each tenth step.
    """
    if suite not in STEPS:
        raise ValueError(f"suite: expected one of {sorted(STEPS)}, got {suite!r}")
    for name, value in (("size", size), ("max_steps", STEPS[suite] if max_steps is None else max_steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    package = _import_libero()
    _find_assets(package, assets)
    return LiberoEnv(task, suite, size, STEPS[suite] if max_steps is None else max_steps)


class LiberoEnv(gymnasium.Env[Any, np.ndarray]):
    """One task; see :func:`make`.

    ``reset(seed=s)`` starts in LIBERO's stored initial state ``s`` (modulo their number, 50), with the
    furniture where ``s`` puts it: that is no part of the stored states, LIBERO draws its place within some
    centimetres (and in few episodes into an object, which is thrown off). An episode depends on its seed
    alone.

    Attributes:
        task: its name.
        task_description: the instruction.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (gymnasium's)
    render_mode = "rgb_array"

    def __init__(self, task: int, suite: str, size: int, max_steps: int) -> None:
        from libero.libero import benchmark

        with contextlib.redirect_stdout(None):  # it says in which order it has its tasks: by number
            self._suite = benchmark.get_benchmark(suite)()
        if not 0 <= task < self._suite.n_tasks:
            raise ValueError(f"task: expected one of {suite}'s 0 .. {self._suite.n_tasks - 1}, got {task}")
        self.task: str = self._suite.get_task(task).name
        self.task_description: str = self._suite.get_task(task).language
        self._number, self._size, self._max_steps = task, size, max_steps
        self._init_states = self._suite.get_task_init_states(task)
        self._control: Any = None  # LIBERO's environment, built by the first reset: in the worker, not before
        self._frames = True
        self._steps = 0
        view = Box(0, 255, (3, size, size), np.uint8)
        self.observation_space = Dict(
            {STATE: Box(-np.inf, np.inf, (8,), np.float32)} | dict.fromkeys(VIEWS, view)
        )
        self.action_space = Box(-1.0, 1.0, (7,), np.float32)

    def cameras(self, on: bool) -> None:
        """Render the frames of the steps from now on, or leave them black.

        The first frames of an episode are always rendered, and the last ones if it is truncated.
        """
        self._frames = on

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; without a seed, one drawn from the generator of the last seed."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        from robosuite.utils.errors import RandomizationError

        with seed_numpy(0):
            self._control = self._control or self._build()
        with seed_numpy(seed):
            for robot in self._control.robots:  # a soft reset forgets the gripper's last command
                robot.gripper.current_action = np.zeros(robot.gripper.dof)
            placed = False
            while not placed:
                with contextlib.suppress(RandomizationError):  # furniture in collision: draw again
                    self._control.env.reset()
                    placed = True
        raw = self._control.set_init_state(self._init_states[seed % len(self._init_states)])
        for _ in range(SETTLING):
            raw, *_ = self._control.step(np.array(STILL))
        self._steps = 0
        return self._observe(raw, frames=True), {"success": False}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], SupportsFloat, bool, bool, dict[str, Any]]:
        """Execute one action (7,), 1/20 s."""
        if self._control is None:
            raise gymnasium.error.ResetNeeded("expected a reset before the first step; call reset(seed=...)")
        raw, _, success, _ = self._control.step(np.asarray(action, np.float64))
        self._steps += 1
        success = bool(success)
        truncated = self._steps >= self._max_steps and not success
        observation = self._observe(raw, frames=self._frames or truncated)
        return observation, 0.0 if success else -1.0, success, truncated, {"success": success}

    def render(self) -> np.ndarray:
        """Return the scene, (size, size, 3), as the policy sees it."""
        return self._frame("agentview").transpose(1, 2, 0)

    def close(self) -> None:
        """Free the simulation; the next reset builds another."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def _build(self) -> Any:
        """Build LIBERO's environment. Its cameras are not used: they would render every step."""
        from libero.libero.envs.env_wrapper import ControlEnv

        try:
            return ControlEnv(
                self._suite.get_task_bddl_file_path(self._number),
                use_camera_obs=False,
                has_offscreen_renderer=True,
                ignore_done=True,  # the end of an episode is decided here
                hard_reset=False,  # a hard one takes seconds, and draws furniture by how many went before
            )
        except ImportError as error:
            raise RuntimeError(
                f"expected a graphics library that works, got MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} and "
                f"{error}; "
                "install its driver (apt-get install libgl1-mesa-dri), or start the process with "
                "MUJOCO_GL=osmesa (apt-get install libosmesa6)"
            ) from error

    def _observe(self, raw: dict[str, np.ndarray], *, frames: bool) -> dict[str, np.ndarray]:
        from robosuite.utils.transform_utils import quat2axisangle

        rotation = quat2axisangle(raw["robot0_eef_quat"].copy())
        state = np.concatenate([raw["robot0_eef_pos"], rotation, raw["robot0_gripper_qpos"]])
        views = {key: self._frame(camera) if frames else self._black() for key, camera in VIEWS.items()}
        return {STATE: state.astype(np.float32), **views}

    def _frame(self, camera: str) -> np.ndarray:
        """Render a view. MuJoCo's first row is the lowest, and the data sets are mirrored on top of that."""
        sim = self._control.sim
        sim._render_context_offscreen.gl_ctx.make_current()  # or the scene of the environment built last
        pixels = sim.render(width=self._size, height=self._size, camera_name=camera)
        return np.ascontiguousarray(pixels[::-1, ::-1].transpose(2, 0, 1))

    def _black(self) -> np.ndarray:
        return np.zeros((3, self._size, self._size), np.uint8)


def _import_libero() -> ModuleType:
    """Import LIBERO, whose import asks for a configuration on the terminal unless there is one."""
    spec = find_spec("libero")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            'expected LIBERO, got no module libero: pip install "qsteer[libero]", which needs cmake and a '
            "C++ compiler"
        )
    if "libero.libero" not in sys.modules:
        choose_graphics()
        _configure(Path(spec.submodule_search_locations[0]) / "libero")
        logging.getLogger("robosuite_logs").addFilter(lambda record: "macro" not in record.getMessage())
    import libero.libero

    return libero.libero


def _configure(root: Path) -> Path:
    """Write LIBERO's configuration file unless the user has one, and say where LIBERO finds it."""
    own = Path("~/.libero").expanduser()
    if "LIBERO_CONFIG_PATH" in os.environ:
        folder = Path(os.environ["LIBERO_CONFIG_PATH"])
    elif (own / "config.yaml").exists():
        folder = own
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        folder = cache / "qsteer" / "libero" / sha256(str(root).encode()).hexdigest()[:12]
        os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    file = folder / "config.yaml"
    if not file.exists():
        paths = {
            "benchmark_root": root,
            "bddl_files": root / "bddl_files",
            "init_states": root / "init_files",
            "datasets": root.parent / "datasets",
            "assets": root / "assets",
        }
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".config.{os.getpid()}.partial"
        partial.write_text(json.dumps({key: str(path) for key, path in paths.items()}, indent=1))  # is YAML
        partial.replace(file)
    return file


def _find_assets(package: ModuleType, folder: str | os.PathLike[str] | None) -> Path:
    """Make LIBERO look for its assets in ``folder``, or where it does by itself; return where that is."""
    if folder is None:
        folder = os.environ.get(ASSETS)
    if folder is None:
        found = Path(package.get_assets_path())
    else:
        found = Path(folder).expanduser().absolute()
        if not (found / "scenes").is_dir() and (found / "assets" / "scenes").is_dir():
            found = found / "assets"
    if not (found / "scenes").is_dir():
        raise FileNotFoundError(
            f"expected LIBERO's assets, got no folder {str(found / 'scenes')!r}; {FETCH_ASSETS}"
        )
    package._assets_path_cache = str(found)  # type: ignore[attr-defined]  # where it remembers what it found
    return found

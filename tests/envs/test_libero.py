"""LIBERO: set up without a question; episodes fixed by their seed; what a policy of lerobot is shown."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from qsteer.envs import libero, platform

installed = pytest.mark.skipif(find_spec("libero") is None, reason="needs hf-libero (the extra libero)")
SUBSET = Path(__file__).parents[3] / "shared" / "data" / "libero_assets_subset.zip"  # of the six tasks
TASK = 60
VIEWS = tuple(libero.VIEWS)


# Set-up, without LIBERO


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LIBERO_CONFIG_PATH", "XDG_CACHE_HOME", "MUJOCO_GL", libero.ASSETS):
        monkeypatch.setenv(name, "")  # so that it is restored whatever the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_configuration_is_written_to_the_cache_once(home: Path, tmp_path: Path):
    file = libero._configure(root := tmp_path / "site" / "libero")
    assert file.is_relative_to(home / ".cache" / "qsteer")
    assert os.environ["LIBERO_CONFIG_PATH"] == str(file.parent)
    assert json.loads(file.read_text()) == {
        "benchmark_root": str(root),
        "bddl_files": str(root / "bddl_files"),
        "init_states": str(root / "init_files"),
        "datasets": str(root.parent / "datasets"),
        "assets": str(root / "assets"),
    }
    before = file.stat().st_mtime_ns
    assert libero._configure(root) == file
    assert file.stat().st_mtime_ns == before
    del os.environ["LIBERO_CONFIG_PATH"]
    assert libero._configure(tmp_path / "other") != file, "two installations share nothing"


@pytest.mark.parametrize("named", [False, True], ids=["~/.libero", "$LIBERO_CONFIG_PATH"])
def test_the_users_own_configuration_is_left_alone(named: bool, home: Path, monkeypatch: pytest.MonkeyPatch):
    folder = home / ("mine" if named else ".libero")
    folder.mkdir()
    (folder / "config.yaml").write_text("benchmark_root: /mine\n")
    if named:
        monkeypatch.setenv("LIBERO_CONFIG_PATH", str(folder))
    assert libero._configure(home / "libero") == folder / "config.yaml"
    assert (folder / "config.yaml").read_text() == "benchmark_root: /mine\n"
    assert ("LIBERO_CONFIG_PATH" in os.environ) == named
    assert list(folder.iterdir()) == [folder / "config.yaml"]


def test_a_folder_that_the_user_names_gets_the_configuration(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(home / "new"))
    assert libero._configure(home / "libero") == home / "new" / "config.yaml"
    assert (home / "new" / "config.yaml").exists()
    assert not (home / ".cache").exists()


def package(found: Path) -> ModuleType:
    module = ModuleType("libero")
    module.get_assets_path = lambda: str(found)
    return module


def test_assets_are_looked_for_where_the_user_says(home: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("own", "argument/assets", "variable"):
        (home / folder / "scenes").mkdir(parents=True)
    module = package(home / "own")
    assert libero._find_assets(module, None) == home / "own"
    monkeypatch.setenv(libero.ASSETS, "~/variable")
    assert libero._find_assets(module, None) == home / "variable"
    assert libero._find_assets(module, home / "argument") == home / "argument" / "assets"
    assert module._assets_path_cache == str(home / "argument" / "assets")


def test_missing_assets_are_named_with_where_to_get_them(home: Path):
    module = package(home / "nothing")
    with pytest.raises(FileNotFoundError, match=rf"nothing/scenes'; fetch .* {libero.ASSETS}=FOLDER"):
        libero._find_assets(module, None)
    assert not hasattr(module, "_assets_path_cache")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one choice")
@pytest.mark.parametrize(
    ("preset", "libraries", "chosen"),
    [
        (None, ("EGL", "OSMesa"), "egl"),
        (None, ("OSMesa",), "osmesa"),
        ("disabled", ("OSMesa",), "osmesa"),
        ("osmesa", ("EGL",), "osmesa"),
    ],
)
def test_a_graphics_library_that_is_there_is_chosen(home, monkeypatch, preset, libraries, chosen):
    monkeypatch.setattr(platform, "find_library", lambda name: name if name in libraries else None)
    if preset:
        monkeypatch.setenv("MUJOCO_GL", preset)
    platform.choose_graphics()
    assert os.environ["MUJOCO_GL"] == chosen


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one choice")
def test_no_graphics_library_is_an_error_that_names_two(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "find_library", lambda name: None)
    with pytest.raises(RuntimeError, match=r"neither EGL nor OSMesa; install one.*libegl1.*libosmesa6"):
        platform.choose_graphics()
    platform.choose_graphics(needed=False)
    assert os.environ["MUJOCO_GL"] == "disabled"


def test_without_libero_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libero, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"qsteer\[libero\]"):
        libero.make(TASK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_100"}, "suite: expected one of .*libero_90.*, got 'libero_100'"),
        ({"size": 0}, "size: expected at least 1, got 0"),
        ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        libero.make(TASK, **arguments)


# With LIBERO


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get(libero.ASSETS):
        return Path(named)
    if not SUBSET.exists():
        pytest.skip(f"needs LIBERO's assets: set {libero.ASSETS}")
    with ZipFile(SUBSET) as archive:
        archive.extractall(folder := tmp_path_factory.mktemp("libero"))
    return folder


@pytest.fixture(scope="module")
def env(assets: Path) -> Iterator[libero.LiberoEnv]:
    env = libero.make(TASK, size=64, assets=assets)
    env.reset(seed=0)
    yield env
    env.close()


def run(env: libero.LiberoEnv, seed: int, steps: int, on: bool = True) -> list[dict[str, np.ndarray]]:
    env.cameras(True)
    rows = [env.reset(seed=seed)[0]]
    env.cameras(on)
    draw = np.random.default_rng(seed)
    for k in range(steps):
        if k == steps - 1:
            env.cameras(True)
        rows.append(env.step(draw.uniform(-1, 1, 7).astype(np.float32))[0])
    return rows


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@installed
def test_the_six_tasks_are_those_of_libero():
    libero._import_libero()
    from libero.libero import benchmark

    suite = benchmark.get_benchmark("libero_90")()
    for number, task in libero.TASKS.items():
        theirs = suite.get_task(number)
        assert asdict(task) == {"name": theirs.name, "instruction": theirs.language}


@installed
@pytest.mark.parametrize("task", [-1, 90])
def test_a_task_that_is_not_there_is_named(task: int, assets: Path):
    with pytest.raises(ValueError, match=rf"expected one of libero_90's 0 \.\. 89, got {task}"):
        libero.make(task, assets=assets)


@installed
def test_observations_are_those_of_the_space(env: libero.LiberoEnv):
    observation, info = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert {key: (v.shape, str(v.dtype)) for key, v in observation.items()} == {
        "observation.state": ((8,), "float32"),
        "observation.images.image": ((3, 64, 64), "uint8"),
        "observation.images.image2": ((3, 64, 64), "uint8"),
    }
    assert info == {"success": False}
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.action_space.shape == (7,)
    assert env.task_description == libero.TASKS[TASK].instruction
    assert env.render().shape == (64, 64, 3)
    assert np.array_equal(env.render().transpose(2, 0, 1), observation[VIEWS[0]])


@installed
def test_an_episode_depends_on_its_seed_alone(env: libero.LiberoEnv):
    before = np.random.get_state()[1].copy()
    first, other, again = (run(env, seed, 3) for seed in (1, 2, 1))
    assert np.array_equal(np.random.get_state()[1], before), "numpy's generator is left as it was"
    assert all(map(equal, first, again))
    for key in first[0]:
        assert not np.array_equal(first[0][key], other[0][key]), key
    wrapped = run(env, 51, 0)[0]  # the same stored state; furniture is placed anew
    assert np.allclose(wrapped["observation.state"], first[0]["observation.state"], atol=1e-3)


@installed
def test_a_step_moves_the_gripper_by_its_action(env: libero.LiberoEnv):
    state = env.reset(seed=1)[0]["observation.state"]
    for action, axis in (((0, 1, 0, 0, 0, 0, -1), 1), ((0, 0, 1, 0, 0, 0, -1), 2)):
        for _ in range(5):
            after = env.step(np.array(action, np.float32))[0]["observation.state"]
        moved = (after - state)[:3]
        assert moved[axis] > 0.03 and abs(moved[axis]) == abs(moved).max()
        state = after
    assert state[6] - state[7] > 0.07, "the fingers are open"
    for _ in range(10):
        state = env.step(np.array((0, 0, 0, 0, 0, 0, 1), np.float32))[0]["observation.state"]
    assert state[6] - state[7] < 0.01


@installed
def test_frames_are_rendered_only_while_cameras_are_on(env: libero.LiberoEnv, monkeypatch):
    always = run(env, 3, 5)
    rendered, sim = [], env._control.sim
    own = sim.render
    monkeypatch.setattr(
        sim, "render", lambda **k: rendered.append(k["camera_name"]) or own(**k), raising=False
    )
    seldom = run(env, 3, 5, on=False)
    assert rendered == ["agentview", "robot0_eye_in_hand"] * 2
    assert equal(seldom[0], always[0]) and equal(seldom[-1], always[-1])
    for row, seen in zip(seldom[1:-1], always[1:-1], strict=True):
        assert not any(row[key].any() for key in VIEWS)
        assert np.array_equal(row["observation.state"], seen["observation.state"])


@installed
def test_a_step_costs_one_until_success_ends_the_episode(env: libero.LiberoEnv, monkeypatch):
    env.reset(seed=1)
    assert env.step(np.zeros(7))[1:] == (-1.0, False, False, {"success": False})
    monkeypatch.setattr(env._control.env, "_check_success", lambda: True)
    assert env.step(np.zeros(7))[1:] == (0.0, True, False, {"success": True})
    monkeypatch.setattr(env, "_max_steps", 3)
    assert env.step(np.zeros(7))[1:] == (0.0, True, False, {"success": True}), "success is no truncation"


@installed
def test_the_last_frames_before_the_time_limit_are_there(env: libero.LiberoEnv, monkeypatch):
    monkeypatch.setattr(env, "_max_steps", 2)
    env.cameras(False)
    first, _ = env.reset(seed=1)
    assert first[VIEWS[0]].any()
    middle, *_, truncated, _ = env.step(np.zeros(7))
    assert not truncated and not middle[VIEWS[0]].any()
    last, _, terminated, truncated, _ = env.step(np.zeros(7))
    assert truncated and not terminated
    assert all(last[key].any() for key in VIEWS)
    env.cameras(True)


@installed
def test_the_time_limit_is_the_suites(env: libero.LiberoEnv):
    assert env._max_steps == 400


@installed
def test_the_scene_is_the_right_way_up_and_mirrored_as_in_the_data_sets(env: libero.LiberoEnv):
    env.reset(seed=1)
    sim, robot = env._control.sim, env._control.robots[0]
    sim.data.qpos[robot._ref_joint_pos_indexes[0]] += 0.6  # to the robot's left, which is +y
    sim.forward()
    hand = [
        i for i in range(sim.model.ngeom) if "gripper" in sim.model.body_id2name(sim.model.geom_bodyid[i])
    ]
    material, colour = sim.model.geom_matid[hand].copy(), sim.model.geom_rgba[hand].copy()
    sim.model.geom_matid[hand], sim.model.geom_rgba[hand] = -1, (1, 0, 1, 1)
    red, green, blue = env.render().astype(int).transpose(2, 0, 1)
    sim.model.geom_matid[hand], sim.model.geom_rgba[hand] = material, colour
    rows, columns = np.nonzero((red > green + 60) & (blue > green + 60))
    assert len(rows) > 5

    camera = sim.model.camera_name2id("agentview")
    grip = sim.data.site_xpos[sim.model.site_name2id("gripper0_grip_site")]
    right, up, back = sim.data.cam_xmat[camera].reshape(3, 3).T @ (grip - sim.data.cam_xpos[camera])
    focal = 32 / np.tan(np.deg2rad(sim.model.cam_fovy[camera]) / 2)
    row, column = 31.5 - focal * up / -back, 31.5 + focal * right / -back
    assert column > 40, "the arm is off the middle, where a mirrored picture looks the same"
    assert rows.mean() == pytest.approx(row, abs=8)
    assert 63 - columns.mean() == pytest.approx(column, abs=5)


@installed
@pytest.mark.slow
def test_a_policy_of_lerobot_sees_what_lerobot_shows_it(env: libero.LiberoEnv):
    processor = pytest.importorskip("lerobot.processor.env_processor").LiberoProcessorStep()
    observation, _ = env.reset(seed=2)
    raw = env._control.env._get_observations()
    shown = {
        "observation.robot_state": {
            "eef": {
                "pos": torch.tensor(raw["robot0_eef_pos"])[None],
                "quat": torch.tensor(raw["robot0_eef_quat"])[None],
            },
            "gripper": {"qpos": torch.tensor(raw["robot0_gripper_qpos"])[None]},
        }
    }
    for key, camera in libero.VIEWS.items():
        frame = env._control.sim.render(width=64, height=64, camera_name=camera)  # as robosuite hands it out
        shown[key] = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
    theirs = processor.observation(shown)
    assert theirs.keys() == observation.keys()
    for key in VIEWS:
        assert np.array_equal(theirs[key][0].numpy(), observation[key])
    np.testing.assert_allclose(theirs["observation.state"][0], observation["observation.state"], atol=1e-5)


@installed
@pytest.mark.slow
def test_the_import_asks_nothing(assets: Path, home: Path):
    code = f"from qsteer.envs import libero; print(libero.make({TASK}).task_description)"
    settings = os.environ | {libero.ASSETS: str(assets)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.stdout.strip() == libero.TASKS[TASK].instruction, done.stderr
    assert not (home / ".libero").exists()
    assert len(list((home / ".cache").rglob("config.yaml"))) == 1


@installed
@pytest.mark.slow
@pytest.mark.parametrize("task", libero.TASKS)
def test_every_task_builds_resets_steps_and_renders(task: int, assets: Path):
    env = libero.make(task, size=64, assets=assets)
    first, again, other = (run(env, seed, 2) for seed in (3, 3, 4))
    env.close()
    rebuilt = run(env, 3, 2)  # a closed environment is built anew
    env.close()
    assert all(map(equal, first, again)) and all(map(equal, first, rebuilt))
    for before, after, elsewhere in zip(first[0].items(), first[2].values(), other[0].values(), strict=True):
        key, before = before
        assert not np.array_equal(before, after) and not np.array_equal(before, elsewhere), key
        assert before.std() > (0 if key == libero.STATE else 10)


@installed
@pytest.mark.slow
def test_two_environments_in_one_process_each_show_their_own_scene(assets: Path, env: libero.LiberoEnv):
    alone = env.reset(seed=3)[0]
    other = libero.make(31, size=64, assets=assets)
    elsewhere = other.reset(seed=3)[0]
    assert equal(env.reset(seed=3)[0], alone)
    assert equal(other.reset(seed=3)[0], elsewhere)
    other.close()
    assert equal(env.reset(seed=3)[0], alone)


@installed
@pytest.mark.slow
def test_rollouts_in_processes_of_their_own_see_what_is_seen_here(assets: Path, env: libero.LiberoEnv):
    from qsteer.envs.rollouts import Simulators

    seen = []

    def act(obs: dict[str, torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        seen.append(obs)
        return torch.zeros_like(noise)

    make_env = partial(libero.make, TASK, size=64, assets=assets, max_steps=4)
    with Simulators(make_env, horizon=2, num_envs=1) as simulators:
        result = simulators.rollout(act, episodes=1, seed=5, progress=False)
    assert result.length.tolist() == [4] and result.sum_reward.tolist() == [-4.0]
    here = [env.reset(seed=5)[0]] + [env.step(np.zeros(7))[0] for _ in range(2)]
    for there, row in zip(seen, (here[0], here[2]), strict=True):
        assert all(np.array_equal(there[key][0].numpy(), row[key]) for key in row)

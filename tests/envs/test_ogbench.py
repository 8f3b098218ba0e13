"""OGBench: the generator is deterministic, its files are OGBench's, rewards are those of the environment."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ogbench")

from qsteer.envs import ogbench

CUBE, CUBE_TASK = "cube-single-play-v0", "cube-single-play-singletask-v0"
MAZE, MAZE_TASK = "pointmaze-medium-navigate-v0", "pointmaze-medium-navigate-singletask-v0"

pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def val(path: Path) -> Path:
    return path.with_name(f"{path.stem}-val.npz")


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cube") / "cube.npz"
    ogbench.generate(CUBE, path, transitions=150, val_transitions=20, workers=1, progress=False)
    return path


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maze") / "maze.npz"
    ogbench.generate(MAZE, path, transitions=2300, val_transitions=150, workers=1, progress=False)
    return path


# Generator


def test_an_episode_does_not_depend_on_those_before_it(cube):
    first, other, again = (
        ogbench._Episode("cube-single-v0", 0, 0, index, 20).collect() for index in (0, 1, 0)
    )
    assert equal(first, again)
    assert not equal(first, other)
    assert np.array_equal(first["qpos"], read(cube)["qpos"][:21])  # nor on its length


@pytest.mark.parametrize("name", [MAZE, pytest.param(CUBE, marks=pytest.mark.slow)])
def test_data_does_not_depend_on_the_number_of_workers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(ogbench, "EPISODE_TRANSITIONS", 20)
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    ogbench.generate(name, one, transitions=50, val_transitions=20, workers=1, progress=False)
    ogbench.generate(name, two, transitions=50, val_transitions=20, workers=2, progress=False)
    assert equal(read(one), read(two))
    assert equal(read(val(one)), read(val(two)))


def test_every_seed_split_and_episode_differs(maze, tmp_path, monkeypatch):
    monkeypatch.setattr(ogbench, "EPISODE_TRANSITIONS", 10)
    starts = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.npz"
        ogbench.generate(MAZE, path, transitions=20, val_transitions=20, seed=seed, workers=1, progress=False)
        starts += [row for file in (path, val(path)) for row in read(file)["observations"][[0, 11]]]
    assert len(np.unique(starts, axis=0)) == 8
    assert np.array_equal(starts[0], read(maze)["observations"][0])  # the same episode of a larger data set


def test_numpys_global_generator_is_left_alone(tmp_path):
    before = np.random.get_state()[1].copy()
    ogbench.generate(MAZE, tmp_path / "d.npz", transitions=5, val_transitions=5, workers=1, progress=False)
    assert np.array_equal(before, np.random.get_state()[1])


def test_file_format(maze, cube):
    train, validation = read(maze), read(val(maze))
    assert {key: array.dtype for key, array in train.items()} == {
        "observations": np.float32,
        "actions": np.float32,
        "terminals": np.bool_,
        "qpos": np.float32,
        "qvel": np.float32,
    }
    assert train.keys() == validation.keys() == read(cube).keys()
    assert np.flatnonzero(train["terminals"]).tolist() == [1000, 2001, 2302]  # one row more than transitions
    assert np.flatnonzero(validation["terminals"]).tolist() == [150]
    assert {len(array) for array in train.values()} == {2303}
    assert np.array_equal(train["observations"], train["qpos"])  # a point's state is its position
    assert np.abs(train["actions"]).max() == 1.0


def test_actions_lead_from_row_to_row(maze):
    data = read(maze)
    env = ogbench.make(MAZE_TASK).unwrapped
    env.reset()
    for row in range(0, 900, 30):
        env.set_xy(data["qpos"][row])
        ob, *_ = env.step(data["actions"][row])
        np.testing.assert_allclose(ob, data["observations"][row + 1], atol=1e-5)


def test_play_picks_the_cube_up_and_puts_it_down_elsewhere(cube):
    position = read(cube)["qpos"][:, 14:17]
    airborne = position[:, 2] > 0.1
    assert position[0, 2] < 0.03
    assert airborne.any()
    down = position[np.flatnonzero(airborne)[0] :]
    down = down[down[:, 2] < 0.03]
    assert np.linalg.norm(down[0, :2] - position[0, :2]) > 0.05


def test_navigation_goes_all_over_the_maze(maze):
    env = ogbench.make(MAZE_TASK).unwrapped
    visited = {env.xy_to_ij(xy) for xy in read(maze)["observations"]}
    free = {tuple(cell) for cell in np.argwhere(env.maze_map == 0)}
    assert visited <= free
    assert len(visited) > 0.6 * len(free)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "d.npz"
    path.write_bytes(b"old")

    def fail(file, **columns):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        ogbench.generate(MAZE, path, transitions=5, val_transitions=5, workers=1, progress=False)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cube-double-play-v0",
        "scene-play-v0",
        "puzzle-3x3-play-v0",
        "pointmaze-giant-navigate-v0",
        "pointmaze-teleport-navigate-v0",
    ],
)
def test_other_environments(name, tmp_path, monkeypatch):
    monkeypatch.setattr(ogbench, "EPISODE_TRANSITIONS", 300)
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    ogbench.generate(name, one, transitions=700, val_transitions=10, workers=1, progress=False)
    ogbench.generate(name, two, transitions=700, val_transitions=10, workers=2, progress=False)
    data = read(one)
    assert equal(data, read(two))
    if name.startswith(("scene", "puzzle")):
        assert data["button_states"].dtype == np.int64
        assert len(np.unique(data["button_states"], axis=0)) > 1  # a button has been pressed
    train, _ = ogbench.load(name.replace("-v0", "-singletask-task3-v0"), one)
    assert len(train["rewards"]) == 700


# Loader


@pytest.mark.parametrize(("task", "source"), [(CUBE_TASK, "cube"), (MAZE_TASK, "maze")])
def test_loaded_transitions_are_the_written_rows(task, source, request):
    path = request.getfixturevalue(source)
    for split, file in zip(ogbench.load(task, path), (path, val(path)), strict=True):
        rows = read(file)
        has_next = ~rows["terminals"]
        assert set(split) == {
            *("observations", "actions", "next_observations", "terminals", "rewards", "masks")
        }
        assert {array.dtype for array in split.values()} == {np.dtype(np.float32)}
        assert np.array_equal(split["observations"], rows["observations"][has_next])
        assert np.array_equal(split["actions"], rows["actions"][has_next])
        assert np.array_equal(split["next_observations"], rows["observations"][1:][has_next[:-1]])
        assert np.array_equal(split["terminals"], rows["terminals"][1:][has_next[:-1]])


def test_maze_rewards_are_the_environments(maze):
    solved = 0
    for index in range(1, 6):
        task = f"pointmaze-medium-navigate-singletask-task{index}-v0"
        train, _ = ogbench.load(task, maze)
        env = ogbench.make(task).unwrapped
        env.reset()
        assert env.cur_task_id == index
        for row in range(0, len(train["rewards"]), 7):
            env.set_xy(train["observations"][row])
            _, reward, terminated, _, _ = env.step(np.zeros(2, np.float32))
            assert reward == train["rewards"][row]
            assert terminated == (train["masks"][row] == 0.0)
            solved += terminated
    assert solved > 0


def test_cube_rewards_are_the_environments(cube, tmp_path):
    env = ogbench.make(CUBE_TASK).unwrapped
    env.reset()
    rows, rng = read(cube), np.random.default_rng(0)
    offset = rng.normal(size=(len(rows["qpos"]), 3))
    offset *= rng.uniform(0.0, 0.08, (len(offset), 1)) / np.linalg.norm(offset, axis=1, keepdims=True)
    rows["qpos"][:, 14:17] = (
        env.cur_task_info["goal_xyzs"][0] + offset
    )  # solved within 4 cm: about one in two
    for file in (tmp_path / "near.npz", tmp_path / "near-val.npz"):
        np.savez(file, **rows)
    train, _ = ogbench.load(CUBE_TASK, tmp_path / "near.npz")
    rewards = []
    for qpos in rows["qpos"][:-1]:
        env.data.qpos[:] = qpos
        rewards.append(env.compute_reward())
    assert np.array_equal(train["rewards"], rewards)
    assert np.array_equal(train["masks"], -train["rewards"])
    assert set(rewards) == {-1.0, 0.0}


# Evaluation environment


@pytest.mark.parametrize("task", [CUBE_TASK, MAZE_TASK])
def test_a_seed_fixes_the_initial_state_whatever_the_global_generator(task):
    env = ogbench.make(task)
    np.random.seed(1)
    first, _ = env.reset(seed=7)
    env.step(env.action_space.sample())
    np.random.seed(2)
    again, _ = env.reset(seed=7)
    following = np.random.uniform()
    np.random.seed(2)
    assert np.array_equal(first, again)
    assert following == np.random.uniform()  # the caller's stream goes on as if nothing had been drawn
    assert not np.array_equal(first, env.reset(seed=8)[0])
    assert not np.array_equal(again, env.reset()[0])


def test_terminates_at_the_goal_and_truncates_at_the_time_limit():
    env = ogbench.make(MAZE_TASK)
    still = np.zeros(2, np.float32)
    env.reset(seed=0)
    outcomes = [env.step(still)[1:4] for _ in range(1000)]
    assert set(outcomes[:-1]) == {(-1.0, False, False)}
    assert outcomes[-1] == (-1.0, False, True)
    env.reset(seed=0)
    env.unwrapped.set_xy(env.unwrapped.cur_goal_xy)
    _, reward, terminated, truncated, info = env.step(still)
    assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, 1.0)


@pytest.mark.slow
@pytest.mark.skipif(find_library("EGL") is None, reason="needs EGL")
def test_renders_where_nothing_was_preset():
    script = (
        "import numpy, qsteer.envs.ogbench as o\n"
        f"env = o.make({CUBE_TASK!r}, render=True); env.reset(seed=0); frame = env.render()\n"
        "assert frame.shape == (480, 480, 3) and frame.dtype == numpy.uint8 and frame.std() > 5\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# Names and errors


@pytest.mark.parametrize(
    ("task", "dataset"),
    [
        (CUBE_TASK, CUBE),
        ("cube-single-play-singletask-task4-v0", CUBE),
        ("scene-play-singletask-v0", "scene-play-v0"),
        (MAZE_TASK, MAZE),
    ],
)
def test_dataset_name(task, dataset):
    assert ogbench.dataset_name(task) == dataset


@pytest.mark.parametrize("name", [CUBE, "cube-single-play-singletask", "singletask-v0", "cube-singletask-v0"])
def test_a_name_without_a_task(name):
    for call in (ogbench.dataset_name, ogbench.make, lambda name: ogbench.load(name, "d.npz")):
        with pytest.raises(ValueError, match="put '-singletask'"):
            call(name)


def test_an_unknown_task():
    with pytest.raises(ValueError, match="expected a single-task name of OGBench, got 'cube-zero-play"):
        ogbench.make("cube-zero-play-singletask-v0")


def test_rendering_that_was_ruled_out(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with pytest.raises(RuntimeError, match="start the process with MUJOCO_GL="):
        ogbench.make(CUBE_TASK, render=True)


def test_ogbench_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "qsteer\[ogbench\]"'):
        ogbench.make(CUBE_TASK)


def test_missing_files(cube, tmp_path):
    path = tmp_path / "d.npz"
    with pytest.raises(FileNotFoundError, match=rf"d\.npz'.*generate\('{CUBE}'"):
        ogbench.load(CUBE_TASK, path)
    path.write_bytes(cube.read_bytes())
    with pytest.raises(FileNotFoundError, match=rf"d-val\.npz'.*generate\('{CUBE}'"):
        ogbench.load(CUBE_TASK, path)
    with pytest.raises(ValueError, match=r"ends in '\.npz'"):
        ogbench.load(CUBE_TASK, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("antmaze-medium-navigate-v0", {}, "learnt expert: get the official antmaze-medium-navigate-v0.npz"),
        ("humanoidmaze-large-stitch-v0", {}, "learnt expert"),
        ("cube-single-noisy-v0", {}, "scripted oracle, got 'cube-single-noisy-v0'"),
        ("visual-cube-single-play-v0", {}, "scripted oracle, got 'visual"),
        ("cube", {}, "scripted oracle, got 'cube'"),
        (CUBE_TASK, {}, "scripted oracle, got 'cube-single-play-singletask-v0'"),
        (CUBE, {"path": "d.hdf5"}, r"ends in '\.npz', got 'd\.hdf5'"),
        (CUBE, {"transitions": 0}, "expected transitions >= 1, got 0"),
        (CUBE, {"val_transitions": 0}, "expected val_transitions >= 1, got 0"),
        (CUBE, {"seed": -1}, "expected seed >= 0, got -1"),
        (CUBE, {"workers": 0}, "expected workers >= 1, got 0"),
    ],
)
def test_what_cannot_be_generated(name, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        ogbench.generate(name, **{"path": "d.npz", **change})
    assert list(tmp_path.iterdir()) == []

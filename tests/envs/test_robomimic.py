"""RoboMimic: files of the official structure become episodes; the tasks reset, step, succeed and end."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from qsteer.data.episodes import Chunks
from qsteer.envs import platform, robomimic

SIZES = dict(zip(robomimic.KEYS, (3, 4, 2, 14), strict=True))


def write(path: Path, demos: dict[str, dict[str, np.ndarray]], env_version: str | None = None) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if env_version is not None:
            data.attrs["env_args"] = json.dumps({"env_name": "PickPlaceCan", "env_version": env_version})
        for name, columns in demos.items():
            for column, values in columns.items():
                data[f"{name}/{column}"] = values
    return path


def demo(length: int, success: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """A demonstration; ``success`` are the steps that reach the goal state."""
    rng = np.random.default_rng(seed)
    states = {key: rng.normal(size=(length + 1, size)) for key, size in SIZES.items()}
    rewards = np.zeros(length)
    rewards[success] = 1
    return (
        {"actions": rng.uniform(-1, 1, (length, 7)), "rewards": rewards, "dones": rewards.astype(int)}
        | {f"obs/{key}": values[:-1] for key, values in states.items()}
        | {f"next_obs/{key}": values[1:] for key, values in states.items()}
        | {"obs/robot0_joint_pos": rng.normal(size=(length, 7))}
    )


def states(columns: dict[str, np.ndarray], group: str) -> torch.Tensor:
    names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    return torch.from_numpy(np.concatenate([columns[f"{group}/{name}"] for name in names], 1)).float()


class TestLoad:
    def test_demonstrations_become_trajectories(self, tmp_path: Path) -> None:
        """Ten demonstrations and more: demo_10 comes after demo_2."""
        demos = {f"demo_{i}": demo(4 + i, [2 + i, 3 + i] if i != 1 else [], seed=i) for i in range(11)}
        episodes = robomimic.load(write(tmp_path / "low_dim.hdf5", demos))
        ends = episodes.ends.nonzero().flatten() + 1
        assert ends.tolist() == np.cumsum([4 + i for i in range(11)]).tolist()
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            columns, rows = demos[f"demo_{i}"], slice(start, end)
            assert torch.equal(episodes.observations[rows], states(columns, "obs"))
            assert torch.equal(episodes.next_observations[rows], states(columns, "next_obs"))
            assert torch.equal(episodes.actions[rows], torch.from_numpy(columns["actions"]).float())
            rewards = torch.full((4 + i,), -1.0)
            rewards[[2 + i, 3 + i] if i != 1 else []] = 0
            assert torch.equal(episodes.rewards[rows], rewards)
            assert torch.equal(episodes.terminals[rows], rewards == 0)
        chunks = Chunks(episodes, 3, 0.9, "next_state")
        first = chunks.gather(chunks.starts[:1])
        assert first.rewards.item() == pytest.approx(-1 - 0.9)
        assert first.masks.item() == 0

    def test_without_next_observations(self, tmp_path: Path) -> None:
        columns = {k: v for k, v in demo(5, [4]).items() if not k.startswith("next_obs")}
        episodes = robomimic.load(write(tmp_path / "low_dim.hdf5", {"demo_0": columns}))
        assert torch.equal(episodes.next_observations[:-1], episodes.observations[1:])
        assert torch.equal(episodes.next_observations[-1], episodes.observations[-1])

    def test_another_version_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(robomimic, "version", lambda name: "1.5.2")
        robomimic.load(write(tmp_path / "same.hdf5", {"demo_0": demo(2, [1])}, "1.5.1"))
        with pytest.warns(UserWarning, match=r"of robosuite 1.5.2, got 1.4.1.*robosuite==1.4.1"):
            robomimic.load(write(tmp_path / "old.hdf5", {"demo_0": demo(2, [1])}, "1.4.1"))

    def test_mistakes(self, tmp_path: Path) -> None:
        columns = demo(3, [2])
        with pytest.raises(ValueError, match=r"in \[-1, 1\], got some up to 1\.5"):
            robomimic.load(
                write(tmp_path / "a.hdf5", {"demo_0": columns | {"actions": np.full((3, 7), 1.5)}})
            )
        with pytest.raises(ValueError, match="sparse rewards"):
            robomimic.load(write(tmp_path / "d.hdf5", {"demo_0": columns | {"rewards": np.full(3, 0.4)}}))
        del columns["obs/object"]
        with pytest.raises(KeyError, match=r"demo_0: expected .* got no \['obs/object'\]"):
            robomimic.load(write(tmp_path / "b.hdf5", {"demo_0": columns}))
        with pytest.raises(FileNotFoundError, match=r"no file '.*nothing.hdf5'"):
            robomimic.load(tmp_path / "nothing.hdf5")

    def test_without_h5py(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "qsteer\[robomimic\]"'):
            robomimic.load(tmp_path / "low_dim.hdf5")


@pytest.mark.parametrize(
    ("preset", "libraries", "chosen"),
    [("", {"EGL", "OSMesa"}, "egl"), ("disabled", {"OSMesa"}, "osmesa"), ("osmesa", {"EGL"}, "osmesa")],
)
def test_graphics(preset: str, libraries: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "find_library", lambda name: name if name in libraries else None)
    monkeypatch.setenv("MUJOCO_GL", preset)
    platform.choose_graphics()
    assert os.environ["MUJOCO_GL"] == chosen
    libraries.clear()
    monkeypatch.delenv("MUJOCO_GL")
    with pytest.raises(RuntimeError, match="neither EGL nor OSMesa"):
        platform.choose_graphics()


def test_without_robosuite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ModuleNotFoundError, match=r'expected robosuite.*"qsteer\[robomimic\]"'):
        robomimic.make("can")


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="one of can, square, got 'lift'"):
        robomimic.make("lift")


@pytest.fixture(scope="module", params=["can", "square"])
def task(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One environment, with its name."""
    pytest.importorskip("robosuite")
    with contextlib.closing(robomimic.make(request.param)) as env:
        yield request.param, env


def rollout(env: Any, seed: int | None, steps: int = 4) -> np.ndarray:
    obs, _ = env.reset(seed=seed)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 7))
    return np.stack([obs, *(env.step(action)[0] for action in actions)])


class TestMake:
    def test_an_episode_depends_on_its_seed_alone(self, task: Any) -> None:
        _, env = task
        state = np.random.get_state()[1].copy()
        one, other, again = (rollout(env, seed) for seed in (0, 1, 0))
        following, same = rollout(env, None), (rollout(env, 0), rollout(env, None))[1]
        assert np.array_equal(one, again)
        assert np.array_equal(following, same)
        assert not np.array_equal(one[0], other[0])
        assert not np.array_equal(one[0], following[0])
        assert np.array_equal(np.random.get_state()[1], state)

    def test_observation(self, task: Any) -> None:
        """Where the object is, in both halves of its state, right from the reset on."""
        name, env = task
        obs, info = env.reset(seed=3)
        assert env.observation_space.contains(obs)
        assert env.action_space.shape == (7,)
        assert info == {"success": False}
        sim = env.unwrapped._simulation.sim
        body = "Can_main" if name == "can" else "SquareNut_main"
        place = sim.data.body_xpos[sim.model.body_name2id(body)]
        halves = obs[9:12], obs[16:19]
        offset = [np.linalg.norm(half - place) for half in halves]
        world = int(np.argmin(offset))
        assert offset[world] < 1e-6
        assert np.linalg.norm(halves[1 - world]) == pytest.approx(np.linalg.norm(place - obs[:3]), abs=0.03)
        moved = env.step(np.array([1.0, 0, 0, 0, 0, 0, -1]))[0]
        assert 1e-4 < moved[0] - obs[0] < 0.05  # along the world's x

    def test_success_ends_the_episode(self, task: Any) -> None:
        name, env = task
        env.reset(seed=0)
        _, reward, terminated, truncated, info = env.step(np.zeros(7))
        assert (reward, terminated, truncated, info["success"]) == (-1, False, False, False)
        simulation = env.unwrapped._simulation
        data, model = simulation.sim.data, simulation.sim.model
        if name == "can":
            joint, goal = "Can_joint0", simulation.target_bin_placements[simulation.object_id]
        else:
            joint, goal = "SquareNut_joint0", data.body_xpos[model.body_name2id("peg1")]
        data.set_joint_qpos(joint, [*np.add(goal, [0, 0, 0.05]), 1, 0, 0, 0])
        _, reward, terminated, truncated, info = env.step(np.zeros(7))
        assert (reward, terminated, truncated, info["success"]) == (0, True, False, True)

    def test_time_limit(self, task: Any) -> None:
        name, env = task
        env.reset(seed=0)
        env._elapsed_steps = {"can": 300, "square": 400}[name] - 2
        ends = [env.step(np.zeros(7))[2:4] for _ in range(2)]
        assert ends == [(False, False), (False, True)]

    def test_rendering_has_to_be_asked_for(self, task: Any) -> None:
        _, env = task
        with pytest.raises(RuntimeError, match="render=True"):
            env.unwrapped.render()


@pytest.mark.slow
def test_frames() -> None:
    pytest.importorskip("robosuite")
    with contextlib.closing(robomimic.make("can", render=True)) as env:
        env.reset(seed=0)
        frame = env.render()
    assert frame.shape == (480, 480, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 20


class TestUnusualFiles:
    def test_other_names_and_shapes_of_the_same(self, tmp_path: Path) -> None:
        demos = {f"demo_{i}": demo(4, [3], seed=i) for i in range(11)}
        usual = robomimic.load(write(tmp_path / "usual.hdf5", demos))
        other = {
            name.replace("_", ""): columns | {"rewards": columns["rewards"][:, None]}
            for name, columns in demos.items()
        }
        assert robomimic.load(write(tmp_path / "other.hdf5", other)).fingerprint() == usual.fingerprint()

    def test_nan_names_file_demonstration_column_and_row(self, tmp_path: Path) -> None:
        for name, column in (("actions", "actions"), ("obs/object", "observations"), ("rewards", "rewards")):
            columns = demo(4, [3])
            columns[name][2] = np.nan
            path = write(tmp_path / f"{column}.hdf5", {"demo_0": demo(4, [3]), "demo_1": columns})
            with pytest.raises(ValueError, match=rf"{column}\.hdf5, demo_1, {column}: .*nan in row 2"):
                robomimic.load(path)

    def test_broken_files_are_named(self, tmp_path: Path) -> None:
        pytest.importorskip("h5py")
        whole = write(tmp_path / "whole.hdf5", {"demo_0": demo(4, [3])}).read_bytes()
        for name, content in (("empty", b""), ("half", whole[: len(whole) // 2]), ("text", b"version 1")):
            path = tmp_path / f"{name}.hdf5"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name}\.hdf5: expected an HDF5 file, got {len(content)}"):
                robomimic.load(path)
        for name, demos, message in (
            ("none", {}, "expected demonstrations in a group 'data'"),
            ("names", {"first": demo(2, [1])}, "named demo_0, demo_1, ..., got 'first'"),
            ("short", {"demo_0": demo(4, [3]) | {"rewards": np.zeros(3)}}, "demo_0: expected a row per step"),
        ):
            with pytest.raises(ValueError, match=rf"{name}\.hdf5.*{message}"):
                robomimic.load(write(tmp_path / f"{name}.hdf5", demos))

"""MetaWorld by lerobot's environment; what needs the simulator is skipped where it is not installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lerobot.envs")

from qsteer.envs.lerobot import env_config
from qsteer.envs.metaworld import MetaworldLight

installed = pytest.mark.skipif(find_spec("metaworld") is None, reason="needs the extra metaworld")


def test_the_environment_is_registered_with_lerobot() -> None:
    config = env_config("metaworld_light", "drawer-open-v3", options={"episode_length": 7})
    assert isinstance(config, MetaworldLight)
    assert config.gym_kwargs == {"task": "drawer-open-v3", "episode_length": 7, "camera": 0}


@pytest.mark.parametrize(("camera", "state", "edge"), [(0, 10, 32), (64, 4, 64)])
def test_a_policy_with_a_camera_sees_no_object(camera: int, state: int, edge: int) -> None:
    features = MetaworldLight(camera=camera).features
    assert features["agent_pos"].shape == (state,) and features["pixels"].shape == (edge, edge, 3)


@pytest.mark.parametrize("wrong", [{"episode_length": 0}, {"episode_length": 501}, {"camera": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        MetaworldLight(**wrong)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"'metaworld_light': expected options among .*got \['lenght'\]"):
        env_config("metaworld_light", options={"lenght": 3})


@pytest.mark.skipif(find_spec("metaworld") is not None, reason="is installed")
def test_without_metaworld_the_extra_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r'pip install "qsteer\[metaworld\]"'):
        MetaworldLight().create_envs(1)


def world(**options: Any) -> Any:
    from qsteer.envs.metaworld.world import LightWorld

    return LightWorld("push-v3", **options)


@installed
def test_an_episode_depends_on_its_seed_alone() -> None:
    used, fresh = world(episode_length=5), world(episode_length=5)
    used.reset(seed=1)
    for _ in range(3):
        used.step(np.ones(4, np.float32))
    for env in (used, fresh):
        env.first = env.reset(seed=7)[0]
        env.last = [env.step(np.array([0.5, 1, -1, 1], np.float32))[0] for _ in range(5)][-1]
    for seen in ("first", "last"):
        assert np.array_equal(getattr(used, seen)["agent_pos"], getattr(fresh, seen)["agent_pos"])
    assert not np.array_equal(fresh.first["agent_pos"], world().reset(seed=8)[0]["agent_pos"])


@installed
def test_the_limit_truncates_and_the_expert_succeeds() -> None:
    env = world(episode_length=4)
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[1:4] for _ in range(4)]
    assert ends == [(-1.0, False, False)] * 3 + [(-1.0, False, True)]
    env = world(episode_length=120)
    env.reset(seed=0)
    for _ in range(120):
        action = np.clip(env.expert.get_action(env.raw), -1, 1).astype(np.float32)
        _, reward, terminated, truncated, info = env.step(action)
        if terminated:
            break
    assert (reward, terminated, truncated, info["is_success"]) == (0.0, True, False, True)


@installed
def test_the_camera_shows_the_scene_when_asked() -> None:
    env = world(camera=64)
    assert env.reset(seed=0)[0]["pixels"].std() > 10
    env.cameras(False)
    assert env.step(np.zeros(4, np.float32))[0]["pixels"].max() == 0
    env.cameras(True)
    seen = env.step(np.zeros(4, np.float32))[0]
    assert (
        seen["pixels"].shape == (64, 64, 3) and seen["pixels"].std() > 10 and seen["agent_pos"].shape == (4,)
    )


@installed
def test_an_unknown_task_is_named() -> None:
    from qsteer.envs.metaworld.world import LightWorld

    with pytest.raises(ValueError, match="got 'push-v9'"):
        LightWorld("push-v9")


@installed
@pytest.mark.slow
def test_play_is_a_dataset_of_all_tasks(tmp_path: Path) -> None:
    from qsteer.envs.metaworld.play import play, record_play

    tasks = "push-v3", "drawer-open-v3"
    dataset = record_play(tmp_path / "dataset", tasks, 2, length=40, seed=3)
    assert len(set(dataset.meta.tasks.index)) == 2 and dataset.num_episodes == 4
    frames = play("drawer-open-v3", 4, length=40)  # the second episode, in another process there
    first = int(dataset.hf_dataset.with_format("numpy")["episode_index"][:].searchsorted(1))
    assert np.array_equal(dataset[first]["observation.state"], frames[0]["observation.state"])
    assert np.array_equal(dataset[first + 20]["action"], frames[20]["action"])

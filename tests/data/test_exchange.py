"""What was collected comes back the same from OGBench's columns, lerobot's keys and a LeRobotDataset."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qsteer.data import Episodes
from qsteer.data.exchange import (
    fill,
    from_lerobot_dataset,
    from_transitions,
    to_episodes,
    to_lerobot_dataset,
    to_ogbench,
    to_transitions,
)
from qsteer.data.layout import Layout, Rows, Trajectory, infer_columns
from qsteer.data.replay import Replay


def collected(*, steps: int = 1, images: bool = False, lanes: int = 2, rows: int = 23) -> Replay:
    """Episodes of 1 to 6 rows that end in a terminal, at a time limit, in a cut, or not yet."""
    generator = torch.Generator().manual_seed(steps + images)
    # 64 wide: lerobot's statistics of a picture subsample it.
    size = 3, 64, 64

    def observe() -> dict[str, Tensor]:
        pictures = torch.randint(256, (lanes, *size), generator=generator).to(torch.uint8)
        state = torch.randn(lanes, 4, generator=generator)
        return {"observation.state": state, "observation.images.front": pictures}

    seen = observe()
    columns = infer_columns(seen) if images else 4
    layout = Layout(
        observations=columns,
        action_dim=2,
        steps=steps,
        horizon=1,
        lanes=lanes,
        need="next_state",
        capacity=80,
    )
    replay = Replay(layout)
    left = torch.tensor([3, 1])[:lanes]
    for i in range(rows):
        following = observe()
        ends = left == 1
        terminals = ends & (torch.rand(lanes, generator=generator) < 0.5)
        replay.add(
            Rows(
                observations=seen if images else seen["observation.state"],
                actions=torch.randn(lanes, steps, 2, generator=generator),
                rewards=torch.randn(lanes, generator=generator),
                terminals=terminals,
                truncations=ends & ~terminals,
                executed=torch.where(ends, 1 + i % steps, steps),
                next_observations=following if images else following["observation.state"],
            )
        )
        left = torch.where(ends, torch.randint(1, 7, (lanes,), generator=generator), left - 1)
        seen = following
        if i == 8:
            replay.cut(torch.tensor([True, False])[:lanes])
    return replay


def assert_same(a: Trajectory, b: Trajectory) -> None:
    for name in ("actions", "rewards", "executed"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.terminal == b.terminal
    assert a.truncated == b.truncated
    for x, y in ((a.observations, b.observations), (a.closing, b.closing)):
        if isinstance(x, Tensor):
            x = {"observation.state": x}
        if isinstance(y, Tensor):
            y = {"observation.state": y}
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert list(x) == list(y)
            for key in x:
                assert x[key].dtype == y[key].dtype
                assert torch.equal(x[key], y[key]), key


def test_a_replay_gives_the_trajectories_that_fill_another_like_it() -> None:
    for steps, images in ((1, False), (3, True)):
        replay = collected(steps=steps, images=images)
        there = list(replay.trajectories())
        kinds = {(t.terminal, t.truncated, t.closing is not None) for t in there}
        assert kinds == {(True, False, True), (False, True, True), (False, False, False)}
        assert sum(map(len, there)) == len(replay) == 46
        values = dict(vars(replay.layout)) | {"lanes": 1}
        copy = Replay(Layout(**values))
        fill(copy, there)
        for a, b in zip(there, copy.trajectories(), strict=True):
            assert_same(a, b)
        # An episode that goes on has as much to draw in the copy as the original knows of it.
        assert copy.size() == replay.size()
        with pytest.raises(ValueError, match="1 lane, got 2"):
            fill(replay, there)


def test_states_become_offline_data() -> None:
    """``Chunks`` of it are those of the replay, but for rows after which nothing is known."""
    replay = collected()
    there = list(replay.trajectories())
    data = to_episodes(there)
    lost = sum(not t.terminal and t.closing is None for t in there)
    assert lost == 2
    assert len(data) == len(replay) - lost == 44
    assert int(data.terminals.sum()) == sum(t.terminal for t in there)
    batch = replay.gather(replay.starts)
    assert torch.equal(data.observations, batch.observations)
    assert torch.equal(data.next_observations, batch.next_observations)
    assert torch.equal(data.actions, batch.actions[:, 0])
    assert torch.equal(data.rewards, batch.rewards)
    assert torch.equal(data.terminals, batch.masks == 0)
    with pytest.raises(ValueError, match="rows of 1 step, got 2"):
        to_episodes(collected(steps=2).trajectories())
    with pytest.raises(ValueError, match=r"expected observation\.state alone"):
        to_episodes(collected(images=True).trajectories())
    with pytest.raises(ValueError, match="collect more"):
        to_episodes([])


def test_a_terminal_needs_nothing_behind_it() -> None:
    states = torch.arange(3.0)[:, None]
    rows = torch.zeros(3, 1, 1), torch.ones(3), torch.ones(3, dtype=torch.int32)
    data = to_episodes([Trajectory(states, *rows, terminal=True, truncated=False, closing=None)])
    assert data.next_observations.flatten().tolist() == [1, 2, 2]
    assert data.terminals.tolist() == data.ends.tolist() == [False, False, True]
    data = to_episodes([Trajectory(states, *rows, terminal=False, truncated=True, closing=None)])
    assert data.next_observations.flatten().tolist() == [1, 2]
    assert data.terminals.tolist() == [False, False]


def test_ogbench_columns_are_written_as_they_are_read(tmp_path: Path) -> None:
    data = to_episodes(collected().trajectories())
    columns = to_ogbench(data)
    assert columns["masks"].sum() == len(data) - int(data.terminals.sum())
    assert columns["terminals"].sum() == int(data.ends.sum())
    np.savez(tmp_path / "data.npz", **columns)
    with np.load(tmp_path / "data.npz") as file:
        again = Episodes.from_ogbench(file)
    assert again.fingerprint() == data.fingerprint()


def test_ogbench_data_comes_back_from_offline_data(tmp_path: Path) -> None:
    """Column for column and dtype for dtype what OGBench's own loader returns."""
    pytest.importorskip("ogbench")
    from qsteer.envs import ogbench

    task, path = "pointmaze-medium-navigate-singletask-v0", tmp_path / "data.npz"
    ogbench.generate(
        ogbench.dataset_name(task), path, transitions=40, val_transitions=5, workers=1, progress=False
    )
    columns, _ = ogbench.load(task, path)
    again = to_ogbench(Episodes.from_ogbench(columns))
    assert sorted(again) == sorted(columns)
    for name, column in columns.items():
        assert again[name].dtype == column.dtype
        np.testing.assert_array_equal(again[name], column)


@pytest.mark.parametrize(("steps", "images"), [(1, False), (3, True)])
def test_transitions_come_back_from_lerobots_keys(steps: int, images: bool) -> None:
    there = list(collected(steps=steps, images=images).trajectories())
    transitions = list(to_transitions(there))
    for transition in transitions:
        assert transition["action"].shape == ((1, 2) if steps == 1 else (1, steps, 2))
        assert ("complementary_info" in transition) == (steps > 1)
        if images:
            image = transition["state"]["observation.images.front"]
            assert image.shape == (1, 3, 64, 64)
            assert image.dtype == torch.float32
            assert 0 <= image.min() < 0.1 < 0.9 < image.max() <= 1
    assert sum(t["done"] for t in transitions) == sum(t.terminal for t in there)
    back = list(from_transitions(transitions))
    kept = [t for t in there if t.terminal or t.closing is not None or len(t) > 1]
    for a, b in zip(kept, back, strict=True):
        if a.terminal or a.truncated:
            assert_same(a, b)
        else:  # cut: what is behind its last row but one is known
            assert len(b) == len(a) - 1
            assert b.truncated
            assert torch.equal(a.rewards[:-1], b.rewards)


@pytest.mark.slow  # to import
def test_lerobots_own_buffer_takes_the_transitions() -> None:
    pytest.importorskip("datasets", reason="needs lerobot[dataset]")
    from lerobot.rl.buffer import ReplayBuffer

    transitions = list(to_transitions(collected().trajectories()))
    buffer = ReplayBuffer(len(transitions), device="cpu", state_keys=["observation.state"], use_drq=False)
    for transition in transitions:
        buffer.add(**transition)
    state = torch.cat([t["state"]["observation.state"] for t in transitions])
    assert torch.equal(buffer.states["observation.state"], state)
    assert buffer.dones.tolist() == [t["done"] for t in transitions]
    assert buffer.truncateds.tolist() == [t["truncated"] for t in transitions]


@pytest.mark.parametrize(("steps", "images"), [(1, False), (2, True)])
def test_a_lerobot_dataset_gives_back_what_was_written(tmp_path: Path, steps: int, images: bool) -> None:
    """To the bit, pictures and the observation behind a time limit included, from the files alone."""
    pytest.importorskip("datasets", reason="needs lerobot[dataset]")
    from lerobot.datasets import LeRobotDataset

    there = list(collected(steps=steps, images=images).trajectories())
    to_lerobot_dataset(there, "me/test", tmp_path / "data", 10, task="Push the cube.")
    dataset = LeRobotDataset("me/test", root=tmp_path / "data")
    assert dataset.num_episodes == len(there)
    assert dataset[0]["task"] == "Push the cube."
    assert {"next.reward", "next.done", "next.truncated", "next.success"} < set(dataset.features)
    for a, b in zip(there, from_lerobot_dataset(dataset), strict=True):
        assert_same(a, b)
    successes = sum(bool(dataset[i]["next.success"]) for i in range(len(dataset)))
    assert successes == 2 * sum(t.terminal for t in there)  # the closing frame repeats it


class Recorded(list):
    """Frames of somebody else's dataset."""

    def __init__(self, *episodes: list[dict[str, bool]]) -> None:
        frames = [
            {
                "observation.state": torch.tensor([float(k)]),
                "action": torch.tensor([float(k)]),
                "next.reward": torch.tensor([1.0]),
                "episode_index": torch.tensor(e),
            }
            | {f"next.{name}": torch.tensor([value]) for name, value in flags.items()}
            for e, episode in enumerate(episodes)
            for k, flags in enumerate(episode)
        ]
        super().__init__(frames)
        self.features = list(frames[0])


def test_other_datasets_are_read_by_what_their_columns_say() -> None:
    go, stop = {"done": False}, {"done": True}
    plain = list(from_lerobot_dataset(Recorded([go, stop], [go, go])))
    assert [(t.terminal, t.truncated, len(t)) for t in plain] == [(True, False, 2), (False, True, 2)]
    go, won, lost = ({"done": d, "success": s} for d, s in ((False, False), (True, True), (True, False)))
    judged = list(from_lerobot_dataset(Recorded([go, won], [go, lost], [go, won, won])))
    assert [(t.terminal, t.truncated, len(t)) for t in judged] == [
        (True, False, 2),
        (False, True, 2),
        (True, False, 2),
    ]
    assert judged[2].closing is not None
    assert judged[2].closing["observation.state"].tolist() == [[2.0]]
    assert judged[0].closing is None
    with pytest.raises(KeyError, match=r"got no \['next.done'\]"):
        list(from_lerobot_dataset(Recorded([{}])))

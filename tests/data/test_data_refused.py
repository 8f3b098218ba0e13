"""Data that would train a wrong critic is refused by name; what is unambiguous is converted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from play_data import episodes
from safetensors.torch import save_file

from qsteer.data import Episodes
from qsteer.data.batches import DatasetBatches, SafetensorsBatches, record
from qsteer.data.exchange import fill, from_lerobot_dataset, from_transitions, to_ogbench
from qsteer.data.layout import Layout, Rows, Trajectory
from qsteer.data.replay import Replay

NUMBERS = ("observations", "next_observations", "actions", "rewards")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_episodes_with_nan_or_infinity_name_column_and_row(name: str, wrong: float) -> None:
    column = getattr(episodes(), name).clone()
    column.view(len(column), -1)[[7, 9], -1] = wrong
    with pytest.raises(ValueError, match=rf"Episodes\.{name}: .*got -?(nan|inf) in row 7.*of 2 such rows"):
        replace(episodes(), **{name: column})
    columns = to_ogbench(episodes()) | {name: column.numpy()}
    with pytest.raises(ValueError, match=rf"Episodes\.{name}: .* in row 7"):
        Episodes.from_ogbench(columns)


@pytest.mark.parametrize("name", ["masks", "terminals"])
def test_flags_of_ogbench_are_0_and_1(name: str) -> None:
    columns = to_ogbench(episodes())
    columns[name][3] = np.nan
    with pytest.raises(ValueError, match=f"{name}: expected flags 0 and 1, got nan in row 3"):
        Episodes.from_ogbench(columns)


def test_what_is_unambiguous_is_converted() -> None:
    data = episodes()
    given = {n: getattr(data, n).numpy().astype(np.float64) for n in NUMBERS}
    given["rewards"] = given["rewards"][:, None]
    given["actions"] = given["actions"].astype(">f8")
    for flags in (data.ends.numpy(), data.ends.float(), data.ends.int()[:, None], data.ends.tolist()):
        converted = Episodes(**given, terminals=data.terminals.numpy().astype(float), ends=flags)
        assert converted.fingerprint() == data.fingerprint()
        assert converted.rewards.dtype == torch.float32
        assert converted.ends.dtype == torch.bool


@pytest.mark.parametrize(
    ("name", "column", "error", "message"),
    [
        ("rewards", torch.zeros(40, 2), ValueError, r"rewards: expected shape \(N,\), got \(40, 2\)"),
        ("actions", torch.zeros(40), ValueError, r"actions: expected shape \(N, size\), got \(40,\)"),
        ("next_observations", torch.zeros(40, 4), ValueError, r"next_observations: .*got \(40, 4\)"),
        ("observations", np.full((40, 3), "a"), TypeError, "observations: expected .* numbers, got ndarray"),
        ("actions", torch.zeros(40, 2).cfloat(), TypeError, "actions: expected real numbers"),
        ("rewards", np.full(40, 1e300), ValueError, "rewards: expected finite numbers, got inf in row 0"),
        ("terminals", torch.full((40,), 0.5), ValueError, r"terminals: expected flags 0 and 1, got 0\.5"),
        ("ends", torch.ones(40, 2), ValueError, r"ends: expected shape \(N,\), got \(40, 2\)"),
    ],
)
def test_the_rest_is_refused_by_name(name: str, column: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        replace(episodes(), **{name: column})


def test_trajectories_with_nan_are_refused() -> None:
    rows = torch.zeros(3, 1, 2), torch.tensor([0, 0, np.nan]), torch.ones(3, dtype=torch.int32)
    bad = Trajectory(torch.zeros(3, 2), *rows, terminal=True, truncated=False, closing=None)
    replay = Replay(Layout(observations=2, action_dim=2, horizon=1, need="next_state"))
    with pytest.raises(ValueError, match=r"trajectory 0, next\.reward: .*nan in row 2"):
        fill(replay, [bad])
    state = {"observation.state": torch.tensor([[np.nan, 0.0]])}
    transition = {"state": state, "next_state": state, "action": torch.zeros(1, 2)}
    transition |= {"reward": 0.0, "done": True, "truncated": False}
    with pytest.raises(ValueError, match=r"trajectory 0, observation\.state: .*nan in row 0, entry 0"):
        list(from_transitions([transition]))


@pytest.mark.parametrize("name", ["observation.state", "action", "next.reward"])
def test_a_lerobot_dataset_with_nan_is_refused(name: str) -> None:
    def frame(episode: int, k: int) -> dict[str, torch.Tensor]:
        numbers = {n: torch.tensor([1.0]) for n in ("observation.state", "action", "next.reward")}
        if (episode, k) == (1, 2):
            numbers[name] = torch.tensor([np.nan])
        return numbers | {"episode_index": torch.tensor(episode), "next.done": torch.tensor(k == 3)}

    class Frames(list):
        features = (name, "action", "next.reward", "next.done", "observation.state")

    frames = Frames(frame(e, k) for e in range(2) for k in range(4))
    with pytest.raises(ValueError, match=rf"episode 1, {name}: .*nan in row 2"):
        list(from_lerobot_dataset(frames))


def test_images_of_another_range_are_not_wrapped() -> None:
    image = {"observation.images.top": torch.full((1, 3, 2, 2), 200.0)}
    transition = {"state": image, "next_state": image, "action": torch.zeros(1, 2)}
    transition |= {"reward": 0.0, "done": True, "truncated": False}
    with pytest.raises(ValueError, match=r"images\.top: .*floats in \[0, 1\], got floats from 200"):
        list(from_transitions([transition]))


def test_batches_with_nan_are_refused(tmp_path: Path) -> None:
    values = torch.zeros(4, 2)
    values[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"batch 0: a: .*nan in row 2, entry 1"):
        record([{"a": values}], tmp_path)
    save_file({"a": values}, tmp_path / "0.safetensors")
    stored = SafetensorsBatches(tmp_path)
    assert torch.equal(stored.rows([0, 3])["a"], values[[0, 3]])
    with pytest.raises(ValueError, match=r"0\.safetensors, row 2: a: .*nan"):
        stored.rows([0, 2])
    frames = DatasetBatches([{"a": row} for row in values], lambda batch: batch, "me/data")
    with pytest.raises(ValueError, match=r"me/data, frames \[1, 2\]: a: .*nan in row 1"):
        frames.rows([1, 2])
    broken = DatasetBatches([{"a": torch.ones(1)}], lambda batch: {"a": batch["a"] / 0}, "me/data")
    with pytest.raises(ValueError, match=r"after the preprocessor: a: .*inf"):
        broken.rows([0])


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        ("uint8", torch.tensor(1300), False),
        ("uint8", torch.tensor(-1, dtype=torch.int8), False),
        ("uint8", torch.tensor(255), True),
        ("int32", torch.tensor(2**31), False),
        ("float16", torch.tensor(1e5), False),
        ("float32", torch.tensor(1e300, dtype=torch.float64), False),
        ("float32", torch.tensor(0.1, dtype=torch.float64), True),
    ],
)
def test_a_replay_column_takes_what_its_type_holds(dtype: str, value: torch.Tensor, fits: bool) -> None:
    replay = Replay(Layout(observations={"x": ((2,), dtype)}, action_dim=1, horizon=1, lanes=2))
    flags = torch.zeros(2, dtype=torch.bool)
    x = torch.zeros(2, 2, dtype=value.dtype)
    x[1, 1] = value
    row = Rows({"x": x}, torch.zeros(2, 1, 1), torch.zeros(2), flags, flags)
    if fits:
        replay.add(row)
        stored = torch.cat([t.observations["x"] for t in replay.trajectories()])
        assert torch.equal(stored, x.to(stored.dtype))
        return
    with pytest.raises(ValueError, match=rf"expected observations\.x from .*{dtype}.* in lane 1"):
        replay.add(row)
    assert len(replay) == 0

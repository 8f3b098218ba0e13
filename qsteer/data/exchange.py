"""Collected data in the formats of OGBench and LeRobot, and back.

Everything passes through :class:`~qsteer.data.Trajectory`: ``Replay.trajectories()`` gives them,
:func:`fill` puts them into a replay, and :func:`to_episodes` turns them into offline data, if observations
are states. OGBench's columns are read by ``Episodes.from_ogbench``, which also takes what ``numpy.load``
returns.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsteer.checks import check_finite
from qsteer.data.episodes import Episodes
from qsteer.data.layout import Rows, Trajectory
from qsteer.data.replay import Replay
from qsteer.types import Observation

STATE, IMAGE, ACTION = "observation.state", "observation.image", "action"
REWARD, DONE, TRUNCATED, SUCCESS = "next.reward", "next.done", "next.truncated", "next.success"
EXECUTED = "executed"


def fill(replay: Replay, trajectories: Iterable[Trajectory]) -> None:
    """Add trajectories to a replay of one lane, from the first row to the last.

    Raises:
        ValueError: the replay has more lanes, or rows of another shape, or a trajectory holds NaN or
            infinity.
    """
    if replay.layout.lanes != 1:
        raise ValueError(
            f"fill: expected a replay of 1 lane, got {replay.layout.lanes}; make one for the data"
        )
    for number, trajectory in enumerate(trajectories):
        _check_finite(f"trajectory {number}", trajectory)
        observations, closing = trajectory.observations, trajectory.closing
        if isinstance(replay.layout.observations, int):
            observations = _take_state(observations)
            closing = None if closing is None else _take_state(closing)
        last = len(trajectory) - 1
        for i in range(len(trajectory)):
            row = slice(i, i + 1)
            replay.add(
                Rows(
                    observations=_select(observations, row),
                    actions=trajectory.actions[row],
                    rewards=trajectory.rewards[row],
                    terminals=torch.tensor([trajectory.terminal and i == last]),
                    truncations=torch.tensor([trajectory.truncated and i == last]),
                    executed=trajectory.executed[row],
                    next_observations=closing if i == last else None,
                )
            )
        replay.cut()


def to_episodes(trajectories: Iterable[Trajectory]) -> Episodes:
    """Join trajectories of single steps and states to offline data.

    The last row of a trajectory that was cut is left out: the state after it is stored nowhere. After a
    terminal the last state is repeated where its own was not kept; nothing reads it.

    Raises:
        ValueError: there is none, rows have several steps, or observations are more than a state.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in Episodes.__dataclass_fields__}
    for trajectory in map(_drop_unseen_end, trajectories):
        if not (n := len(trajectory)):
            continue
        states = _take_state(trajectory.observations)
        if trajectory.actions.shape[1] != 1:
            raise ValueError(
                f"to_episodes: expected rows of 1 step, got {trajectory.actions.shape[1]}, between which "
                "nothing was observed; keep them in a Replay"
            )
        last = torch.arange(n, device=states.device) == n - 1
        columns["observations"].append(states)
        closing = None if trajectory.closing is None else _take_state(trajectory.closing)
        columns["next_observations"].append(_shift(states, closing))
        columns["actions"].append(trajectory.actions[:, 0])
        columns["rewards"].append(trajectory.rewards)
        columns["terminals"].append(last & trajectory.terminal)
        columns["ends"].append(last)
    if not columns["ends"]:
        raise ValueError("to_episodes: expected a trajectory with a whole step, got none; collect more")
    return Episodes(**{name: torch.cat(parts) for name, parts in columns.items()})


def to_ogbench(data: Episodes) -> dict[str, np.ndarray]:
    """Return float32 columns as :func:`qsteer.envs.ogbench.load` does: for ``numpy.savez`` and OGBench users.

    ``masks`` is 0 where the task is over, ``terminals`` 1 on a trajectory's last row.
    """
    columns = {
        "observations": data.observations,
        "actions": data.actions,
        "terminals": data.ends,
        "next_observations": data.next_observations,
        "rewards": data.rewards,
        "masks": ~data.terminals,
    }
    return {name: column.cpu().numpy().astype(np.float32) for name, column in columns.items()}


def to_transitions(trajectories: Iterable[Trajectory]) -> Iterator[dict[str, Any]]:
    """Give each row as lerobot's ``Transition``: ``ReplayBuffer.add(**transition)`` takes it.

    Tensors have a batch axis of 1, images are floats in [0, 1], ``action`` is (1, A), or (1, n, A) with n > 1
    steps a row and ``complementary_info["executed"]`` of them. ``done`` is a terminal, ``truncated`` any
    other end. Where the observation after the last row was not kept, that row is left out, or, at a terminal,
    followed by itself.
    """
    for trajectory in map(_drop_unseen_end, trajectories):
        states = {key: _to_floats(key, value) for key, value in _name(trajectory.observations).items()}
        closing = None if trajectory.closing is None else _name(trajectory.closing)
        after = {
            key: _shift(value, None if closing is None else _to_floats(key, closing[key]))
            for key, value in states.items()
        }
        single = trajectory.actions.shape[1] == 1
        for i in range(n := len(trajectory)):
            row, last = slice(i, i + 1), i == n - 1
            transition = {
                "state": {key: value[row] for key, value in states.items()},
                "action": trajectory.actions[row, 0] if single else trajectory.actions[row],
                "reward": float(trajectory.rewards[i]),
                "next_state": {key: value[row] for key, value in after.items()},
                "done": trajectory.terminal and last,
                "truncated": last and not trajectory.terminal,
            }
            if not single:
                transition["complementary_info"] = {EXECUTED: int(trajectory.executed[i])}
            yield transition


def from_transitions(transitions: Iterable[Mapping[str, Any]]) -> Iterator[Trajectory]:
    """Read what :func:`to_transitions` gives, or lerobot's actors collect; the inverse, with images as bytes.

    A trajectory ends where a transition is ``done`` or ``truncated``; the last one may do neither.

    Raises:
        KeyError: a transition lacks an entry.
        ValueError: one holds NaN or infinity, or an image neither bytes nor floats in [0, 1].
    """
    rows: list[Mapping[str, Any]] = []
    number = 0
    for transition in transitions:
        rows.append(transition)
        if transition["done"] or transition["truncated"]:
            yield _check_finite(f"trajectory {number}", _join_transitions(rows))
            rows, number = [], number + 1
    if rows:
        yield _check_finite(f"trajectory {number}", _join_transitions(rows))


def to_lerobot_dataset(
    trajectories: Iterable[Trajectory],
    repo_id: str,
    root: str | Path,
    fps: int,
    *,
    task: str = "",
    videos: bool = False,
) -> Any:
    """Write trajectories as the episodes of a new LeRobotDataset, one frame a row.

    A frame has the observation, ``action`` (A,), or (n, A) with n > 1 steps a row and ``executed`` of them,
    and ``next.reward``, ``next.done``, ``next.truncated``, ``next.success``. Terminals count as successes.
    The observation after the last row is a frame too, whose other columns are those of the row before, as in
    lerobot's own recordings of rollouts; so two frames at the end are ``next.done``.

    Args:
        trajectories: what to write, with observations named as LeRobot does; a single tensor becomes
            ``observation.state``.
        repo_id: name of the dataset.
        root: directory, which must not exist.
        fps: rows per second.
        task: its description, in words.
        videos: store images as videos, which are small and lossy, instead of as PNG.

    Raises:
        ModuleNotFoundError: lerobot is there without its dataset dependencies.
        ValueError: there is nothing to write.
    """
    create = _import_datasets().LeRobotDataset.create
    dataset = None
    for trajectory in trajectories:
        seen = _name(trajectory.observations)
        closing = None if trajectory.closing is None else _name(trajectory.closing)
        n = trajectory.actions.shape[1]
        actions = trajectory.actions[:, 0] if n == 1 else trajectory.actions
        if dataset is None:
            features = {key: _describe_feature(key, value, videos) for key, value in seen.items()}
            features[ACTION] = {"dtype": "float32", "shape": tuple(actions.shape[1:]), "names": None}
            features[REWARD] = {"dtype": "float32", "shape": (1,), "names": None}
            features |= {
                k: {"dtype": "bool", "shape": (1,), "names": None} for k in (DONE, TRUNCATED, SUCCESS)
            }
            if n > 1:
                features[EXECUTED] = {"dtype": "int64", "shape": (1,), "names": None}
            dataset = create(repo_id, fps, features, root, use_videos=videos)
        last = len(trajectory) - 1
        for i in range(len(trajectory) + (closing is not None)):
            row = min(i, last)
            source = seen if i <= last or closing is None else closing
            frame: dict[str, Any] = {
                key: value[row if i <= last else 0].cpu().numpy() for key, value in source.items()
            }
            frame[ACTION] = actions[row].cpu().numpy()
            frame[REWARD] = trajectory.rewards[row, None].cpu().numpy()
            over, timed_out = (row == last and end for end in (trajectory.terminal, trajectory.truncated))
            frame |= {DONE: np.array([over or timed_out]), TRUNCATED: np.array([timed_out])}
            frame |= {SUCCESS: np.array([over]), "task": task}
            if n > 1:
                frame[EXECUTED] = np.array([int(trajectory.executed[row])])
            dataset.add_frame(frame)
        dataset.save_episode()
    if dataset is None:
        raise ValueError("to_lerobot_dataset: expected a trajectory, got none; collect something first")
    dataset.finalize()
    return dataset


def from_lerobot_dataset(dataset: Any) -> Iterator[Trajectory]:
    """Read a LeRobotDataset with rewards, frame by frame, images as bytes.

    An episode's last row is terminal where ``next.done`` is set and not ``next.truncated`` (without that
    column: and ``next.success``, where there is one), else truncated, unless the columns say that it was
    neither. A second ``next.done`` frame holds the observation after the last row.

    Raises:
        KeyError: there is no ``next.reward`` or no ``next.done``: the data is for imitation only.
        ValueError: a column holds NaN or infinity, or an image neither bytes nor floats in [0, 1].
    """
    features = dataset.features
    if missing := [key for key in (ACTION, REWARD, DONE) if key not in features]:
        raise KeyError(
            f"from_lerobot_dataset: expected {REWARD} and {DONE}, got no {missing}; relabel the data"
        )
    keys = [key for key in features if key.startswith("observation.")]
    yield from read_trajectories((dataset[i] for i in range(len(dataset))), keys)


def read_trajectories(rows: Iterable[Mapping[str, Any]], keys: list[str]) -> Iterator[Trajectory]:
    """Join a dataset's frames, one after another, to the trajectories of its episodes.

    Args:
        rows: frames with ``keys``, action, reward, end and ``episode_index``.
        keys: of the observations.

    Raises:
        ValueError: as :func:`from_lerobot_dataset`.
    """
    frames: list[Mapping[str, Any]] = []
    for frame in rows:
        if frames and frame["episode_index"] != frames[-1]["episode_index"]:
            yield _check_finite(_name_episode(frames), _read_episode(frames, keys))
            frames = []
        frames.append(frame)
    if frames:
        yield _check_finite(_name_episode(frames), _read_episode(frames, keys))


def _read_episode(frames: list[Mapping[str, Any]], keys: list[str]) -> Trajectory:
    """Return the trajectory of an episode's frames."""
    done = [bool(frame[DONE]) for frame in frames]
    seen = {key: torch.stack([_to_bytes(key, frame[key]) for frame in frames]) for key in keys}
    closing = None
    if done[-2:] == [True, True]:
        closing = {key: value[-1:] for key, value in seen.items()}
        seen, frames = {key: value[:-1] for key, value in seen.items()}, frames[:-1]
    final = frames[-1]
    over = done[-1] and bool(final.get(SUCCESS, True))
    truncated = not over
    if TRUNCATED in final:
        truncated = bool(final[TRUNCATED])
        over = done[-1] and not truncated
    actions = torch.stack([frame[ACTION] for frame in frames]).float()
    actions = actions if actions.ndim == 3 else actions[:, None]
    executed = [int(frame.get(EXECUTED, actions.shape[1])) for frame in frames]
    rewards = torch.tensor([float(frame[REWARD]) for frame in frames])
    return Trajectory(
        seen, actions, rewards, torch.tensor(executed, dtype=torch.int32), over, truncated, closing
    )


def _join_transitions(rows: list[Mapping[str, Any]]) -> Trajectory:
    """Return the trajectory of consecutive transitions."""
    actions = torch.cat([torch.as_tensor(row["action"]) for row in rows]).float()
    actions = actions if actions.ndim == 3 else actions[:, None]
    steps = actions.shape[1]
    executed = [int((row.get("complementary_info") or {}).get(EXECUTED, steps)) for row in rows]
    final = rows[-1]
    return Trajectory(
        observations={k: torch.cat([_to_bytes(k, row["state"][k]) for row in rows]) for k in final["state"]},
        actions=actions,
        rewards=torch.tensor([float(row["reward"]) for row in rows]),
        executed=torch.tensor(executed, dtype=torch.int32),
        terminal=bool(final["done"]),
        truncated=bool(final["truncated"] and not final["done"]),
        closing={key: _to_bytes(key, value) for key, value in final["next_state"].items()},
    )


def _name_episode(frames: list[Mapping[str, Any]]) -> str:
    return f"episode {int(frames[0]['episode_index'])}"


def _check_finite(where: str, trajectory: Trajectory) -> Trajectory:
    """Return a trajectory, after a check that all that is read of it is finite."""
    remedy = "leave the trajectory out, or repair it"
    step = torch.arange(trajectory.actions.shape[1], device=trajectory.actions.device)
    unused = step >= trajectory.executed.to(step.device)[:, None]
    actions = trajectory.actions.masked_fill(unused[..., None], 0)
    check_finite(f"{where}, {ACTION}", actions, remedy)
    check_finite(f"{where}, {REWARD}", trajectory.rewards, remedy)
    for label, seen in (("", trajectory.observations), (" after the last row", trajectory.closing)):
        for key, value in {} if seen is None else _name(seen).items():
            check_finite(f"{where}, {key}{label}", value, remedy)
    return trajectory


def _drop_unseen_end(trajectory: Trajectory) -> Trajectory:
    """Leave out a last row whose next observation was not kept, unless the task was over."""
    if trajectory.terminal or trajectory.closing is not None:
        return trajectory
    return Trajectory(
        observations=_select(trajectory.observations, slice(-1)),
        actions=trajectory.actions[:-1],
        rewards=trajectory.rewards[:-1],
        executed=trajectory.executed[:-1],
        terminal=False,
        truncated=False,
        closing=_select(trajectory.observations, slice(-1, None)),
    )


def _shift(values: Tensor, closing: Tensor | None) -> Tensor:
    return torch.cat([values[1:], values[-1:] if closing is None else closing])


def _select(observations: Observation, rows: slice) -> Observation:
    if isinstance(observations, Tensor):
        return observations[rows]
    return {key: value[rows] for key, value in observations.items()}


def _name(observations: Observation) -> Mapping[str, Tensor]:
    return {STATE: observations} if isinstance(observations, Tensor) else observations


def _take_state(observations: Observation) -> Tensor:
    seen = _name(observations)
    if set(seen) != {STATE}:
        raise ValueError(
            f"expected {STATE} alone, got {sorted(seen)}; keep them in a Replay that has these columns"
        )
    return seen[STATE]


def _to_floats(key: str, value: Tensor) -> Tensor:
    return value.float() / 255 if key.startswith(IMAGE) and value.dtype == torch.uint8 else value


def _to_bytes(key: str, value: Tensor) -> Tensor:
    if not (key.startswith(IMAGE) and value.is_floating_point()):
        return value
    check_finite(key, value[None], "leave the image out")
    scaled = (value * 255).round()
    if scaled.numel() and (scaled.min() < 0 or scaled.max() > 255):
        raise ValueError(
            f"{key}: expected images as bytes or as floats in [0, 1], got floats from {value.min():.3g} to "
            f"{value.max():.3g}; convert them: image.to(torch.uint8), or image / 255"
        )
    return scaled.to(torch.uint8)


def _describe_feature(key: str, value: Tensor, videos: bool) -> dict[str, Any]:
    shape, dtype = tuple(value.shape[1:]), str(value.dtype).removeprefix("torch.")
    if key.startswith(IMAGE):
        return {
            "dtype": "video" if videos else "image",
            "shape": shape,
            "names": ["channels", "height", "width"],
        }
    return {"dtype": dtype, "shape": shape, "names": None}


def _import_datasets() -> Any:
    try:
        import lerobot.datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f'expected LeRobotDataset, got {error}: pip install "lerobot[dataset]"'
        ) from error
    return lerobot.datasets

"""A LeRobotDataset as a lerobot policy's critic sees it: model space, rewards, views and features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate

from qsteer.adapters import host_of
from qsteer.adapters.files import load_base
from qsteer.checks import check_finite
from qsteer.critics.encoders import FEATURES, pooled, to_unit_view
from qsteer.data.episodes import Episodes
from qsteer.data.exchange import (
    ACTION,
    DONE,
    REWARD,
    STATE,
    SUCCESS,
    TRUNCATED,
    read_trajectories,
    to_episodes,
)
from qsteer.data.layout import Trajectory
from qsteer.steering.opening import open_action

type Rewards = Literal["dataset", "sparse"]

BLOCK = 64
"""Frames that go through preprocessor and policy at once."""
RELATIVE = "RelativeActionsProcessorStep"
"""lerobot's step after which an action depends on the state in which its chunk began."""


def open_dataset(dataset: str | Path) -> Any:
    """Open a LeRobotDataset of the hub, or of a folder.

    Raises:
        ModuleNotFoundError: lerobot is there without its dataset dependencies.
        FileNotFoundError: it is a path, and no dataset is there.
    """
    try:
        from lerobot.datasets import LeRobotDataset
    except ImportError as error:
        raise ModuleNotFoundError(
            f'expected LeRobotDataset, got {error}: pip install "lerobot[dataset]"'
        ) from error
    folder = Path(dataset)
    if (folder / "meta" / "info.json").is_file():
        return LeRobotDataset(folder.name, root=folder.resolve())
    if folder.is_dir() or folder.is_absolute() or str(dataset).startswith("."):
        raise FileNotFoundError(
            f"{dataset}: expected a LeRobotDataset with meta/info.json, got none; give its folder, or its "
            "name on the hub"
        )
    try:
        return LeRobotDataset(str(dataset))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{dataset}: expected a LeRobotDataset on the hub or in lerobot's cache, got {error}"
        ) from error


def open_policy(checkpoint: str | Path, device: torch.device | str = "cpu") -> tuple[Any, Any, Any]:
    """Load a lerobot policy, frozen, and its own pre- and post-processor.

    Raises:
        FileNotFoundError: the folder holds no policy.
        TypeError: no Host record describes the policy.
    """
    from huggingface_hub import snapshot_download
    from lerobot.policies.factory import make_pre_post_processors

    folder = Path(checkpoint)
    if not folder.is_dir() and not folder.is_absolute():
        try:
            folder = Path(snapshot_download(str(checkpoint)))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{checkpoint}: expected a lerobot policy on the hub or in its cache, got {error}"
            ) from error
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{checkpoint}: expected a lerobot policy with config.json, got none; give the folder "
            "pretrained_model of its checkpoint, or its name on the hub"
        )
    policy = load_base({"path": str(folder), "revision": None}, str(device))
    host_of(policy)
    there = {"device_processor": {"device": str(device)}}
    before, after = make_pre_post_processors(policy.config, str(folder), preprocessor_overrides=there)
    return policy.to(device).requires_grad_(False).eval(), before, after


@dataclass(frozen=True)
class Seen:
    """The frames of a LeRobotDataset as a critic of a policy sees them, one after another.

    The policy's own preprocessor makes states and actions; what the critic does not see is not decoded. Where
    the dataset has no rewards, or with ``rewards="sparse"``, each step costs 1 until the episode succeeds:
    the reward is -1, and 0 on the last frame of a success, which is terminal; an episode that fails ends as
    at a time limit. An episode succeeds if ``next.success`` says so in any of its frames; without that
    column, unless it is one of ``failures``.

    Cost of a pass: decoding, the preprocessor, and for features the policy's prefix of each frame.

    Attributes:
        dataset: a LeRobotDataset, of single frames.
        policy: a lerobot policy.
        preprocessor: its own.
        state: key of the state.
        views: keys of the images that the critic sees, stored as bytes.
        view_size: edge to which they are resized.
        features: add the policy's pooled features of each frame.
        rewards: the dataset's own, or relabelled; None: the former where it has both rewards and ends.
        failures: numbers of the episodes that failed, where no column says so.

    Raises:
        KeyError: the dataset or the preprocessor lacks a column.
        ValueError: actions cannot be normalised frame by frame, or ``failures`` contradict the dataset.
    """

    dataset: Any
    policy: Any
    preprocessor: Any
    state: str = "observation.state"
    views: Sequence[str] = ()
    view_size: int = 64
    features: bool = False
    rewards: Rewards | None = None
    failures: Sequence[int] = ()
    _labels: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the columns, and find out each frame's reward and end."""
        given = self.dataset.features
        own = (REWARD, DONE) if self.rewards == "dataset" else ()
        needed = (ACTION, self.state, *self.views, *own)
        if missing := [key for key in needed if key not in given]:
            raise KeyError(
                f"dataset: expected columns {list(needed)}, got no {missing} among {sorted(given)}; rename "
                "them, name other views, or relabel the rewards as 'sparse'"
            )
        if self.rewards is None and REWARD in given and DONE not in given:
            raise KeyError(
                f"dataset: expected {DONE} beside {REWARD}, got none; relabel the data with rewards='sparse'"
            )
        steps = getattr(self.preprocessor, "steps", ())
        relative = any(type(step).__name__ == RELATIVE and step.enabled for step in steps)
        if relative or getattr(self.policy.config, "adapt_to_pi_aloha", False):
            raise ValueError(
                "policy: expected actions that are normalised frame by frame, got "
                + ("relative actions" if relative else "adapt_to_pi_aloha=True")
                + ", which depend on where the chunk began; take a policy of absolute actions"
            )
        self._labels.update(self._label())

    @property
    def relabelled(self) -> bool:
        """Whether the rewards are not the dataset's own."""
        own = REWARD in self.dataset.features and DONE in self.dataset.features
        return self.rewards == "sparse" or (self.rewards is None and not own)

    @property
    def keys(self) -> list[str]:
        """Keys of the observations that the critic sees."""
        return [self.state, *self.views, *([FEATURES] if self.features else [])]

    @property
    def tasks(self) -> list[str]:
        """The instructions that occur."""
        numbers = sorted(set(self._read("task_index").tolist()))
        return [str(self.dataset.meta.tasks.iloc[i].name) for i in numbers]

    def describe(self) -> dict[str, Any]:
        """Return what the trajectories depend on, as JSON holds it."""
        path = getattr(self.policy.config, "pretrained_path", None)
        weights = None if path is None else Path(path) / "model.safetensors"
        return {
            "dataset": [self.dataset.repo_id, self.dataset.revision, len(self)],
            "inputs": self.keys,
            "view_size": self.view_size,
            "rewards": "sparse" if self.relabelled else "dataset",
            "failures": sorted(self.failures),
            "policy": str(path),
            "weights_changed": weights.stat().st_mtime_ns if weights and weights.is_file() else None,
        }

    def lengths(self) -> list[int]:
        """Return the number of frames of each episode, in their order."""
        episode = self._read("episode_index")
        return torch.unique_consecutive(episode, return_counts=True)[1].tolist()

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.dataset)

    def trajectories(self) -> Iterator[Trajectory]:
        """Give the episodes, actions in model space.

        Raises:
            ValueError: a column holds NaN or infinity.
        """
        return read_trajectories(self._frames(), self.keys)

    def episodes(self, which: Sequence[bool]) -> Episodes:
        """Return some of the episodes, whose observations are the numbers (N, 1) of their frames.

        Raises:
            ValueError: none of them is whole, or as :meth:`trajectories`.
        """
        numbered = (
            frame | {STATE: torch.tensor([float(number)])} for number, frame in enumerate(self._frames())
        )
        found = read_trajectories(numbered, [STATE])
        return to_episodes(trajectory for trajectory, kept in zip(found, which, strict=True) if kept)

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return these frames as the policy gets them."""
        batch = self.preprocessor(default_collate([self.dataset[i] for i in numbers]))
        return {key: v for key, v in batch.items() if key != ACTION and not key.startswith("next.")}

    def _frames(self) -> Iterator[dict[str, Any]]:
        whole = bool(self.views) or self.features
        rows = self.dataset
        if not whole:  # pictures are not decoded
            cameras = set(self.dataset.meta.camera_keys) & set(rows.hf_dataset.column_names)
            rows = rows.hf_dataset.remove_columns(sorted(cameras))
        for start in range(0, len(self), BLOCK):
            numbers = range(start, min(start + BLOCK, len(self)))
            frames = [dict(rows[i]) for i in numbers]
            if not whole:
                for frame in frames:
                    frame["task"] = self.dataset.meta.tasks.iloc[int(frame["task_index"])].name
            yield from self._block(frames, numbers)

    @torch.no_grad()
    def _block(self, frames: list[dict[str, Any]], numbers: range) -> Iterator[dict[str, Any]]:
        """Return these frames as the critic sees them."""
        where = f"frames {numbers[0]} to {numbers[-1]}"
        seen = default_collate(frames)
        batch = self.preprocessor(dict(seen))
        found = {ACTION: batch[ACTION], self.state: batch[self.state]}
        for key, value in found.items():
            if value.ndim != 2 or len(value) != len(frames):
                raise ValueError(
                    f"dataset, {key}: expected a vector for each frame, got {tuple(value.shape)} of "
                    f"{len(frames)} frames; open the dataset without delta_timestamps"
                )
        for key in self.views:
            unit = to_unit_view(batch[key], self.view_size, batch[key].new_zeros((), dtype=torch.float32))
            check_finite(f"dataset, {where}: {key}", unit, "leave the episode out")
            found[key] = (unit.clamp(0, 1) * 255).round().to(torch.uint8)
        if self.features:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                field = open_action(self.policy, batch).field
            found[FEATURES] = pooled(field.features).float()
        found = {key: value.cpu() for key, value in found.items()}
        for i, number in enumerate(numbers):
            own = {key: value[i] for key, value in found.items()}
            labels = {key: column[number] for key, column in self._labels.items()}
            yield own | labels | {"episode_index": frames[i]["episode_index"]}

    def _read(self, key: str) -> Tensor:
        """Return a column of numbers, one for each frame."""
        column = self.dataset.hf_dataset.with_format("numpy")[key]
        return torch.as_tensor(column[:]).reshape(len(self))

    def _label(self) -> dict[str, Tensor]:
        """Return reward, end, success and truncation of each frame, those of these that are known."""
        given = {
            key: self._read(key) for key in (REWARD, DONE, SUCCESS, TRUNCATED) if key in self.dataset.features
        }
        if (SUCCESS in given or not self.relabelled) and self.failures:
            raise ValueError(
                f"failures: expected none, for the dataset says itself how episodes end, got "
                f"{list(self.failures)}; leave them out"
            )
        if not self.relabelled:
            return given
        episode = self._read("episode_index")
        if unknown := sorted(set(self.failures) - set(episode.tolist())):
            raise ValueError(f"failures: expected numbers of episodes, got {unknown}; see episode_index")
        last = torch.ones(len(episode), dtype=torch.bool)
        last[:-1] = episode[1:] != episode[:-1]
        done = given[DONE].bool() | last if DONE in given else last
        if SUCCESS in given:
            so_far = torch.zeros(len(episode), dtype=torch.bool)
            for number in episode.unique():
                rows = episode == number
                so_far[rows] = given[SUCCESS][rows].bool().cummax(0).values
        else:
            so_far = done & ~torch.isin(episode, torch.tensor(list(self.failures), dtype=episode.dtype))
        succeeded = torch.isin(episode, episode[so_far])
        return {REWARD: so_far.float() - 1, DONE: done, TRUNCATED: ~succeeded}

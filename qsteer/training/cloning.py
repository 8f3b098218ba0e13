"""Behaviour cloning of a lerobot policy by its own loss, on a LeRobotDataset held in memory.

lerobot's own training reads each frame from the disk: right for videos and a GPU, slow for small policies on
a CPU. The result is a checkpoint of lerobot's, with the policy's processors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, override

import torch
from torch import Tensor
from tqdm import tqdm

from qsteer.fingerprints import tensor_bytes
from qsteer.training.loop import Learner, Training, fit

ACTION, PADDED = "action", "action_is_pad"


@dataclass(frozen=True, kw_only=True)
class CloningTraining(Training):
    """How to clone with a lerobot policy.

    Attributes:
        half: compute in bfloat16 where autocast does: twice as fast on a CPU that knows it.
    """

    steps: int = 10_000
    batch_size: int = 128
    learning_rate: float = 7e-4
    warmup: int = 200
    half: bool = False


@dataclass(frozen=True)
class Frames:
    """The frames of a LeRobotDataset in memory, and the chunks that begin in them.

    Cost: bytes of the pictures (N, 3, h, w) and of the numbers.

    Attributes:
        columns: observations of each frame, pictures as bytes.
        actions: of each frame (N, A).
        tasks: the instruction of each frame.
        last: number of the last frame of each frame's episode.
    """

    columns: Mapping[str, Tensor]
    actions: Tensor
    tasks: Sequence[str]
    last: Tensor

    @classmethod
    def read(cls, dataset: Any, keys: Sequence[str], *, progress: bool = True) -> "Frames":
        """Read the observations of some keys, and the actions.

        Raises:
            KeyError: the dataset lacks a column.
        """
        if missing := [key for key in (*keys, ACTION) if key not in dataset.features]:
            raise KeyError(
                f"dataset: expected columns {[*keys, ACTION]}, got no {missing} among "
                f"{sorted(dataset.features)}; rename them"
            )
        rows = dataset.hf_dataset.with_format("numpy")
        pictures = [key for key in keys if key in dataset.meta.camera_keys]
        columns: dict[str, Tensor] = {
            key: torch.as_tensor(rows[key][:]).float() for key in keys if key not in pictures
        }
        for key in pictures:
            height, width, channels = dataset.features[key]["shape"]
            shown = torch.empty(len(dataset), channels, height, width, dtype=torch.uint8)
            for i in tqdm(range(len(dataset)), f"decoding {key}", mininterval=1.0, disable=not progress):
                shown[i] = (dataset[i][key] * 255).round().to(torch.uint8)
            columns[key] = shown
        episode = torch.as_tensor(rows["episode_index"][:])
        ends = torch.cat([(episode[1:] != episode[:-1]).nonzero()[:, 0], torch.tensor([len(episode) - 1])])
        names = list(dataset.meta.tasks.sort_values("task_index").index)
        return cls(
            columns,
            torch.as_tensor(rows[ACTION][:]).float(),
            [names[i] for i in rows["task_index"][:].tolist()],
            ends[torch.searchsorted(ends, torch.arange(len(episode)))],
        )

    def batch(self, starts: Tensor, length: int) -> dict[str, Any]:
        """Return observations and chunks (B, T, A) from these frames on, as lerobot's loader does."""
        steps = starts[:, None] + torch.arange(length)
        last = self.last[starts, None]
        seen = {key: column[starts] for key, column in self.columns.items()}
        pictures = {key: v.float() / 255 for key, v in seen.items() if v.dtype == torch.uint8}
        return {
            **(seen | pictures),
            ACTION: self.actions[steps.minimum(last)],
            PADDED: steps > last,
            "task": [self.tasks[i] for i in starts.tolist()],
        }

    def fingerprint(self) -> str:
        """Return a digest of all of it."""
        digest = sha256(repr(sorted(set(self.tasks))).encode())
        for column in (*self.columns.values(), self.actions, self.last):
            digest.update(tensor_bytes(column))
        return digest.hexdigest()[:16]


class Cloning(Learner):
    """The policy's own loss, on chunks that begin anywhere. Noise and times come from torch's generator."""

    def __init__(self, policy: Any, preprocessor: Any, frames: Frames, settings: CloningTraining) -> None:
        """Learn ``policy`` from ``frames``."""
        super().__init__()
        self.policy, self.settings = policy, settings
        self.given = preprocessor, frames

    @override
    def sample(self, generator: torch.Generator) -> dict[str, Any]:
        preprocessor, frames = self.given
        starts = torch.randint(len(frames.last), (self.settings.batch_size,), generator=generator)
        return preprocessor(frames.batch(starts, self.policy.config.chunk_size))

    @override
    def batch_loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.policy.config.device, torch.bfloat16, enabled=self.settings.half):
            loss, _ = self.policy.forward(batch)
        return loss, {}


def clone(
    dataset: Any,
    policy: Any,
    processors: tuple[Any, Any],
    out: str | Path,
    training: CloningTraining | None = None,
    *,
    progress: bool = True,
) -> Any:
    """Train a lerobot policy on a LeRobotDataset; lerobot's ``from_pretrained`` reads the result in ``out``.

    A run that was interrupted goes on from its last checkpoint.

    Args:
        dataset: a LeRobotDataset with what the policy sees.
        policy: a lerobot policy with fresh weights, on the CPU.
        processors: its own, with the dataset's statistics.
        out: run directory.
        training: how to train.
        progress: show progress bars.

    Raises:
        KeyError: the dataset lacks what the policy sees.
        ValueError: ``out`` holds another run.
    """
    out, training = Path(out), training or CloningTraining()
    frames = Frames.read(dataset, list(policy.config.input_features), progress=progress)
    policy.train()
    learner = Cloning(policy, processors[0], frames, training)
    identity = training.describe() | {"data": frames.fingerprint(), "policy": type(policy).__name__}
    fit(learner, out, training, identity, progress=progress)
    policy.requires_grad_(False).eval().save_pretrained(out)
    for processor in processors:
        processor.save_pretrained(out)
    policy.config.pretrained_path = out
    return policy

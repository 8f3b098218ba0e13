"""A pretrained policy's own batches, drawn by number: from files on disk, or from a LeRobotDataset."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from qsteer.checks import check_finite
from qsteer.fingerprints import tensor_bytes

REMEDY = "leave the row out, or repair it"


@runtime_checkable
class Batches(Protocol):
    """A host's own batches, as its preprocessor returns them, drawn by number."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def rows(self, numbers: list[int]) -> dict[str, Any]:
        """Return these rows as one batch."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content."""
        ...


class SafetensorsBatches:
    """Rows of the ``*.safetensors`` files in a directory, memory-mapped; :func:`record` writes such files.

    Each file holds the flat keys of a host's batch, after its preprocessor, every tensor with one leading row
    per observation. Rows of different length (language tokens, their mask) are padded with zeros at the end.

    Raises:
        FileNotFoundError: the directory has no such file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.paths = sorted(Path(directory).glob("*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(
                f"{directory}: expected *.safetensors files, got none; write them with "
                "qsteer.data.record(batches, directory)"
            )
        self.lengths: list[int] = []
        for path in self.paths:
            with safe_open(path, "pt") as file:
                counts = {file.get_slice(key).get_shape()[0] for key in file.keys()}
            if len(counts) != 1:
                raise ValueError(f"{path}: expected the same number of rows under every key, got {counts}")
            self.lengths += counts
        self.ends = list(accumulate(self.lengths))

    def __len__(self) -> int:
        """Return the number of rows in all files."""
        return self.ends[-1]

    def rows(self, numbers: list[int]) -> dict[str, Tensor]:
        """Read these rows and nothing else.

        Raises:
            ValueError: one holds NaN or infinity.
        """
        found: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            files: dict[int, Any] = {}
            for number in numbers:
                i = bisect_right(self.ends, number)
                if i not in files:
                    files[i] = stack.enter_context(safe_open(self.paths[i], "pt"))
                row = number - self.ends[i] + self.lengths[i]
                for key in files[i].keys():
                    value = files[i].get_slice(key)[row : row + 1][0]
                    check_finite(f"{self.paths[i]}, row {row}: {key}", value[None], REMEDY)
                    found.setdefault(key, []).append(value)
        return {key: _stack_padded(rows) for key, rows in found.items()}

    def fingerprint(self) -> str:
        """Return a hash of names, shapes and each file's first row."""
        digest = sha256()
        for path, end, length in zip(self.paths, self.ends, self.lengths, strict=True):
            digest.update(f"{path.name} {length}".encode())
            for key, tensor in sorted(self.rows([end - length]).items()):
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


@dataclass(frozen=True)
class DatasetBatches:
    """Frames of a map-style dataset such as ``lerobot.datasets.LeRobotDataset``, through a preprocessor.

    Frames are decoded in the training process: to use them more than once, :func:`record` them first.

    Attributes:
        dataset: ``dataset[i]`` is a frame, a flat dict; actions are chunks (H, A).
        preprocessor: the policy's own, which turns collated frames into the batch that the policy takes.
        name: of the dataset and its revision, for the fingerprint.
    """

    dataset: Any
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]
    name: str

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.dataset)

    def rows(self, numbers: list[int]) -> dict[str, Any]:
        """Decode, collate and preprocess these frames.

        Raises:
            ValueError: a frame holds NaN or infinity, or does so when it is preprocessed.
        """
        frames = default_collate([self.dataset[i] for i in numbers])
        _check_batch(f"{self.name}, frames {numbers}", frames)
        batch = self.preprocessor(frames)
        _check_batch(f"{self.name}, frames {numbers} after the preprocessor", batch)
        return batch

    def fingerprint(self) -> str:
        """Return name and length: the frames are not read."""
        return f"{self.name} {len(self)}"


def lerobot_batches(
    policy: Any, repo_id: str, *, root: str | Path | None = None, checkpoint: str | Path | None = None
) -> DatasetBatches:
    """Open a LeRobotDataset as a policy's training does: action chunks, the policy's own preprocessor.

    Args:
        policy: a lerobot policy.
        repo_id: of the dataset.
        root: its local directory.
        checkpoint: name or directory of the policy, whose stored preprocessor (with the normalisation which
            it was trained with) is used; None: one made from the dataset's statistics.

    Raises:
        ImportError: lerobot is there without its dataset dependencies (``pip install "lerobot[dataset]"``).
    """
    from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata, resolve_delta_timestamps
    from lerobot.policies.factory import make_pre_post_processors

    meta = LeRobotDatasetMetadata(repo_id, root=root)
    dataset = LeRobotDataset(
        repo_id, root=root, delta_timestamps=resolve_delta_timestamps(policy.config, meta)
    )
    if checkpoint is None:
        preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=meta.stats)
    else:
        device = {"device_processor": {"device": next(policy.parameters()).device.type}}
        preprocessor, _ = make_pre_post_processors(
            policy.config, str(checkpoint), preprocessor_overrides=device
        )
    return DatasetBatches(dataset, preprocessor, f"{repo_id}@{meta.revision}")


def record(batches: Iterable[Mapping[str, Any]], directory: str | Path) -> None:
    """Write each batch as a file that :class:`SafetensorsBatches` reads; only tensors are written.

    Raises:
        ValueError: one holds NaN or infinity; the batches before it are written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for i, batch in enumerate(batches):
        path = directory / f"{i:06d}.safetensors"
        tensors = {k: v.detach().cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
        _check_batch(f"record, batch {i}", tensors)
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def _check_batch(where: str, batch: Mapping[str, Any]) -> None:
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.ndim and value.is_floating_point():
            check_finite(f"{where}: {key}", value, REMEDY)


def _stack_padded(rows: list[Tensor]) -> Tensor:
    """Stack rows, those of different length padded with zeros at the end."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(rows)
    return pad_sequence(rows, batch_first=True)

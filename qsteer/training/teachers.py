"""Frozen policies to distil from: a small state policy, or a pretrained vision-language-action model."""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from qsteer.data.episodes import Chunks
from qsteer.flow import read_features
from qsteer.policies import FlowPolicy
from qsteer.samplers import Euler
from qsteer.steering.opening import open_action
from qsteer.training.loop import WHOLE, Share
from qsteer.types import Field

ACTION = "action"


class Sizes(NamedTuple):
    """What a map must have of its teacher: the first four arguments of a :class:`~qsteer.maps.MapConfig`."""

    horizon: int
    action_dim: int
    features: int
    network: Literal["mlp", "transformer"]


class Teacher(ABC):
    """A frozen policy together with observations to ask it about."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the policy is; generators must be there too."""

    @abstractmethod
    def batch(
        self, size: int, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Field, Float[Tensor, "B H A"]]:
        """Draw ``size`` observations; return the policy's field for those of ``share`` and clean actions.

        The observations are encoded once. ``generator`` is used as if all ``size`` were wanted.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of policy and data: a resumed run must see the teacher that it started with."""

    def sizes(self) -> Sizes:
        """Return the sizes of a map of this policy: ``MetaMapConfig(*teacher.sizes(), width=512)``."""
        field, x1 = self.batch(1, torch.Generator(self.device).manual_seed(0))
        features = read_features(field)
        tokens = not isinstance(features, Tensor)
        width = (features[0] if tokens else features).shape[-1]
        return Sizes(x1.shape[1], x1.shape[2], width, "transformer" if tokens else "mlp")


@dataclass(frozen=True)
class StateTeacher(Teacher):
    """A small state policy on the data that it was cloned from.

    Attributes:
        policy: the frozen policy.
        chunks: the data.
    """

    policy: FlowPolicy
    chunks: Chunks

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.chunks.starts.device

    def batch(
        self, size: int, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Field, Float[Tensor, "B H A"]]:
        """Draw stored observations and the chunks which followed them."""
        batch = self.chunks.sample(size, generator)
        return self.policy.field(share.of(batch.observations)), share.of(batch.actions)

    def fingerprint(self) -> str:
        """Return a hash of policy and data."""
        return _digest(self.policy, self.chunks.episodes.fingerprint())


@runtime_checkable
class Batches(Protocol):
    """A host's own batches, as its preprocessor leaves them, drawn by number."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def rows(self, numbers: list[int]) -> dict[str, Any]:
        """Return these rows as one batch."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content."""
        ...


@dataclass(frozen=True)
class HostTeacher(Teacher):
    """A pretrained lerobot policy (pi0, pi0.5, SmolVLA) on batches of its own kind.

    Observations are encoded by the host's code, once per batch; the map is conditioned on what it made of
    them (:attr:`~qsteer.hosts.Host.features`). The policy is left as it was.

    Clean actions decide where the policy is asked. By default the policy draws them: the states ``x_t`` are
    then those which it passes through when it acts, in padded dimensions too, and the posterior is that of
    its own law, whatever the data. ``"data"`` takes the stored chunks, normalised and padded as for the
    host's training: right for data which the policy was trained on, and cheaper.

    Cost per batch: one prefix, and with ``"policy"`` the host's own number of velocity forwards.

    Attributes:
        policy: the frozen policy.
        batches: what to ask it about.
        actions: where clean actions come from.
    """

    policy: Any
    batches: Batches
    actions: Literal["policy", "data"] = "policy"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.actions not in ("policy", "data"):
            raise ValueError(f"actions: expected 'policy' or 'data', got {self.actions!r}")
        if not len(self.batches):
            raise ValueError("batches: expected at least one row, got none; record some first")

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    def batch(
        self, size: int, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Field, Float[Tensor, "B H A"]]:
        """Draw observations; load and encode those of ``share``."""
        draw = torch.randint(len(self.batches), (size,), generator=generator, device=generator.device)
        rows = self.batches.rows(share.of(draw).tolist())
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in rows.items()}
        field, noise = _encode(self.policy, {k: v for k, v in batch.items() if k != ACTION})
        if self.actions == "data":
            return field, _stored_actions(self.policy, batch)
        whole = torch.randn(size, *noise.shape[1:], generator=generator, device=generator.device)
        with torch.no_grad():
            return field, Euler()(field, None, share.of(whole).to(noise)).float()

    def fingerprint(self) -> str:
        """Return a hash of policy and data."""
        return _digest(self.policy, self.batches.fingerprint() + self.actions)


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
                "qsteer.training.record(batches, directory)"
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
        """Read these rows and nothing else."""
        found: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            files: dict[int, Any] = {}
            for number in numbers:
                i = bisect_right(self.ends, number)
                if i not in files:
                    files[i] = stack.enter_context(safe_open(self.paths[i], "pt"))
                row = number - self.ends[i] + self.lengths[i]
                for key in files[i].keys():
                    found.setdefault(key, []).append(files[i].get_slice(key)[row : row + 1][0])
        return {key: _stack(rows) for key, rows in found.items()}

    def fingerprint(self) -> str:
        """Return a hash of names, shapes and each file's first row."""
        digest = sha256()
        for path, end, length in zip(self.paths, self.ends, self.lengths, strict=True):
            digest.update(f"{path.name} {length}".encode())
            for key, tensor in sorted(self.rows([end - length]).items()):
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
        return digest.hexdigest()


@dataclass(frozen=True)
class DatasetBatches:
    """Frames of a map-style dataset such as ``lerobot.datasets.LeRobotDataset``, through a preprocessor.

    Frames are decoded in the training process: to see them more than once, :func:`record` them first.

    Attributes:
        dataset: ``dataset[i]`` is a frame, a flat dict; actions are chunks (H, A).
        preprocessor: the policy's own, which makes of collated frames the batch that the policy takes.
        name: of the dataset and its revision, for the fingerprint.
    """

    dataset: Any
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]
    name: str

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.dataset)

    def rows(self, numbers: list[int]) -> dict[str, Any]:
        """Decode, collate and preprocess these frames."""
        return self.preprocessor(default_collate([self.dataset[i] for i in numbers]))

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
    """Write each batch as a file that :class:`SafetensorsBatches` reads; what is no tensor is left out."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for i, batch in enumerate(batches):
        path = directory / f"{i:06d}.safetensors"
        tensors = {k: v.detach().cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def _encode(policy: Any, batch: dict[str, Any]) -> tuple[Field, Float[Tensor, "B H A"]]:
    """Return the policy's velocity for a batch, and noise; torch's random stream is left as it was."""
    device = next(policy.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        opened = open_action(policy, batch)
    return opened.field, opened.noise


def _stored_actions(policy: Any, batch: dict[str, Any]) -> Float[Tensor, "B H A"]:
    """Return the batch's chunks as the host's training sees them: padded, and for Aloha in pi's joints."""
    if ACTION not in batch:
        raise KeyError(
            f"batch: expected the key {ACTION!r}, got {sorted(batch)}; store the chunks, or use "
            "HostTeacher(actions='policy')"
        )
    actions = batch[ACTION].float()
    if getattr(policy.config, "adapt_to_pi_aloha", False):
        actions = policy._pi_aloha_encode_actions_inv(actions.clone())
    return policy.prepare_action({ACTION: actions})


def _stack(rows: list[Tensor]) -> Tensor:
    """Stack rows, those of different length padded with zeros at the end."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(rows)
    return pad_sequence(rows, batch_first=True)


def _digest(policy: nn.Module, data: str) -> str:
    digest = sha256(data.encode())
    for tensor in policy.state_dict().values():
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

"""The frozen policy of the LIBERO experiment, and what must be right of it before hours are spent.

lerobot is silent about what makes a policy useless: a checkpoint without weights stays random, statistics
that are missing leave actions as they are, a camera that is missing is black. Here each is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsteer.adapters import host_of
from qsteer.evaluation.lerobot import read_named

HORIZON = 10
"""Executed steps of a chunk, in the paper and in lerobot's evaluation of pi0.5 on LIBERO."""
STATE, ACTION = "observation.state", "action"
STATE_DIM, ACTION_DIM = 8, 7
VIEWS = ("observation.images.image", "observation.images.image2")
"""The views of :mod:`qsteer.envs.libero`, by name; scene and wrist."""
EMPTY = "empty_camera"
"""In the names of views that a policy has room for and never sees."""
RANDOM = "random"
"""Name of the policy of random weights."""
WEIGHTS = "model.safetensors", "model.safetensors.index.json"
NEEDED = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MEAN_STD": ("mean", "std")}
NEEDED |= {"MIN_MAX": ("min", "max")}
REACH = 20.0
"""How far from 0 a normalised state may lie."""
REMEDY = "take a checkpoint that was trained on LIBERO, such as lerobot/pi05_libero_finetuned"


@dataclass(frozen=True)
class Frozen:
    """A frozen policy with its own processors.

    Attributes:
        policy: on its device.
        preprocess: the policy's.
        postprocess: the policy's.
        name: of the checkpoint, for results.
    """

    policy: Any
    preprocess: Callable[[Any], Any]
    postprocess: Callable[[Any], Any]
    name: str

    @property
    def parts(self) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
        """Policy and processors."""
        return self.policy, self.preprocess, self.postprocess

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    @property
    def action_dim(self) -> int:
        """Size of an action, without padding."""
        return int(host_of(self.policy).action_dim(self.policy))


def open_frozen(name: str | Path, device: torch.device | str = "cpu", seed: int = 0) -> Frozen:
    """Load a policy for LIBERO with its own processors, and check both.

    Of a chunk 10 steps are executed, whatever the checkpoint says (``n_action_steps``).

    Args:
        name: folder or hub name of a lerobot checkpoint; "random": a tiny pi0.5 of random weights, which
            shows that everything runs and solves nothing.
        device: where it goes.
        seed: of random weights.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it has no weights.
        KeyError: it sees other cameras, or the processors have no statistics.
        ValueError: it acts in other sizes or units than LIBERO's, or in shorter chunks.
        TypeError: no Host record describes the policy.
    """
    if str(name) == RANDOM:
        from qsteer.testing import hosts

        policy = hosts.pi05(shape=hosts.LIBERO, seed=seed, device=device).requires_grad_(False).eval()
        frozen = Frozen(policy, *hosts.processors(policy), RANDOM)
    else:
        from qsteer.data.lerobot import open_policy

        _check_weights(Path(name))
        frozen = Frozen(*open_policy(name, device), str(name))
    check_policy(frozen)
    frozen.policy.config.n_action_steps = HORIZON
    return frozen


def _check_weights(folder: Path) -> None:
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in WEIGHTS):
        raise FileNotFoundError(
            f"{folder}: expected weights, got a config.json without {WEIGHTS[0]}, of which lerobot makes a "
            "random policy; download the whole checkpoint"
        )


def check_policy(frozen: Frozen) -> None:
    """Check a policy's views, sizes and statistics against LIBERO's.

    Raises:
        KeyError: it sees other cameras, or the processors have no statistics.
        ValueError: it acts in other sizes or units than LIBERO's, or in shorter chunks.
    """
    config = frozen.policy.config
    kinds = {key: feature.type.value for key, feature in config.input_features.items()}
    seen = [key for key, kind in kinds.items() if kind == "VISUAL" and EMPTY not in key]
    if missing := [key for key in VIEWS if key not in seen]:
        raise KeyError(f"policy: expected the cameras {list(VIEWS)}, got no {missing} among {seen}; {REMEDY}")
    if other := [key for key in seen if key not in VIEWS]:
        raise KeyError(
            f"policy: expected no cameras but {list(VIEWS)}, got {other}, which LIBERO lacks; {REMEDY}"
        )
    for key, feature, size in (
        (STATE, config.input_features.get(STATE), STATE_DIM),
        (ACTION, config.output_features.get(ACTION), ACTION_DIM),
    ):
        if feature is None or tuple(feature.shape) != (size,):
            got = "none" if feature is None else tuple(feature.shape)
            raise ValueError(f"policy, {key}: expected shape ({size},), got {got}; {REMEDY}")
    if config.chunk_size < HORIZON:
        raise ValueError(
            f"policy: expected chunks of at least {HORIZON} steps, got {config.chunk_size}; {REMEDY}"
        )
    _check_statistics("preprocessor", frozen.preprocess, STATE, config, "STATE")
    low, high = _check_statistics("postprocessor", frozen.postprocess, ACTION, config, "ACTION")
    if low is not None and high is not None and max(-low.min(), high.max()) > 1.5:
        raise ValueError(
            f"postprocessor: expected statistics of actions in [-1, 1], got {low.min():.3g} to "
            f"{high.max():.3g}; the normalisation is that of another data set: {REMEDY}"
        )


def _check_statistics(
    where: str, processor: Any, key: str, config: Any, kind: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return the lower and upper statistic by which a processor normalises; None: it has no such bounds."""
    mode = config.normalization_mapping.get(kind)
    name = "IDENTITY" if mode is None else mode.name
    if name not in NEEDED:
        raise ValueError(
            f"policy: expected {kind} to be normalised by one of {sorted(NEEDED)}, got {name}; {REMEDY}"
        )
    stats: dict[str, Any] = {}
    for step in getattr(processor, "steps", ()):
        stats |= (getattr(step, "stats", None) or {}).get(key, {})
    if missing := [each for each in NEEDED[name] if each not in stats]:
        raise KeyError(
            f"{where}: expected statistics {list(NEEDED[name])} of {key!r}, got no {missing} among "
            f"{sorted(stats)}, without which lerobot passes values through as they are; {REMEDY}"
        )
    found = [torch.as_tensor(stats[each]).float() for each in NEEDED[name]]
    return (None, None) if name == "MEAN_STD" else (found[0], found[1])


def check_first(frozen: Frozen, first: Mapping[str, Tensor], instruction: str) -> dict[str, Any]:
    """Return the policy's batch for an environment's first observation, checked.

    Args:
        frozen: the policy.
        first: an observation of one row.
        instruction: the task in words.

    Raises:
        KeyError: a view or the state is missing before or after the preprocessor.
        ValueError: a view is black, there is no instruction, or the normalised state lies far out: the
            statistics are another robot's, or in other units.
    """
    if missing := [key for key in (STATE, *VIEWS) if key not in first]:
        raise KeyError(f"environment: expected {[STATE, *VIEWS]}, got no {missing} among {sorted(first)}")
    if black := [key for key in VIEWS if not first[key].any()]:
        raise ValueError(
            f"environment: expected pictures, got a black {black[0]!r}; look at the graphics "
            "library (MUJOCO_GL)"
        )
    if not instruction:
        raise ValueError("environment: expected a task_description, got none; the policy needs its words")
    batch = frozen.preprocess(read_named(first) | {"task": [instruction]})
    if missing := [key for key in (STATE, *VIEWS) if key not in batch]:
        raise KeyError(
            f"preprocessor: expected {[STATE, *VIEWS]} in the policy's batch, got no {missing} among "
            f"{sorted(batch)}; look at its renaming step"
        )
    far = float(batch[STATE].float().abs().max())
    if not far <= REACH:
        raise ValueError(
            f"preprocessor: expected a normalised state within {REACH:g} of 0, got {far:.3g}; the "
            f"normalisation is that of another robot or of other units: {REMEDY}"
        )
    return dict(batch)

"""Checkpoints of a training run: written whole, and refused where they are of another run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qsteer.checks import list_differences
from qsteer.files import replacing_file

CHECKPOINT = "checkpoint.safetensors"


def save(
    out: Path,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator],
    step: int,
    identity: Mapping[str, Any],
) -> None:
    """Write a checkpoint so that there is always a whole one: a temporary file, then a rename."""
    tensors = {f"learner.{name}": tensor for name, tensor in learner.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
    tensors |= {_name_generator(i): generator.get_state() for i, generator in enumerate(generators)}
    with replacing_file(out / CHECKPOINT) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "identity": json.dumps(identity)})


def _name_generator(i: int) -> str:
    return f"generator.{i}" if i else "generator"


def resume(
    out: Path,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator],
    identity: Mapping[str, Any],
) -> int:
    """Restore the checkpoint in ``out``, if any, and return its step (0: none).

    Raises:
        ValueError: the checkpoint is broken, of a run with another identity, of networks of other shapes, or
            of other generators.
    """
    if not (out / CHECKPOINT).exists():
        return 0
    header, tensors = _read(out)
    remedy = "use another directory, go back to the former settings, or delete this one"
    if differences := list_differences(json.loads(json.dumps(identity)), json.loads(header["identity"])):
        expected, found = differences
        raise ValueError(
            f"{out}: expected a run with {expected}, got a checkpoint of one with {found}; {remedy}"
        )
    weights = _select(tensors, "learner.")
    _check_shapes(out, learner, weights, remedy)
    states = {name: tensor for name, tensor in tensors.items() if name.startswith("generator")}
    wanted = {_name_generator(i): generator for i, generator in enumerate(generators)}
    if len(states) > 1:  # an older checkpoint has the first alone
        kinds = [{n: int(s.numel()) for n, s in states.items()}]
        kinds.insert(0, {n: int(g.get_state().numel()) for n, g in wanted.items()})
        if differences := list_differences(*kinds):
            expected, found = differences
            raise ValueError(
                f"{out}: expected states of generators of {expected} bytes, got a checkpoint with {found}; "
                "resume on the same kind of device, with the rule and the sampler that it began with"
            )
    learner.load_state_dict(weights)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _select(tensors, "optimizer.").items():
        i, key = name.split(".")
        state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, saved in states.items():
        wanted[name].set_state(saved)
    return int(header["step"])


def _check_shapes(out: Path, learner: nn.Module, weights: Mapping[str, Tensor], remedy: str) -> None:
    shapes = [{n: tuple(t.shape) for n, t in of.items()} for of in (learner.state_dict(), weights)]
    if differences := list_differences(*shapes):
        expected, found = differences
        raise ValueError(
            f"{out}: expected networks with {expected}, got a checkpoint of others with {found}; {remedy}"
        )


def start_from(out: Path, learner: nn.Module, **settings: Any) -> None:
    """Give a learner the weights of a run of its kind.

    Args:
        out: directory of the run.
        learner: freshly built.
        settings: what that run must have learnt with, by name in its identity.

    Raises:
        FileNotFoundError: ``out`` holds no run.
        ValueError: its checkpoint is broken, or it is of other settings or networks.
    """
    remedy = "start from a run of the same settings"
    if not (out / CHECKPOINT).exists():
        raise FileNotFoundError(
            f"start: expected a run directory, got no {CHECKPOINT} in {str(out)!r}; {remedy}"
        )
    header, tensors = _read(out)
    identity = json.loads(header["identity"])
    if differences := list_differences(settings, {name: identity.get(name) for name in settings}):
        expected, found = differences
        raise ValueError(
            f"start: expected a run with {expected}, got one with {found} in {str(out)!r}; {remedy}"
        )
    weights = _select(tensors, "learner.")
    _check_shapes(out, learner, weights, remedy)
    learner.load_state_dict(weights)


def _read(out: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return a checkpoint's header and its tensors."""
    try:
        with safe_open(out / CHECKPOINT, "pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{out / CHECKPOINT}: expected a whole checkpoint, got a broken file ({error}); delete it to "
            "start from the beginning"
        ) from None


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

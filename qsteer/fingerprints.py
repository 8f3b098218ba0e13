"""Hashes of networks and data: a resumed run must see what it started with."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OPAQUE = " (contents unknown)"
"""Marks in a description what two runs cannot be compared by."""


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """Return the content of a tensor of any dtype and device as bytes, uint8 of one axis."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def fingerprint(tensors: Iterable[Tensor], prefix: str = "") -> str:
    """Return 16 hexadecimal digits that depend on the bytes of all tensors, their order and ``prefix``.

    Cost: a copy of the tensors on the CPU, one after another.
    """
    digest = sha256(prefix.encode())
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def describe(given: Any) -> Any:
    """Return what JSON can hold of a rule or sampler, alike in every process.

    Dataclasses give their class and the fields that they compare by, networks and tensors a fingerprint,
    named functions their name. Of anything else there is its class or name, marked :data:`OPAQUE`.

    Cost: a copy of the tensors on the CPU.
    """
    if given is None or isinstance(given, bool | int | float | str):
        return given
    if isinstance(given, np.generic):
        return given.item()
    if isinstance(given, torch.dtype | torch.device | Path):
        return str(given)
    if isinstance(given, type):
        return _name(given)
    if isinstance(given, list | tuple):
        return [describe(part) for part in given]
    if isinstance(given, Mapping):
        return {str(key): describe(part) for key, part in given.items()}
    if isinstance(given, Tensor | np.ndarray):
        return f"{tuple(given.shape)} {fingerprint([torch.as_tensor(given)])}"
    if isinstance(given, nn.Module):
        return f"{_name(type(given))} {fingerprint(given.state_dict().values())}"
    if is_dataclass(given):
        compared = {f.name: describe(getattr(given, f.name)) for f in fields(given) if f.compare}
        return {"class": _name(type(given))} | compared
    if isinstance(given, partial):
        return {"partial": describe(given.func), "args": describe(given.args)} | describe(given.keywords)
    if isinstance(given, FunctionType):
        unknown = given.__closure__ is not None or given.__name__ == "<lambda>"
        return _name(given) + OPAQUE * unknown
    return _name(type(given)) + OPAQUE


def warn_unknown(place: str, parts: Mapping[str, Any]) -> None:
    """Say which of some descriptions cannot be compared with those that a run began with."""
    for name, part in parts.items():
        if OPAQUE in (shown := json.dumps(part)):
            warnings.warn(
                f"{place}: expected a {name} that can be compared with the one that the run began with, got "
                f"{shown}; see to it that it is the same (fields of dataclasses, networks and named "
                f"functions "
                "are compared)",
                RuntimeWarning,
                stacklevel=3,
            )


def _name(given: Any) -> str:
    return f"{given.__module__}.{given.__qualname__}"

"""Qsteer's code on torch's ``meta`` device, in CUDA's place.

A meta tensor has a shape, a format and a device, but no numbers. :func:`rehearsed` refuses, beside what torch
refuses of it, what CUDA or the capture of a graph would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qsteer.compiling.hidden import FAR
from qsteer.compiling.kinds import modules_behind, rebuilt, tensors_in
from qsteer.sampling import steered_action
from qsteer.trace import ActionRecord
from qsteer.types import Field, Rule, Sampler, Value

META = torch.device("meta")
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""What torch says of operators whose result, or its shape, depends on numbers."""
COPYING = frozenset(("copy_", "_to_copy", "to"))
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"))


class RehearsalError(AssertionError):
    """Something would fail on CUDA, or in the capture of a graph."""


class Operators(TorchDispatchMode):
    """Refuses operators on meta tensors, backward passes included.

    A CPU tensor without a dimension is a number where it meets a device's tensors entry by entry, or fills
    one: CUDA passes it to the kernel, and a graph keeps it. Anywhere else it is a tensor on the wrong device.

    Args:
        captured: refuse also what CUDA does, but no capture: uploads.
    """

    def __init__(self, captured: bool) -> None:
        super().__init__()
        self.captured = captured

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        numbers = name == "fill_" or torch.Tag.pointwise in func.tags
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in given if x.is_meta]
        strangers = [x for x in given if not x.is_meta and not (numbers and x.ndim == 0)]
        target = args[0].device if name == "copy_" else kwargs.get("device")
        if there and (waits(func, args) or (name in COPYING and target not in (None, META))):
            raise RehearsalError(f"{func}: expected no host read, got one; compute it on the device")
        if strangers and name in COPYING and target == META:
            self.upload(str(func))
        elif strangers and (there or target == META):
            found = ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in strangers)
            raise RehearsalError(f"{func}: expected tensors on the device, got a CPU tensor {found}")
        return func(*args, **kwargs)

    def upload(self, what: str) -> None:
        """Refuse an upload if it would be captured."""
        if self.captured:
            raise RehearsalError(f"{what}: expected no upload, got one; make it before, or on the device")


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether CUDA reads numbers back before it knows an operator's result or its shape."""
    if func.overloadpacket.__name__ in INDEXING:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return not WAITING.isdisjoint(func.tags)


def constructing(operators: Operators, construct: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that makes a tensor of data, and refuses data that CUDA would upload."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        result, data = construct(*args, **kwargs), args[-1] if args else kwargs.get("data")
        if result.is_meta and not (isinstance(data, Tensor) and data.is_meta):
            operators.upload(construct.__name__)
        return result

    return call


class Indexing(TorchFunctionMode):
    """Refuses an index of numbers, which CUDA uploads.

    A mode: a ``Tensor.__getitem__`` that was replaced for a while leaves its type another one, on which
    ``torch.tensor`` of tensors without a dimension fails ever after.
    """

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list | np.ndarray) for part in parts):
                self.operators.upload("an index of numbers")
        return func(*args, **(kwargs or {}))


def exporting(operators: Operators, export: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that hands a tensor over to numpy, and refuses to of one on the device."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_meta:
            raise RehearsalError(
                f"{export.__name__}: expected no host read, got one; compute it on the device"
            )
        return export(x, *args, **kwargs)

    return call


def asking(operators: Operators, ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a device's name that answers for the CPU where it is asked of meta."""
    return lambda *kinds: ask(*("cpu" if kind == "meta" else kind for kind in kinds))


STAND_INS: tuple[tuple[Any, str, Callable[[Operators, Any], Any]], ...] = (
    (torch, "tensor", constructing),
    (torch, "as_tensor", constructing),
    (torch, "asarray", constructing),
    (Tensor, "new_tensor", constructing),
    (Tensor, "numpy", exporting),
    (Tensor, "__array__", exporting),
    (torch, "is_autocast_enabled", asking),
    (torch, "get_autocast_dtype", asking),
)
"""What on meta, unlike on CUDA, ends before an operator is reached, or is not known."""


class Generator(torch.Generator):
    """Stands in for one on meta, which has none: the CPU's."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")


@contextmanager
def rehearsed(captured: bool = True) -> Iterator[None]:
    """Let nothing pass in the block, and in this thread, that fails on CUDA or, if captured, in a capture.

    Generators and autocast, which meta does not have, are the CPU's.
    """
    operators = Operators(captured)
    with pytest.MonkeyPatch.context() as patch, operators, Indexing(operators):
        patch.setattr(torch, "Generator", Generator)
        for owner, name, stand_in in STAND_INS:
            patch.setattr(owner, name, stand_in(operators, getattr(owner, name)))
        yield


class Moving(TorchFunctionMode):
    """Lets ``deepcopy`` put on meta the tensors that it copies."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        return memo.setdefault(id(x), x.detach().to(META).requires_grad_(x.requires_grad))


def on_meta[T](tree: T) -> T:
    """Return a copy on meta of anything made of networks, tensors and dataclasses.

    Networks are moved by their own ``to``: tensors that are neither parameters nor buffers stay behind, as
    they would on the way to CUDA.
    """
    memo: dict[int, Any] = {}
    for network in modules_behind(tree, FAR):
        deepcopy(network, memo).to(META)
    with Moving():
        return deepcopy(tree, memo)


def rehearse(
    field: Field, value: Value, noise: Tensor, rule: Rule | None, sampler: Sampler, captured: bool = True
) -> Tensor:
    """Return the action of a field, value and noise on meta, with all that a trace may want of it.

    Raises:
        RehearsalError: it would fail on CUDA, or is not of the noise's shape, format and device.
    """
    given = field, value, noise
    field, value, noise = rebuilt(given, iter(tensors_in(given)))  # which have cached nothing
    with torch.no_grad(), rehearsed(captured), ActionRecord(True, True).collect():
        action = steered_action(field, value, noise, deepcopy(rule), sampler)
    check_like(action, noise)
    return action


def check_like(got: Tensor, expected: Tensor) -> None:
    """Raise unless a result has another tensor's shape, format and device."""
    found, wanted = ((tuple(x.shape), x.dtype, x.device) for x in (got, expected))
    if found != wanted:
        raise RehearsalError(f"result: expected shape, dtype and device {wanted}, got {found}")

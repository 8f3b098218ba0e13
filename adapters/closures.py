"""The velocity of a policy whose loop has it as a function of its own: that function, on other variables.

A function inside a loop knows its observations by the variables around it (key-value cache, masks). Here
they are a context like any other, which is repeated for several rows and copied before the function changes
it; the code that runs is the host's.
"""

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

from torch import Tensor


def read_closure(function: Callable[..., Tensor]) -> dict[str, Any]:
    """Return the variables around a function, by name.

    Raises:
        RuntimeError: it is no function with variables around it, or one of them has no value yet.
    """
    cells = getattr(function, "__closure__", None)
    try:
        return {
            name: cell.cell_contents
            for name, cell in zip(function.__code__.co_freevars, cells or (), strict=True)
        }
    except (AttributeError, ValueError) as error:
        raise RuntimeError(
            f"local: expected a function inside the host's loop and values around it, got {function!r} "
            f"({error}); correct its Host record"
        ) from None


def with_closure(function: Callable[..., Tensor], variables: dict[str, Any]) -> Callable[..., Tensor]:
    """Return the same function with other variables around it: those of :func:`read_closure`, by name."""
    assert isinstance(function, FunctionType)
    cells = tuple(CellType(variables[name]) for name in function.__code__.co_freevars)
    same = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    same.__kwdefaults__ = function.__kwdefaults__
    return same

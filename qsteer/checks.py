"""Checks that many settings share; each raises a ValueError that says what was expected and what was got."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def check_at_least(owner: object, least: float | int, *names: str) -> None:
    """Check that attributes are no less than a bound; ``None`` passes.

    Raises:
        ValueError: one is.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < least:
            raise ValueError(f"{_place(owner, name)}: expected at least {least}, got {value}")


def check_positive(owner: object, *names: str) -> None:
    """Check that attributes are more than zero; ``None`` passes.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and value <= 0:
            raise ValueError(f"{_place(owner, name)}: expected more than 0, got {value}")


def check_fraction(owner: object, *names: str) -> None:
    """Check that attributes lie in (0, 1].

    Raises:
        ValueError: one does not.
    """
    for name in names:
        value = getattr(owner, name)
        if not 0 < value <= 1:
            raise ValueError(f"{_place(owner, name)}: expected a number in (0, 1], got {value}")


def check_choice(owner: object, name: str, choices: Collection[str]) -> None:
    """Check that an attribute is one of some words.

    Raises:
        ValueError: it is another.
    """
    if getattr(owner, name) not in choices:
        raise ValueError(
            f"{_place(owner, name)}: expected one of {', '.join(map(repr, choices))}, got "
            f"{getattr(owner, name)!r}"
        )


def check_widths(owner: object, name: str) -> None:
    """Check the widths of hidden layers.

    Raises:
        ValueError: there is none, or one is not positive.
    """
    widths: Sequence[int] = getattr(owner, name)
    if not widths or min(widths) < 1:
        raise ValueError(f"{_place(owner, name)}: expected at least one positive width, got {widths}")


def check_clip(clip: Any) -> None:
    """Check what clips actions: "policy", which means the policy's own bounds, None, or (low, high).

    Raises:
        ValueError: it is something else.
    """
    if clip != "policy":
        check_bounds(clip, "clip", '"policy" for the policy\'s own, ')


def check_bounds(bounds: Any, name: str = "bounds", other: str = "") -> None:
    """Check bounds of an action: None, or (low, high).

    Raises:
        ValueError: they are something else.
    """
    if bounds is not None and not (
        isinstance(bounds, tuple | list) and len(bounds) == 2 and bounds[0] < bounds[1]
    ):
        raise ValueError(
            f"{name}: expected (low, high) with low < high, {other}or None for none, got {bounds!r}"
        )


def check_function(name: str, given: Any, example: str, base: str) -> None:
    """Check that what is to be called is a plain function, and not something that wants to be bound first.

    Raises:
        TypeError: it is a class, cannot be called, or has a method ``on`` without being a ``base``.
    """
    if isinstance(given, type) or not callable(given) or hasattr(given, "on"):
        raise TypeError(
            f"{name}: expected a function or an object such as {example}, got {given!r}; pass an instance, "
            f"and subclass {base} if it is to be bound to the policy"
        )


def check_output(name: str, given: Any, shape: Sequence[int], remedy: str) -> None:
    """Check what a user's function returned.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}; return {remedy}")
    if given.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(given.shape)}; return {remedy}")


def check_count(owner: object, *names: str) -> None:
    """Check that attributes are whole numbers; ``None`` passes.

    Raises:
        TypeError: one is not.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{_place(owner, name)}: expected a whole number, got {value!r}; pass an int")


def unwrap_numbers(owner: Any) -> None:
    """Replace numpy numbers and scalar tensors among the fields of a frozen dataclass by plain numbers."""
    for name, value in vars(owner).items():
        if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
            object.__setattr__(owner, name, value.item())


def check_finite(name: str, values: Tensor, remedy: str) -> None:
    """Check that a column of numbers, one row per entry of the first axis, has neither NaN nor infinity.

    Raises:
        ValueError: it has; the message names the column and the first row.

    Cost: a pass over the column; waits for its device.
    """
    bad = ~values.isfinite()
    if bad.any():
        rows = bad.reshape(len(bad), -1)
        row = int(rows.any(1).nonzero()[0, 0])
        entry = int(rows[row].nonzero()[0, 0])
        place = f"row {row}" if values.ndim == 1 else f"row {row}, entry {entry}"
        raise ValueError(
            f"{name}: expected finite numbers, got {values[row].reshape(-1)[entry].item()} in {place} "
            f"(first of {int(rows.any(1).sum())} such rows of {len(rows)}); {remedy}"
        )


def list_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what differs between two descriptions, as ``"a=1, b.c=2"`` for each; ``None``: nothing."""
    expected, found = _flatten(expected), _flatten(found)
    names = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
    if not names:
        return None
    listed, other = (", ".join(f"{n}={side.get(n)!r}" for n in names) for side in (expected, found))
    return listed, other


def _flatten(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a description without mappings inside: ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in description.items():
        inside = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return flat


def _place(owner: object, name: str) -> str:
    return f"{type(owner).__name__}.{name}"

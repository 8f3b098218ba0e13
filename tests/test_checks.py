"""Shared checks name the owner, what was expected and what was got."""

from types import SimpleNamespace

import pytest

from qsteer.checks import (
    check_at_least,
    check_choice,
    check_fraction,
    check_positive,
    check_widths,
    list_differences,
)

OWNER = SimpleNamespace(one=1, none=None, zero=0, half=0.5, word="a", widths=(8, 0), empty=())


def test_what_is_within_its_range_passes() -> None:
    check_at_least(OWNER, 1, "one", "none")
    check_at_least(OWNER, 0, "zero", "half")
    check_positive(OWNER, "one", "half", "none")
    check_fraction(OWNER, "one", "half")
    check_choice(OWNER, "word", ("a", "b"))


def test_what_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"SimpleNamespace\.zero: expected at least 1, got 0"):
        check_at_least(OWNER, 1, "one", "zero")
    with pytest.raises(ValueError, match=r"SimpleNamespace\.zero: expected more than 0, got 0"):
        check_positive(OWNER, "zero")
    with pytest.raises(ValueError, match=r"SimpleNamespace\.zero: expected a number in \(0, 1\], got 0"):
        check_fraction(OWNER, "half", "zero")
    with pytest.raises(ValueError, match=r"SimpleNamespace\.word: expected one of 'b', 'c', got 'a'"):
        check_choice(OWNER, "word", ("b", "c"))
    for name in ("widths", "empty"):
        with pytest.raises(ValueError, match=rf"{name}: expected at least one positive width"):
            check_widths(OWNER, name)


def test_differences_are_listed_by_name() -> None:
    assert list_differences({"a": 1, "b": [2]}, {"b": [2], "a": 1}) is None
    assert list_differences({"b": 1, "a": 2, "same": 0}, {"c": "x", "a": 3, "same": 0}) == (
        "a=2, b=1, c=None",
        "a=3, b=None, c='x'",
    )

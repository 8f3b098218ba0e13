"""The course of a computation: the decisions it takes on numbers that are on the device.

A CUDA graph replays one course. Whatever asks the device which way to go (are any rows guided at this time,
which time is it) asks through :func:`known`; a :class:`Course` remembers the answers of a rehearsal and gives
them again, without asking, whenever it is followed. Such answers depend on times and settings, never on
observations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_followed: ContextVar["Course | None"] = ContextVar("qsteer_course", default=None)


def known[T](read: Callable[[], T]) -> T:
    """Return ``read()``, which waits for the device; on a course taken before, the answer of then."""
    course = _followed.get()
    return read() if course is None else course.answer(read)


class Course:
    """The answers that decide a computation: read when it is first followed, repeated from then on."""

    def __init__(self) -> None:
        self._answers: list[Any] = []
        self._next: Iterator[Any] | None = None
        self._taken = False

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Take the course in the block: from end to end, the same computation each time."""
        self._next = iter(self._answers) if self._taken else None
        token = _followed.set(self)
        try:
            yield
            self._taken = True
        finally:
            _followed.reset(token)
            if not self._taken:
                self._answers.clear()

    def answer[T](self, read: Callable[[], T]) -> T:
        """Return the next answer."""
        if self._next is not None:
            return next(self._next)
        self._answers.append(read())
        return self._answers[-1]

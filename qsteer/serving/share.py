"""How one thread's time is shared between acting, which robots wait for, and learning, which nobody does."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW = 10.0
"""Seconds over which the share is bounded."""


@dataclass
class Share:
    """Learning takes at most a share of the time in which robots wait, and all of the rest.

    What counts is the time of calls, and that of learning while requests waited, over the last
    :data:`WINDOW` seconds. A step may be taken if, as long as the one before, it leaves the share kept.

    Attributes:
        share: of learning, in [0, 1].
        clock: seconds.

    Raises:
        ValueError: the share is no such number.
    """

    share: float = 0.5
    clock: Callable[[], float] = time.monotonic
    _spent: deque[tuple[float, float, float]] = field(default_factory=deque, init=False, repr=False)
    _acted: float = field(default=0.0, init=False, repr=False)
    _learnt: float = field(default=0.0, init=False, repr=False)
    _step: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a number in [0, 1], got {self.share}")

    def act(self, seconds: float) -> None:
        """Count a call."""
        self._count(seconds, 0.0)

    def learn(self, seconds: float, waiting: bool) -> None:
        """Count a step of learning; one that nobody waited for is free."""
        self._step = seconds
        if waiting:
            self._count(0.0, seconds)

    def allows(self) -> bool:
        """Return whether a step may be taken while requests wait."""
        while self._spent and self._spent[0][0] < self.clock() - WINDOW:
            self._add(*(-seconds for seconds in self._spent.popleft()[1:]))
        if not self._spent:  # what rounding has left
            self._acted = self._learnt = 0.0
        learnt = self._learnt + self._step
        return learnt <= self.share * (learnt + self._acted)

    def _count(self, acted: float, learnt: float) -> None:
        self._spent.append((self.clock(), acted, learnt))
        self._add(acted, learnt)

    def _add(self, acted: float, learnt: float) -> None:
        self._acted, self._learnt = self._acted + acted, self._learnt + learnt

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
    _spent: deque[tuple[float, float, bool]] = field(default_factory=deque, init=False, repr=False)
    _step: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a number in [0, 1], got {self.share}")

    def act(self, seconds: float) -> None:
        """Count a call."""
        self._count(seconds, learning=False)

    def learn(self, seconds: float, waiting: bool) -> None:
        """Count a step of learning; one that nobody waited for is free."""
        self._step = seconds
        if waiting:
            self._count(seconds, learning=True)

    def allows(self) -> bool:
        """Return whether a step may be taken while requests wait."""
        while self._spent and self._spent[0][0] < self.clock() - WINDOW:
            self._spent.popleft()
        learnt = sum(seconds for _, seconds, learning in self._spent if learning) + self._step
        acted = sum(seconds for _, seconds, learning in self._spent if not learning)
        return learnt <= self.share * (learnt + acted)

    def _count(self, seconds: float, *, learning: bool) -> None:
        self._spent.append((self.clock(), seconds, learning))

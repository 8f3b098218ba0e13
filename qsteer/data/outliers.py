"""Rewards that no task gives: a sensor's mistakes, told from rare successes by their size and number."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

FAR, RARE = 2.0**14, 0.01
"""Size over the usual size, and share of the rewards other than zero, from which on and below which rewards
are outliers."""


class Outlier(NamedTuple):
    """A reward that was refused.

    Attributes:
        lane: environment.
        episode: of the environment, counted from 0 in this process.
        length: steps of the episode so far.
        reward: of the row.
        limit: the absolute value from which on rewards are outliers.
    """

    lane: int
    episode: int
    length: int
    reward: float
    limit: float


@dataclass
class RewardScale:
    """The usual size of rewards, by statistics that a few outliers do not move.

    The usual size is that which no more than a share ``RARE`` of the rewards other than zero exceeds, in
    powers of two; an outlier is ``FAR`` times as large. So among fewer than ``1 / RARE`` rewards other than
    zero there is none, a first success among zeros is none, and what keeps coming is none.

    Attributes:
        zeros: whether a reward of zero was seen.
    """

    zeros: bool = field(default=False, init=False)
    _sizes: dict[int, tuple[int, float, float]] = field(default_factory=dict, init=False, repr=False)

    def observe(self, rewards: Tensor) -> None:
        """Take in rewards of any shape; those that are not finite are ignored.

        Cost: a sort by size; waits for a device the rewards are on.
        """
        finite = rewards[torch.isfinite(rewards)].cpu()
        given = finite[finite != 0]
        self.zeros |= len(given) < len(finite)
        sizes = torch.frexp(given).exponent  # in powers of two: 0.5 <= |r| / 2^size < 1
        for size in sizes.unique().tolist():
            of = given[sizes == size]
            count, low, high = self._sizes.get(size, (0, float("inf"), -float("inf")))
            self._sizes[size] = count + len(of), min(low, float(of.min())), max(high, float(of.max()))

    def find(self, rewards: Tensor) -> Bool[Tensor, "..."]:
        """Return which rewards are outliers, among all that were observed."""
        return rewards.isfinite() & (rewards.abs() >= self.limit)

    def sift(self, rewards: Tensor) -> Bool[Tensor, "..."]:
        """Return which new rewards are outliers; they, and only they, are taken in."""
        if not bool(self.find(rewards).any()):  # more of them are no more
            return torch.zeros_like(rewards, dtype=torch.bool)
        before = dict(self._sizes)
        self.observe(rewards[self.find(rewards)])
        found = self.find(rewards)
        self._sizes = before
        self.observe(rewards[found])
        return found

    @property
    def limit(self) -> float:
        """The absolute value from which on a reward is an outlier; infinity where nothing can be said."""
        total, above = sum(count for count, *_ in self._sizes.values()), 0
        for size, (count, *_) in sorted(self._sizes.items(), reverse=True):
            above += count
            if above >= RARE * total:
                return 2.0**size * FAR
        return float("inf")

    @property
    def usual(self) -> tuple[float, float] | None:
        """Least and greatest of the rewards that are no outliers; None before one other than zero."""
        bounds = [(low, high) for _, low, high in self._usual()]
        if not bounds:
            return None
        zero = [0.0] if self.zeros else []
        return min([low for low, _ in bounds] + zero), max([high for _, high in bounds] + zero)

    @property
    def outliers(self) -> int:
        """Rewards that are outliers among those observed."""
        return sum(count for count, *_ in self._sizes.values()) - sum(count for count, *_ in self._usual())

    def _usual(self) -> list[tuple[int, float, float]]:
        """Return number, least and greatest of the rewards of each usual size."""
        limit = self.limit
        return [found for size, found in self._sizes.items() if 2.0**size <= limit]

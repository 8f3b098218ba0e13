"""How sure a success rate is, and a difference between two arms."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """An estimated difference and its confidence interval."""

    difference: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a success rate (1927), well behaved for few episodes and rare events.

    Raises:
        ValueError: not 0 <= successes <= n with n >= 1, or a level outside (0, 1).
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes, n: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    _check_level(level)
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (successes + z2 / 2) / (n + z2)
    half = (z2 * (successes * (n - successes) / n + z2 / 4)) ** 0.5 / (n + z2)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Return ``mean(a) - mean(b)`` of paired episodes with its percentile bootstrap interval.

    Episodes are resampled in pairs (same seed, same noise in both arms), so what makes an episode hard for
    both cancels: the interval is narrower than that of independent arms when the arms agree on most episodes.
    It says nothing of the variance between training seeds. Where all pairs differ alike, it has no width.

    Args:
        a: (E,) outcome of each episode in one arm: success, or a return.
        b: (E,) the same episodes in the other arm.
        samples: bootstrap samples.
        level: of confidence.
        seed: of the resampling.

    Raises:
        ValueError: the arms are not as long as each other, or empty, or an argument is out of range.

    Cost: of order ``samples`` times the number of different values of ``a - b`` (three for successes).
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"a, b: expected outcomes of the same episodes, shapes (E,), got {a.shape} and {b.shape}; run "
            "both arms with the same seed and number of episodes"
        )
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    _check_level(level)
    # The mean of a resample depends only on how often each value is drawn.
    values, counts = np.unique(a - b, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(a.size, counts / a.size, size=samples)
    low, high = np.quantile(draws @ values / a.size, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float((a - b).mean()), float(low), float(high))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, such as 0.95, got {level}")

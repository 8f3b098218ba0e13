"""Confidence intervals: of a success rate, of a difference between two arms, of means over training seeds."""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

EMA_RANGE = 1000


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """An estimated difference and its confidence interval."""

    difference: float
    low: float
    high: float


class Band(NamedTuple):
    """A mean over training seeds and its confidence interval, at each of some points."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def wilson_interval(successes: float | int, n: float | int, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a success rate (1927), well behaved for few episodes and rare events.

    Raises:
        ValueError: not whole numbers with 0 <= successes <= n and n >= 1, or a level outside (0, 1).
    """
    if successes % 1 or n % 1:
        raise ValueError(
            f"successes, n: expected whole numbers of episodes, got {successes} of {n}; a Wilson interval is "
            "of counts, take seed_bootstrap for means"
        )
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes, n: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    _check_level(level)
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (successes + z2 / 2) / (n + z2)
    half = (z2 * (successes * (n - successes) / n + z2 / 4)) ** 0.5 / (n + z2)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def paired_interval(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Return the difference of two success rates on the same episodes, with Tango's score interval (1998).

    Episodes are pairs (same seed, same noise in both arms), so what makes an episode hard for both cancels.
    With n of them, of which a alone solves f and b alone g, the interval holds all d with

        ``|f - g - n d| <= z sqrt(n (2 q + d (1 - d)))``,

    q the likeliest rate of g if d is the difference. It covers what it says with few episodes too, where
    percentile bootstraps are too narrow (:func:`paired_bootstrap`: .91 of a nominal .95 at n = 50), and has
    a width where all pairs agree. It does not include the variance between training seeds.

    Args:
        a: (E,) successes of one arm.
        b: (E,) successes of the other in the same episodes.
        level: of confidence.

    Raises:
        ValueError: the arms are not as long as each other, empty, or not of successes; or a level outside
            (0, 1).
    """
    a, b = _check_pairs(a, b)
    if not np.isin((a, b), (0, 1)).all():
        raise ValueError(
            "a, b: expected successes, each 0 or 1, got other numbers; of returns take paired_bootstrap"
        )
    _check_level(level)
    n, f, g = a.size, int((a > b).sum()), int((b > a).sum())
    z = NormalDist().inv_cdf((1 + level) / 2)

    def excess(d: float) -> float:
        linear, constant = (2 * n - f + g) * d - f - g, -g * d * (1 - d)
        q = ((linear**2 - 8 * n * constant) ** 0.5 - linear) / (4 * n)
        return (f - g - n * d) / max(n * (2 * q + d * (1 - d)), 1e-300) ** 0.5

    def solve(target: float) -> float:
        low, high = -1.0, 1.0  # where excess falls from above the target to below
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > target else (low, middle)
        return (low + high) / 2

    return Difference((f - g) / n, solve(z), solve(-z))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Return ``mean(a) - mean(b)`` of paired episodes with its percentile bootstrap interval.

    Episodes are resampled in pairs (same seed, same noise in both arms), so what makes an episode hard for
    both cancels: the interval is narrower than that of independent arms when the arms agree on most episodes.
    It does not include the variance between training seeds. Where all pairs differ alike, it has no width.

    Args:
        a: (E,) outcome of each episode in one arm: success, or a return.
        b: (E,) the same episodes in the other arm.
        samples: bootstrap samples.
        level: of confidence.
        seed: of the resampling.

    Raises:
        ValueError: the arms are not as long as each other, empty or not finite, or an argument is out of
            range.

    Cost: of order ``samples`` times the number of different values of ``a - b`` (three for successes).
    """
    a, b = _check_pairs(a, b)
    _check_samples(samples)
    _check_level(level)
    # The mean of a resample depends only on how often each value is drawn.
    values, counts = np.unique(a - b, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(a.size, counts / a.size, size=samples)
    low, high = np.quantile(draws @ values / a.size, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float((a - b).mean()), float(low), float(high))


def seed_bootstrap(values: ArrayLike, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Band:
    """Return the mean over training seeds with its percentile bootstrap interval (QPILOTS, "seed-level").

    Whole seeds are resampled, the same ones at all points: each seed is one observation, however many
    episodes it was judged on. With S seeds no interval is wider than their range, and a single seed has no
    interval: its band is the seed itself.

    Args:
        values: (S, ...) result of each seed, at any number of points.
        samples: bootstrap samples.
        level: of confidence.
        seed: of the resampling.

    Returns:
        Mean, low and high, each of the shape ``...`` of one seed's values.

    Raises:
        ValueError: there is no seed, a value is not finite, or an argument is out of range.

    Cost: a product of a (samples, S) with a (S, ...) array.
    """
    values = np.asarray(values, float)
    if values.ndim < 1 or not len(values):
        raise ValueError(f"values: expected one row per seed, shape (S, ...), got {values.shape}")
    _check_finite("values", values)
    _check_samples(samples)
    _check_level(level)
    n = len(values)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    low, high = np.quantile(
        np.tensordot(draws / n, values, axes=1), [(1 - level) / 2, (1 + level) / 2], axis=0
    )
    return Band(values.mean(0), low, high)


def interquartile_mean(scores: ArrayLike) -> float:
    """Return the mean of the middle half of all scores (IQM; Agarwal et al. 2021, arXiv:2108.13264).

    Of n scores, ``n // 4`` are dropped at either end, whichever run or task they are of. It is as robust as
    the median to a task that is always solved or never, and far less noisy.

    Args:
        scores: (S, T) score of each run (seed) on each task.

    Raises:
        ValueError: there are no scores, or one is NaN or infinite.
    """
    scores = np.asarray(scores, float)
    _check_finite("scores", scores)
    ordered = np.sort(scores, axis=None)
    if not ordered.size:
        raise ValueError("scores: expected at least one, got none")
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def stratified_bootstrap(
    scores: ArrayLike,
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    *,
    samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of a statistic over tasks (Agarwal et al. 2021, section 4.1).

    The runs of each task are resampled among themselves, so every resample has as many runs of every task as
    the scores: what differs between tasks does not widen the interval, what differs between seeds does.

    Args:
        scores: (S, T) score of each run (seed) on each task.
        statistic: of such an array, for example :func:`interquartile_mean` or ``numpy.mean``.
        samples: bootstrap samples.
        level: of confidence.
        seed: of the resampling.

    Raises:
        ValueError: the scores have another shape or are not finite, or an argument is out of range.

    Cost: ``samples`` calls of ``statistic``.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(
            f"scores: expected one row per seed and one column per task, shape (S, T), got {scores.shape}"
        )
    _check_finite("scores", scores)
    _check_samples(samples)
    _check_level(level)
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(np.take_along_axis(scores, rng.integers(len(scores), size=scores.shape), axis=0))
        for _ in range(samples)
    ]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def time_weighted_ema(x: ArrayLike, y: ArrayLike, alpha: float | int = 0.99) -> np.ndarray:
    """Smooth a curve as QPILOTS does (appendix C.4, alpha = 0.99): Weights & Biases' time-weighted average.

    Point j weighs ``w^(1000 (x_i - x_j) / (x_N - x_1))`` in the average at i >= j, ``w = sqrt(alpha)``, at
    most 0.999. Distances are in thousandths of the curve's whole range: alpha = 0.99 remembers about a fifth
    of it, however many points there are. Zero leaves the curve as it is.

    Args:
        x: (N,), increasing, such as environment steps.
        y: (N,), the curve.
        alpha: smoothing parameter in [0, 1].

    Raises:
        ValueError: lengths differ, ``x`` does not increase, or ``alpha`` is out of range.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1 or not np.all(np.diff(x) > 0):
        raise ValueError(
            f"x, y: expected equal lengths and increasing x, got shapes {x.shape} and {y.shape}, x = {x}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    weight = min(alpha**0.5, 0.999)
    smooth, total, mass = np.empty_like(y), 0.0, 0.0
    for i in range(len(x)):
        decay = weight ** (EMA_RANGE * (x[i] - x[i - 1]) / (x[-1] - x[0])) if i else 0.0
        total, mass = decay * total + y[i], decay * mass + 1
        smooth[i] = total / mass
    return smooth


def _check_pairs(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"a, b: expected outcomes of the same episodes, shapes (E,), got {a.shape} and {b.shape}; run "
            "both arms with the same seed and number of episodes"
        )
    _check_finite("a", a)
    _check_finite("b", b)
    return a, b


def _check_finite(name: str, values: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}: expected finite numbers, got {values[place]} at {place} (first of {len(bad)}); a run "
            "that has no result is not a score: leave it out, and say so"
        )


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, such as 0.95, got {level}")

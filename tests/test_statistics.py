"""Intervals against scipy, formulas, and exhaustive resampling."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest, trim_mean

from qsteer.statistics import (
    interquartile_mean,
    paired_bootstrap,
    paired_interval,
    seed_bootstrap,
    stratified_bootstrap,
    time_weighted_ema,
    wilson_interval,
)


class TestEpisodes:
    @pytest.mark.parametrize("level", [0.8, 0.95])
    @pytest.mark.parametrize("n", [1, 7, 100])
    def test_wilson_is_scipys(self, n: int, level: float) -> None:
        for k in range(n + 1):
            theirs = binomtest(k, n).proportion_ci(level, method="wilson")
            assert wilson_interval(k, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)

    def test_bootstrap_of_one_arm_against_nothing_is_the_binomial(self) -> None:
        """Resampled counts of a 0/1 arm are Binomial(n, rate): its quantiles are known."""
        hits = np.arange(100) < 30
        difference, low, high = paired_bootstrap(hits, np.zeros(100))
        assert difference == pytest.approx(0.3)
        assert (low, high) == pytest.approx(binom.ppf([0.025, 0.975], 100, 0.3) / 100, abs=0.011)

    def test_bootstrap_is_the_plain_one(self) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
        plain = (a - b)[rng.integers(40, size=(20_000, 40))].mean(1)
        expected = np.quantile(plain, [0.05, 0.95])
        got = paired_bootstrap(a, b, samples=20_000, level=0.9)
        assert (got.low, got.high) == pytest.approx(expected, abs=0.02)

    def test_bootstrap_identities(self) -> None:
        rng = np.random.default_rng(1)
        a, b = rng.random(60) < 0.7, rng.random(60) < 0.4
        there, back = paired_bootstrap(a, b, samples=50_000), paired_bootstrap(b, a, samples=50_000)
        assert there == pytest.approx((-back.difference, -back.high, -back.low), abs=0.02)
        assert paired_bootstrap(a, a) == (0, 0, 0)
        order = rng.permutation(60)
        assert paired_bootstrap(a[order], b[order]) == paired_bootstrap(a, b)
        wide = paired_bootstrap(np.sort(a), np.sort(b)[::-1])  # the same arms, paired worst
        assert wide.high - wide.low > there.high - there.low

    def test_mistakes(self) -> None:
        for k, n in ((-1, 3), (4, 3), (0, 0)):
            with pytest.raises(ValueError, match="0 <= successes <= n"):
                wilson_interval(k, n)
        with pytest.raises(ValueError, match="level"):
            wilson_interval(1, 2, 95.0)
        with pytest.raises(ValueError, match=r"got \(3,\) and \(4,\)"):
            paired_bootstrap(np.zeros(3), np.zeros(4))
        with pytest.raises(ValueError, match="samples"):
            paired_bootstrap([1], [0], samples=0)


class TestSeeds:
    @pytest.mark.parametrize("shape", [(8, 50), (5, 12), (3, 1), (1, 1)])
    def test_interquartile_mean_is_the_trimmed_mean_of_all_scores(self, shape: tuple[int, int]) -> None:
        scores = np.random.default_rng(0).random(shape)
        assert interquartile_mean(scores) == pytest.approx(trim_mean(scores, 0.25, axis=None))
        extreme = scores.copy()
        extreme[scores == scores.max()] = 1e9
        assert (interquartile_mean(extreme) == interquartile_mean(scores)) == (scores.size >= 4)

    @pytest.mark.parametrize("statistic", [interquartile_mean, np.mean])
    def test_stratified_bootstrap_against_all_resamples(self, statistic: Any) -> None:
        """Three seeds of two tasks have 3^6 resamples: the ends cut 10 % of them off."""
        scores = np.array([[0.11, 0.93], [0.23, 0.71], [0.47, 0.53]])
        everything = [
            statistic(np.stack([scores[list(a), 0], scores[list(b), 1]], 1))
            for a in product(range(3), repeat=3)
            for b in product(range(3), repeat=3)
        ]
        low, high = stratified_bootstrap(scores, statistic, level=0.8, samples=5_000)
        assert np.mean(np.less(everything, low)) == pytest.approx(0.1, abs=0.02)
        assert np.mean(np.greater(everything, high)) == pytest.approx(0.1, abs=0.02)

    def test_tasks_are_strata(self) -> None:
        """Seeds agree, tasks do not: resampling across tasks would give an interval."""
        scores = np.tile([0.0, 0.3, 0.6, 1.0], (5, 1))
        assert stratified_bootstrap(scores, samples=50) == pytest.approx((0.45, 0.45))

    def test_seed_bootstrap_against_all_resamples(self) -> None:
        """All of three seeds may be the lowest one: with 1 in 27, more than the 2.5 % beyond the interval."""
        values = np.array([10.0, 0.0, 1.0])
        assert seed_bootstrap(values) == pytest.approx((11 / 3, 0.0, 10.0))
        assert seed_bootstrap(values, level=0.8).low == pytest.approx(1 / 3)  # 1/27 < 10 % < 4/27
        points = np.random.default_rng(0).random((4, 6))
        resamples = np.array([points[list(rows)].mean(0) for rows in product(range(4), repeat=4)])
        band = seed_bootstrap(points, samples=20_000)
        assert band.mean == pytest.approx(points.mean(0))
        for point in range(6):
            below = np.mean(resamples[:, point] < band.low[point])
            assert below <= 0.025 <= np.mean(resamples[:, point] <= band.low[point] + 1e-9)

    def test_seed_bootstrap_resamples_whole_seeds(self) -> None:
        values = np.random.default_rng(0).random(5)
        band = seed_bootstrap(np.stack([values, 1 - 3 * values], 1), samples=200)
        assert band.high[1] == pytest.approx(1 - 3 * band.low[0])
        one = seed_bootstrap(values[None])
        assert np.array_equal(one.low, values)
        assert np.array_equal(one.high, values)

    def test_time_weighted_average_against_its_formula(self) -> None:
        rng = np.random.default_rng(0)
        x, y = np.cumsum(rng.random(30) + 0.1), rng.random(30)
        weights = np.tril(0.98 ** (0.5 * 1000 * (x[:, None] - x) / (x[-1] - x[0])))
        expected = (weights @ y) / weights.sum(1)
        assert time_weighted_ema(x, y, 0.98) == pytest.approx(expected)
        assert time_weighted_ema(1e6 * x - 7, y, 0.98) == pytest.approx(expected)
        assert np.array_equal(time_weighted_ema(x, y, 0.0), y)
        assert time_weighted_ema(x, y, 1.0) != pytest.approx(np.cumsum(y) / np.arange(1, 31))  # 0.999 at most
        assert np.array_equal(time_weighted_ema(x[:1], y[:1]), y[:1])

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match="at least one, got none"):
            interquartile_mean([])
        with pytest.raises(ValueError, match=r"one column per task, shape \(S, T\), got \(3,\)"):
            stratified_bootstrap([1.0, 2.0, 3.0])
        with pytest.raises(ValueError, match=r"one row per seed, shape \(S, ...\), got \(0, 4\)"):
            seed_bootstrap(np.zeros((0, 4)))
        for bootstrap in (seed_bootstrap, stratified_bootstrap):
            with pytest.raises(ValueError, match="level"):
                bootstrap(np.ones((2, 2)), level=95.0)
            with pytest.raises(ValueError, match="samples"):
                bootstrap(np.ones((2, 2)), samples=0)
        for x, y in (([0, 1], [1, 2, 3]), ([0, 0], [1, 2])):
            with pytest.raises(ValueError, match="increasing x"):
                time_weighted_ema(np.array(x, float), np.array(y, float))
        with pytest.raises(ValueError, match="alpha"):
            time_weighted_ema(np.arange(2.0), np.arange(2.0), 1.5)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_no_score(wrong: float) -> None:
    scores = np.ones((3, 2))
    scores[1, 0] = wrong
    for statistic in (interquartile_mean, stratified_bootstrap, seed_bootstrap):
        with pytest.raises(ValueError, match=r"expected finite numbers, got (nan|inf) at \(1, 0\)"):
            statistic(scores)
    with pytest.raises(ValueError, match=r"b: expected finite numbers, got (nan|inf) at \(1,\)"):
        paired_bootstrap(np.ones(3), scores[:, 0])
    with pytest.raises(ValueError, match="increasing x"):
        time_weighted_ema(np.array([0, wrong, np.nan]), np.ones(3))


def test_successes_are_counted_in_whole_numbers() -> None:
    for k, n in ((2.5, 5), (2, 5.5)):
        with pytest.raises(ValueError, match=f"whole numbers of episodes, got {k} of {n}"):
            wilson_interval(k, n)
    assert wilson_interval(2.0, 5.0) == wilson_interval(2, 5)


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize(
    ("gains", "losses"), [(0.3, 0.1), (0.2, 0.2), (0.1, 0.02), (0.5, 0.05), (0.03, 0.03)]
)
def test_the_paired_interval_covers_what_it_says(n: int, gains: float, losses: float) -> None:
    """The exact coverage: every outcome of n pairs, weighed by its probability."""
    covered, total = 0.0, 0.0
    for f in range(n + 1):
        for g in range(n + 1 - f):
            ways = math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in (f, g, n - f - g))
            chance = math.exp(ways) * gains**f * losses**g * (1 - gains - losses) ** (n - f - g)
            if chance < 1e-7:
                continue
            pairs = np.repeat([[1, 0], [0, 1], [1, 1]], [f, g, n - f - g], axis=0).T
            _, low, high = paired_interval(*pairs)
            covered += chance * (low <= gains - losses <= high)
            total += chance
    assert total > 0.999 and covered / total > 0.935


def test_the_paired_interval_is_tangos_and_mirrors() -> None:
    pairs = np.repeat([[1, 0], [0, 1], [1, 1]], [9, 1, 35], axis=0).T  # Tango (1998): n = 45, f, g = 9, 1
    there, back = paired_interval(*pairs), paired_interval(*pairs[::-1])
    assert there.difference == pytest.approx(8 / 45) and there.low < 8 / 45 < there.high
    assert (-back.high, -back.low) == pytest.approx((there.low, there.high))
    for d in there[1:]:  # the score at both ends is z
        q = min(np.linspace(1e-6, 1, 200_001), key=lambda q: -likelihood(q, d, 9, 1, 45))
        assert abs(8 - 45 * d) / (45 * (2 * q + d - d * d)) ** 0.5 == pytest.approx(1.95996, abs=2e-3)
    same = paired_interval([1, 0, 1], [1, 0, 1])
    assert same.difference == 0 and -same.low == pytest.approx(same.high) and same.high > 0.3
    with pytest.raises(ValueError, match=r"each 0 or 1, got other numbers; of returns take paired_bootstrap"):
        paired_interval([0.5, 1], [0, 1])


def likelihood(q: float, d: float, f: int, g: int, n: int) -> float:
    """The log-likelihood of rates q + d and q of pairs that one arm alone solves."""
    if q + d <= 0 or 1 - 2 * q - d <= 0:
        return -math.inf
    return f * math.log(q + d) + g * math.log(q) + (n - f - g) * math.log(1 - 2 * q - d)

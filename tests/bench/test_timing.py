"""Rounds, ratios and quantiles under made-up timers."""

import numpy as np
import pytest
import torch

from qsteer.bench import timing
from qsteer.bench.timing import Latency, peak_memory, time_calls

torch.set_num_threads(1)
CPU = torch.device("cpu")


class TestTiming:
    def test_every_round_has_every_call_in_an_order_of_its_own(self) -> None:
        def run(seed: int) -> list[str]:
            order: list[str] = []
            calls = {name: lambda name=name: order.append(name) for name in "abcd"}
            times = time_calls(calls, repeats=8, warmup=2, seed=seed)
            assert {len(t.times) for t in times.values()} == {8} and list(times) == list("abcd")
            return order

        rounds = [run(0)[i : i + 4] for i in range(0, 40, 4)]
        assert all(sorted(one) == list("abcd") for one in rounds)
        assert len({tuple(one) for one in rounds}) > 4
        assert run(0) == run(0) != run(1)

    def test_times_are_the_clocks(self) -> None:
        now = [0.0]
        spent = {"a": 0.25, "b": 0.5}
        calls = {name: lambda s=s: now.__setitem__(0, now[0] + s) for name, s in spent.items()}
        times = time_calls(calls, repeats=5, timer=lambda: now[0])
        for name, seconds in spent.items():
            assert times[name].times.tolist() == times[name].wall.tolist() == [1e3 * seconds] * 5

    def test_quantiles(self) -> None:
        found = Latency(np.arange(101.0))
        assert (found.p50, found.p95, found.p99) == (50, 95, 99)

    def test_ratio_pairs_the_rounds(self) -> None:
        drift = np.array([1.0, 10.0, 2.0])
        assert Latency(3 * drift).ratio(Latency(drift)) == pytest.approx(3)
        assert Latency(3 * drift).against(Latency(drift)) == pytest.approx((3, 3, 3))
        with pytest.raises(ValueError, match="got 2 and 1"):
            Latency(np.ones(2)).ratio(Latency(np.ones(1)))
        with pytest.raises(ValueError, match="repeats"):
            time_calls({"call": lambda: None}, repeats=0)
        with pytest.raises(ValueError, match="level"):
            Latency(drift).against(Latency(drift), level=95.0)

    def test_the_interval_is_that_of_the_median(self) -> None:
        """Of a resample of an odd number, the median's law is known: an order statistic's."""
        from scipy.stats import binom

        ratios = np.arange(1.0, 22.0)
        found = Latency(ratios).against(Latency(np.ones(21)), samples=20_000)
        at_most = binom.sf(10, 21, np.arange(1, 22) / 21)  # P(median of a resample <= k-th of 21)
        assert found.ratio == 11
        assert found.low == 1 + np.searchsorted(at_most, 0.025)
        assert found.high == 1 + np.searchsorted(at_most, 0.975)

    def test_memory_is_counted_on_cuda_alone(self) -> None:
        assert peak_memory(lambda: torch.ones(9), CPU) is None

    @pytest.mark.gpu
    def test_events_and_memory_on_cuda(self) -> None:
        x = torch.ones(2**20, device="cuda")
        found = time_calls({"a": lambda: x + 1, "b": lambda: [x + 1 for _ in range(50)]}, repeats=9)
        assert timing.on_cuda() and (found["a"].times > 0).all()
        assert (found["a"].wall >= 0.9 * found["a"].times).all()
        assert found["b"].p50 > found["a"].p50
        assert peak_memory(lambda: x + 1, x.device) == 4 * 2**20

"""Milliseconds, measured: several calls in turns, in an order drawn anew each round."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

type Timer = Callable[[], float]
"""Returns seconds."""


class Ratio(NamedTuple):
    """A ratio of two times and its confidence interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Times of one call, in milliseconds; ``times[i]`` of two arms measured together belong to one round.

    Attributes:
        times: (R,) of each round: of the device's own events on CUDA, of the clock elsewhere.
        wall: (R,) until the device was done, by the host's clock: what a robot waits for. The same as
            ``times`` where there are no device events.
    """

    times: Float[np.ndarray, "R"]
    wall: Float[np.ndarray, "R"] | None = None

    def quantile(self, q: float) -> float:
        """Return a quantile of the times, q in [0, 1]."""
        return float(np.quantile(self.times, q))

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)

    @property
    def p95(self) -> float:
        """The 95 % quantile."""
        return self.quantile(0.95)

    @property
    def p99(self) -> float:
        """The 99 % quantile; of fewer than 100 rounds little more than the slowest one."""
        return self.quantile(0.99)

    def ratio(self, other: "Latency") -> float:
        """Return the median over rounds of this time over the other's, steady where both drift alike."""
        return float(np.median(self._ratios(other)))

    def against(
        self, other: "Latency", *, level: float = 0.95, samples: int = 10_000, seed: int = 0
    ) -> Ratio:
        """Return :meth:`ratio` with its percentile bootstrap interval: rounds are resampled, in pairs.

        Args:
            other: what was measured in the same rounds.
            level: of confidence.
            samples: bootstrap samples.
            seed: of the resampling.

        Raises:
            ValueError: they are not of the same rounds, or an argument is out of its range.
        """
        if not 0 < level < 1 or samples < 1:
            raise ValueError(
                f"level, samples: expected a level in (0, 1) and at least 1, got {level}, {samples}"
            )
        ratios = self._ratios(other)
        draws = np.random.default_rng(seed).integers(len(ratios), size=(samples, len(ratios)))
        low, high = np.quantile(np.median(ratios[draws], axis=1), [(1 - level) / 2, (1 + level) / 2])
        return Ratio(float(np.median(ratios)), float(low), float(high))

    def _ratios(self, other: "Latency") -> Float[np.ndarray, "R"]:
        if len(self.times) != len(other.times):
            raise ValueError(
                f"ratio: expected times of the same rounds, got {len(self.times)} and {len(other.times)}; "
                "measure both together: time_calls({...})"
            )
        return self.times / other.times


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    timer: Timer | None = None,
    seed: int = 0,
) -> dict[str, Latency]:
    """Time several calls in rounds, each once a round, so that a busy or throttled machine slows all alike.

    The order within a round is drawn anew, so that no call always follows the same one, on a cache or a
    clock rate that it left behind.

    Where CUDA is in use, two events on the current stream bracket each call and the device is waited for
    once, after the second: the time is the device's from the first to the second event, waiting for the
    host's launches included. Give a timer to have its time instead.

    Args:
        calls: what to time, by name.
        repeats: timed rounds.
        warmup: rounds before them.
        timer: returns seconds; ``time.process_time`` counts the CPU's, which other processes do not stretch.
            None: device events where CUDA is in use, else ``time.perf_counter``.
        seed: of the order.

    Raises:
        ValueError: no calls, no rounds, or a negative warm-up.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise ValueError(
            f"calls, repeats, warmup: expected at least 1, 1 and 0, got {len(calls)}, {repeats} and {warmup}"
        )
    names, order = list(calls), np.random.default_rng(seed)
    times = {name: np.zeros((2, repeats)) for name in calls}
    for i in range(-warmup, repeats):
        for k in order.permutation(len(names)):
            spent = _time_on_device(calls[names[k]]) if timer is None and on_cuda() else None
            spent = _time_by_timer(calls[names[k]], timer or time.perf_counter) if spent is None else spent
            if i >= 0:
                times[names[k]][:, i] = spent
    return {name: Latency(t, wall) for name, (t, wall) in times.items()}


def on_cuda() -> bool:
    """Return whether CUDA is in use."""
    return torch.cuda.is_initialized()


def _time_by_timer(call: Callable[[], object], timer: Timer) -> tuple[float, float]:
    """Return the milliseconds of a call, twice."""
    started = _read(timer)
    call()
    elapsed = 1e3 * (_read(timer) - started)
    return elapsed, elapsed


def _time_on_device(call: Callable[[], object]) -> tuple[float, float]:
    """Return a call's milliseconds by the device's events, and by the host's clock."""
    started = _read(time.perf_counter)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last), 1e3 * (time.perf_counter() - started)


def _read(timer: Timer) -> float:
    if on_cuda():
        torch.cuda.synchronize()
    return timer()


def peak_memory(call: Callable[[], object], device: torch.device, held: int = 0) -> int | None:
    """Return the bytes which a call takes on a CUDA device beyond what stands there; None elsewhere.

    A replayed graph takes nothing then: what it works in stands there since the capture, and is ``held``.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    stands = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return held + torch.cuda.max_memory_allocated(device) - stands


def reserved_memory(device: torch.device) -> int:
    """Return the bytes which torch keeps on a CUDA device, for graphs too; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)

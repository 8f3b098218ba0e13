"""What an action costs: evaluations of policy and critic, counted, and milliseconds, measured."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from qsteer.maps.networks import ChunkNetwork
from qsteer.rules import truncated
from qsteer.samplers import Euler
from qsteer.sampling import sample
from qsteer.types import Field, Rule, Sampler, Value


@dataclass
class Passes:
    """Passes through one network; a row is one action chunk in one pass."""

    forwards: int = 0
    backwards: int = 0
    forward_rows: int = 0
    backward_rows: int = 0

    def seen(self, output: Tensor) -> Tensor:
        """Count the forward that made ``output``, (B, H, A), (B,) or (J, B), and a backward if one comes."""
        self.forwards += 1
        self.forward_rows += (rows := output.shape[0] if output.ndim == 3 else output.shape[-1])
        output = output.view_as(output)  # a node of its own; the network may return its input
        if output.requires_grad:
            output.register_hook(lambda _: self._backward(rows))
        return output

    def _backward(self, rows: int) -> None:
        self.backwards += 1
        self.backward_rows += rows


@dataclass(frozen=True)
class Cost:
    """Evaluations behind one call of :func:`qsteer.sample`.

    A call of a critic's whole ensemble is one pass, and so is a call on many rows: passes are what a small
    batch waits for, rows what a full device computes. ``map`` counts learnt maps, not their encoding of the
    observation.
    """

    field: Passes = attribute(default_factory=Passes)
    value: Passes = attribute(default_factory=Passes)
    map: Passes = attribute(default_factory=Passes)

    def __str__(self) -> str:
        parts = {"policy": self.field, "critic": self.value}
        if self.map.forwards:
            parts["map"] = self.map
        return ", ".join(f"{name} {p.forwards} forward {p.backwards} backward" for name, p in parts.items())


@dataclass(frozen=True)
class CountedField:
    """A field whose passes are counted; it has its field's own attributes."""

    inner: Field
    passes: Passes

    def __call__(self, x: Float[Tensor, "B H A"], t: Float[Tensor, "B"]) -> Float[Tensor, "B H A"]:
        """Return the velocity, and count."""
        return self.passes.seen(self.inner(x, t))

    def repeat(self, k: int) -> "CountedField":
        """Return the repeated field, counted together with this one."""
        return replace(self, inner=self.inner.repeat(k))

    def truncated(self, layers: int) -> "CountedField":
        """Return the field with a truncated gradient, counted together with this one."""
        return replace(self, inner=truncated(self.inner, layers))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class CountedValue:
    """A value whose passes are counted; it has its value's own attributes."""

    inner: Value
    passes: Passes

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the value, and count."""
        return self.passes.seen(self.inner(a))

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return the members' values, and count one pass."""
        return self.passes.seen(self.inner.members(a))

    def repeat(self, k: int) -> "CountedValue":
        """Return the repeated value, counted together with this one."""
        return replace(self, inner=self.inner.repeat(k))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@contextmanager
def counted_maps(passes: Passes) -> Iterator[None]:
    """Count the passes of every learnt map's network in the block."""

    def seen(module: nn.Module, args: Any, output: Any) -> Any:
        return passes.seen(output) if isinstance(module, ChunkNetwork) else None

    hook = register_module_forward_hook(seen)
    try:
        yield
    finally:
        hook.remove()


def count(
    field: Field,
    value: Value | None,
    noise: Float[Tensor, "B H A"],
    rule: Rule | None = None,
    sampler: Sampler = Euler(),  # noqa: B008 (frozen)
) -> Cost:
    """Sample one batch of actions and count what was evaluated; with one row of noise, rows are per action.

    Arguments are those of :func:`qsteer.sample`.
    """
    cost = Cost()
    counted = None if value is None else CountedValue(value, cost.value)
    with counted_maps(cost.map):
        sample(CountedField(field, cost.field), counted, noise, rule=rule, sampler=sampler)
    return cost


@dataclass(frozen=True)
class Latency:
    """Times of one call, in milliseconds; ``times[i]`` of two arms measured together belong to one round."""

    times: Float[np.ndarray, "R"]

    @property
    def median(self) -> float:
        """The median."""
        return float(np.median(self.times))

    @property
    def low(self) -> float:
        """The 10 % quantile."""
        return float(np.quantile(self.times, 0.1))

    @property
    def high(self) -> float:
        """The 90 % quantile."""
        return float(np.quantile(self.times, 0.9))

    def ratio(self, other: "Latency") -> float:
        """Return the median over rounds of this time over the other's, steady where both drift alike."""
        if len(self.times) != len(other.times):
            raise ValueError(
                f"ratio: expected times of the same rounds, got {len(self.times)} and {len(other.times)}; "
                "measure both together: latencies({...})"
            )
        return float(np.median(self.times / other.times))

    def __str__(self) -> str:
        return f"{self.median:.1f} ms ({self.low:.1f} to {self.high:.1f})"


def latency(call: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> Latency:
    """Time one call; see :func:`latencies`."""
    return latencies({"call": call}, repeats=repeats, warmup=warmup)["call"]


def latencies(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time several calls in turns, one of each a round, so that a busy or throttled machine slows all alike.

    Waits for CUDA before each clock reading when CUDA is in use.

    Args:
        calls: what to time, by name.
        repeats: timed rounds.
        warmup: rounds before them.
        clock: returns seconds; ``time.process_time`` counts the CPU's, which other processes do not stretch.

    Raises:
        ValueError: no calls, no rounds, or a negative warm-up.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise ValueError(
            f"calls, repeats, warmup: expected at least 1, 1 and 0, got {len(calls)}, {repeats} and {warmup}"
        )
    times = {name: np.zeros(repeats) for name in calls}
    for i in range(-warmup, repeats):
        for name, call in calls.items():
            started = _now(clock)
            call()
            elapsed = _now(clock) - started
            if i >= 0:
                times[name][i] = 1e3 * elapsed
    return {name: Latency(t) for name, t in times.items()}


def _now(clock: Callable[[], float]) -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock()

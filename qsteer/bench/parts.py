"""Where an action's time goes: prefix, denoising, backward through the policy, critic, learnt maps, the rest.

Measured in a run of its own, in which marks are set where one part ends and another begins: events of the
device on CUDA, readings of a clock elsewhere. The time between two marks belongs to the part that was begun
last, so that the parts add up to the whole. Marks cost time themselves and keep the host from running ahead
no more than any hook does; the whole is therefore measured without them, by :mod:`qsteer.bench.timing`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from qsteer.bench.counting import Around, Watched
from qsteer.bench.timing import Latency, Timer
from qsteer.maps.networks import ChunkNetwork
from qsteer.types import Bindable, Rule, Sampler, Value

PARTS = ("prefix", "denoising", "policy backward", "critic", "map", "guidance")
"""Prefix: all before the first step but the critic's encoder. Denoising: the policy's forwards. Critic: its
encoder, forwards and backwards. Map: a learnt map's network. Guidance: the rest, all arithmetic of rule and
sampler and what the host does with the finished chunk."""


class Marks:
    """Marks in time with the part which begins at each; parts nest, and the innermost one counts.

    Args:
        now: reads the clock: returns seconds, or a recorded CUDA event.
    """

    def __init__(self, now: Callable[[], Any]) -> None:
        self.now = now
        self.marks: list[tuple[Any, str]] = []
        self.open: list[str] = []

    def begin(self, part: str) -> None:
        """Begin a part inside the one that is open."""
        self.open.append(part)
        self.marks.append((self.now(), part))

    def end(self) -> None:
        """Go back to the part around this one."""
        self.open.pop()
        self.marks.append((self.now(), self.open[-1] if self.open else ""))

    def turn(self, part: str) -> None:
        """End the innermost part and begin another in its place."""
        self.open.pop()
        self.begin(part)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block to a part."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def around(self, forward: str, backward: str) -> Around:
        """Return what times a network: its forwards to one part, its backwards to another.

        autograd evaluates what was recorded later first, so that between the gradient of the network's output
        and that of its input nothing but the network is differentiated.
        """

        def call(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            with self.part(forward):
                (seen,), entered = self.entering(backward, [x])
                return self.left(network(seen), backward) if entered else network(x)

        return call

    def entering(self, backward: str, inputs: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """Return a network's inputs with a hook at which its backward ends, and whether there will be one."""
        waiting = sum(x.requires_grad for x in inputs) if torch.is_grad_enabled() else 0
        if not waiting:
            return list(inputs), False
        left = [waiting]

        def reached(_: Tensor) -> None:
            left[0] -= 1
            if not left[0]:
                left[0] = waiting  # a graph may be differentiated twice
                self.end()

        views = [x.view_as(x) if x.requires_grad else x for x in inputs]
        for view in views:
            if view.requires_grad:
                view.register_hook(reached)
        return views, True

    def left(self, output: Tensor, backward: str) -> Tensor:
        """Return a network's output with a hook at which its backward begins."""
        output = output.view_as(output)
        if output.requires_grad:
            output.register_hook(lambda _: self.begin(backward))
        return output

    @contextmanager
    def maps(self) -> Iterator[None]:
        """Count the passes of every learnt map's network in the block to ``map``."""

        def before(module: nn.Module, args: Any) -> Any:
            if not isinstance(module, ChunkNetwork):
                return None
            self.begin("map")
            z, chunks, times = args
            return z, self.entering("map", chunks)[0], times

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(module, ChunkNetwork):
                return None
            self.end()
            differentiated = torch.is_grad_enabled() and any(chunk.requires_grad for chunk in args[1])
            return self.left(output, "map") if differentiated else output

        hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def milliseconds(self, between: Callable[[Any, Any], float]) -> dict[str, float]:
        """Return the time of each part, in the order of first marks; ``between`` two readings lie ms."""
        spent: dict[str, float] = {}
        for (mark, part), (following, _) in zip(self.marks, self.marks[1:], strict=False):
            spent[part] = spent.get(part, 0.0) + between(mark, following)
        return spent


@dataclass(frozen=True)
class TimedCritic:
    """A critic the time of whose encoder is the critic's; it has its critic's own attributes."""

    inner: Bindable
    marks: Marks

    def bind(self, obs: Any) -> Value:
        """Encode the observation."""
        with self.marks.part("critic"):
            return self.inner.bind(obs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Timed(Sampler):
    """A method whose parts are timed, beginning where the prefix ends."""

    method: Watched
    marks: Marks

    @classmethod
    def of(cls, rule: Rule | None, sampler: Sampler, marks: Marks) -> "Timed":
        """Return the method as a sampler which sets marks."""
        field, value = marks.around("denoising", "policy backward"), marks.around("critic", "critic")
        return cls(Watched(rule, sampler, field, value), marks)

    def __call__(self, field: Any, value: Any, noise: Tensor) -> Tensor:
        """Return the method's action."""
        self.marks.turn("guidance")
        return self.method(field, value, noise)


def measure_parts(
    action: Callable[[Marks], Callable[[], object]],
    *,
    device: torch.device,
    repeats: int = 20,
    warmup: int = 3,
    timer: Timer = time.perf_counter,
) -> dict[str, Latency]:
    """Time the parts of an action.

    Args:
        action: given marks, returns the call that makes an action under a :class:`Timed` method with a
            :class:`TimedCritic`, both of these marks. The call begins in ``prefix``.
        device: where it runs.
        repeats: timed actions.
        warmup: actions before them.
        timer: returns seconds; not asked on CUDA.

    Returns:
        The times of each of :data:`PARTS`, and of the ``whole``, their sum.
    """
    marks = Marks(_record_event if device.type == "cuda" else timer)
    between = _subtract_events if device.type == "cuda" else _subtract_readings
    call = action(marks)
    rounds = []
    for i in range(-warmup, repeats):
        marks.marks.clear()
        with marks.maps(), marks.part("prefix"):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 0:
            rounds.append(marks.milliseconds(between))
    times = {part: np.array([spent.get(part, 0.0) for spent in rounds]) for part in PARTS}
    times["whole"] = np.sum(list(times.values()), axis=0)
    return {part: Latency(spent) for part, spent in times.items()}


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _subtract_events(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
    return first.elapsed_time(last)


def _subtract_readings(first: float, last: float) -> float:
    return 1e3 * (last - first)

"""What an action costs in evaluations of policy, critic and learnt maps, counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from qsteer.clock import Chain, Clock, Time
from qsteer.maps.networks import ChunkNetwork
from qsteer.samplers import Euler
from qsteer.sampling import sample
from qsteer.types import Bounds, Field, Rule, Sampler, Value

type Around = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""``(network, x) -> network(x)``, and whatever is to happen before and after."""


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
            output.register_hook(lambda _: self.backward(rows))
        return output

    def around(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Evaluate the network, and count."""
        return self.seen(network(x))

    def backward(self, rows: int) -> None:
        """Count a backward of ``rows`` rows."""
        self.backwards += 1
        self.backward_rows += rows


@dataclass
class PassesByRows(Passes):
    """Passes which also say how many of them had how many rows.

    Attributes:
        forwards_of: number of forwards by their rows.
        backwards_of: number of backwards by their rows.
    """

    forwards_of: Counter[int] = attribute(default_factory=Counter)
    backwards_of: Counter[int] = attribute(default_factory=Counter)

    def seen(self, output: Tensor) -> Tensor:
        """Count as :class:`Passes` does, and by rows."""
        before = self.forward_rows
        output = super().seen(output)
        self.forwards_of[self.forward_rows - before] += 1
        return output

    def backward(self, rows: int) -> None:
        """Count as :class:`Passes` does, and by rows."""
        super().backward(rows)
        self.backwards_of[rows] += 1


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
class WatchedField(Field):
    """A field with something around each of its calls."""

    inner: Field
    around: Around

    def __call__(self, x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Return the velocity."""
        return self.around(lambda x: self.inner(x, t), x)

    def repeat(self, k: int) -> "WatchedField":
        """Return the repeated field, watched together with this one."""
        return replace(self, inner=self.inner.repeat(k))

    def truncated(self, layers: int) -> "WatchedField":
        """Return the field with a truncated gradient, watched together with this one."""
        return replace(self, inner=self.inner.truncated(layers))

    def chain(self, steps: int | None, part: Chain | None = None) -> "WatchedField":
        """Return the field for one chain, watched together with this one."""
        return replace(self, inner=self.inner.chain(steps, part))

    def advance(
        self, x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time, dt: Time
    ) -> Float[Tensor, "B H A"]:
        """Return the state after a step by the velocity ``v``, which is not watched."""
        return self.inner.advance(x, v, t, dt)

    @property
    def base(self) -> "WatchedField":
        """The field before any rule, watched together with this one."""
        return replace(self, inner=self.inner.base)

    @property
    def clock(self) -> Clock:  # type: ignore[override]
        """The field's clock."""
        return self.inner.clock

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]
        """The field's bounds."""
        return self.inner.bounds

    @property
    def features(self) -> Any:
        """The field's features."""
        return self.inner.features

    @property
    def dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """What the field computes in."""
        return self.inner.dtype


@dataclass(frozen=True)
class WatchedValue(Value):
    """A value with something around each of its calls."""

    inner: Value
    around: Around

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the value."""
        return self.around(self.inner, a)

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return the members' values; one call."""
        return self.around(self.inner.members, a)

    def repeat(self, k: int) -> "WatchedValue":
        """Return the repeated value, watched together with this one."""
        return replace(self, inner=self.inner.repeat(k))

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        """The value's mask."""
        return self.inner.mask


@dataclass(frozen=True)
class Watched(Sampler):
    """A method whose field and value are watched: a sampler that ``steer`` and ``sample`` take as any other.

    Args:
        rule: the method's rule; None: it has none.
        sampler: the method's sampler.
        field: what is to happen around the calls of the field.
        value: what is to happen around the calls of the value.
    """

    rule: Rule | None
    sampler: Sampler
    field: Around
    value: Around

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return what the method makes of the watched field and value."""
        if value is None and self.rule is not None:
            raise ValueError(
                "value: expected a value for the rule to follow, got None; pass critic.bind(obs)"
            )
        watched = WatchedField(field, self.field)
        scored = None if value is None else WatchedValue(value, self.value)
        steered = watched if self.rule is None or scored is None else self.rule(watched, scored)
        return self.sampler(steered, scored, noise)


def count_into(cost: Cost, rule: Rule | None, sampler: Sampler) -> Watched:
    """Return the method as a sampler which counts the passes of policy and critic into ``cost``."""
    return Watched(rule, sampler, cost.field.around, cost.value.around)


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


@dataclass
class Saved:
    """Tensors which autograd kept for backwards: each time one is kept it counts, weights too.

    Attributes:
        tensors: how many.
        bytes: of them together.
    """

    tensors: int = 0
    bytes: int = 0


@contextmanager
def saved_tensors() -> Iterator[Saved]:
    """Count what autograd keeps in the block: nothing, when nothing is differentiated."""
    saved = Saved()

    def keep(tensor: Tensor) -> Tensor:
        saved.tensors += 1
        saved.bytes += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


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
    with counted_maps(cost.map):
        sample(field, value, noise, sampler=count_into(cost, rule, sampler))
    return cost

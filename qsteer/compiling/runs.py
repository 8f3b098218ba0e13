"""One kind of action, on buffers of its own: run eagerly, or captured as a CUDA graph."""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.compiling.hidden import Watch, check_nothing_hidden
from qsteer.compiling.kinds import autocast, rebuilt, tensors_in
from qsteer.trace import ActionRecord, Trace
from qsteer.types import Rule

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""Largest relative difference from the host's velocity or its gradient, and of a graph's action.

In bfloat16 the host's own gradient is 3 % off what its weights give in float32 (18 layers of width 512)."""
TENSOR_FLOAT = 5e-3
"""The same in float32 on CUDA, where products may be of ten bits: 1e-3 off at 8 layers of width 512."""
EAGER = "stays eager"
"""How the state of a run begins that could not be compiled."""
REHEARSALS = 3
"""Runs before a capture: libraries choose kernels and allocate in them."""
_capturing = threading.Lock()
"""CUDA captures one graph at a time."""


class MismatchError(RuntimeError):
    """The fast path does not do what the host does."""


class Kind(NamedTuple):
    """A kind of action: a function, and what it is given.

    Attributes:
        act: makes the action of ``inputs``, or of a tree like it.
        inputs: a tree (:func:`qsteer.compiling.kinds.signature`) whose tensors change between actions.
        rule: its generators are part of the action.
        wanted: by a trace, see :attr:`~qsteer.Trace.wanted`.
        weights: all tensors that may enter beside the inputs'.
        device: where it is made.
    """

    act: Callable[[Any], Tensor]
    inputs: Any
    rule: Rule | None
    wanted: tuple[bool, bool]
    weights: Sequence[Tensor]
    device: torch.device


class Run:
    """A kind of action on buffers of its own.

    Args:
        kind: the tensors of its inputs are copied.
        stream: for a graph, see :class:`Captured`; None: none is captured.

    Raises:
        TypeError: a tensor enters the action that is none of the kind's.
    """

    finished: threading.Event
    """Set once the run is as fast as it will be."""
    state = "runs eagerly"
    """What has become of it, in words."""
    family: Hashable = None
    """What the run has in common with those of other functions or numbers."""

    def __init__(self, kind: Kind, stream: torch.cuda.Stream | None = None) -> None:
        self.stream = stream
        self.finished = threading.Event()
        self.finished.set()
        self.buffers = [tensor.clone() for tensor in tensors_in(kind.inputs)]
        self.kind = kind._replace(inputs=rebuilt(kind.inputs, iter(self.buffers)))
        self.autocast = autocast(kind.device)
        with unmoved(kind.rule, kind.device), Watch([*self.buffers, *kind.weights]) as watch:
            self.rehearse()
        check_nothing_hidden(watch.hidden)

    def __call__(self, tensors: list[Tensor], trace: Trace) -> Float[Tensor, "B H A"]:
        """Return the action for these tensors in the buffers."""
        self.fill(tensors)
        action, found = self.act()
        found.hand_over(trace)
        return action

    def fill(self, tensors: list[Tensor]) -> None:
        """Copy tensors into the buffers."""
        torch._foreach_copy_(self.buffers, tensors)

    def rehearse(self) -> None:
        """Run the action once, before the first."""
        self.act()

    def act(
        self, buffers: Sequence[Tensor] | None = None, on_step: Callable[[], None] | None = None
    ) -> tuple[Float[Tensor, "B H A"], ActionRecord]:
        """Compute the action of what is in the buffers, or in others, and what is reported of it."""
        tensors = self.buffers if buffers is None else buffers
        inputs = rebuilt(self.kind.inputs, iter(tensors))  # which have cached nothing
        enabled, dtype = self.autocast
        cast = torch.autocast(self.kind.device.type, dtype, enabled, cache_enabled=False)
        with cast, ActionRecord(*self.kind.wanted, on_step).collect() as found:
            return self.kind.act(inputs), found


class Captured:
    """What makes an action of buffers that stay where they are, captured as a CUDA graph.

    Networks are part of the graph by address: a :class:`~qsteer.critics.LiveCritic` that learns in place is
    seen. Noise that rule or sampler draw comes from the device's generator, as without a graph. Other threads
    may compute while it is captured, but not draw from that generator. After a CUDA error in the capture
    torch is in no state to go on.

    Args:
        act: makes the action.
        rule: whose generators are part of it.
        stream: where it is rehearsed and captured; no other living graph has been captured on it, for
            cuBLAS keeps a workspace for each stream, and graphs remember its address.
    """

    def __init__(
        self,
        act: Callable[[], tuple[Tensor, ActionRecord]],
        rule: Rule | None,
        device: torch.device,
        stream: torch.cuda.Stream,
    ) -> None:
        self.act, self.graph = act, torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(device)
        with _capturing, torch.cuda.device(device), unmoved(rule, device):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(REHEARSALS):
                    self.act()
                for generator in own_generators(rule, device):
                    self.graph.register_generator_state(generator)
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.action, self.found = self.act()
            current.wait_stream(stream)

    def __call__(self, trace: Trace) -> Float[Tensor, "B H A"]:
        """Return the action for what is in the buffers."""
        self.graph.replay()
        self.found.copy().hand_over(trace)
        return self.action.clone()


class GraphRun(Run):
    """A :class:`Run` that is captured when it is made, and checked.

    Args:
        kind: of the action.
        stream: see :class:`Captured`.

    Raises:
        MismatchError: the graph's action differs from the eager one on inputs it has not seen.
        TypeError: as for :class:`Run`.
    """

    def __init__(self, kind: Kind, stream: torch.cuda.Stream) -> None:
        super().__init__(kind, stream)
        self.captured = Captured(self.act, kind.rule, kind.device, stream)
        with unmoved(kind.rule, kind.device):
            self.check()

    def __call__(self, tensors: list[Tensor], trace: Trace) -> Float[Tensor, "B H A"]:
        """Return the action for these tensors in the buffers."""
        self.fill(tensors)
        return self.captured(trace)

    def check(self) -> None:
        """Compare the graph with the eager computation on inputs that it was not captured on."""
        self.fill([unlike(buffer) for buffer in self.buffers])
        with unmoved(self.kind.rule, self.kind.device):
            eager, _ = self.act()
        with unmoved(self.kind.rule, self.kind.device):
            self.captured.graph.replay()
        check_alike("the graph's action", self.captured.action, eager, self.buffers)


def check_alike(name: str, got: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Raise unless two tensors agree to what the least precise of the inputs allows."""
    enabled, coarse = autocast(got.device)
    dtypes = {tensor.dtype for tensor in inputs} | ({coarse} if enabled else set())
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    if got.is_cuda and torch.float32 in dtypes:
        tolerance = max(tolerance, TENSOR_FLOAT)
    off = float((got - expected).norm() / (expected.norm() + 1e-12))
    if not off <= tolerance:
        raise MismatchError(
            f"compile: expected {name} to be the host's within {tolerance} (relative norm), got {off:.2g}; "
            "leave compile out, and report it"
        )


def unlike(x: Tensor) -> Tensor:
    """Return a tensor that differs a little from x if it can."""
    return x * (1 + 0.01 * torch.randn_like(x)) if x.is_floating_point() else x


def own_generators(rule: Rule | None, device: torch.device) -> list[torch.Generator]:
    """Return the random generators on a device that a rule has of its own."""
    return [] if rule is None else rule.generators(device)


@contextmanager
def unmoved(rule: Rule | None, device: torch.device) -> Iterator[None]:
    """Leave all random generators as they were before the block."""
    before = {generator: generator.get_state() for generator in own_generators(rule, device)}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    for generator in own_generators(rule, device):
        if generator in before:
            generator.set_state(before[generator])
        else:
            generator.manual_seed(generator.initial_seed())

"""The fast path: whole actions on buffers that stay where they are, replayed as one CUDA graph.

An action is a function of tensors: the prefix, the critic's encoding of the observation, the noise. Given
buffers for these, the same rule and sampler run the same kernels on the same addresses for every action, so
that on CUDA they can be captured once and replayed as one graph, ten Euler steps, critic, backward passes and
all. :class:`Compiled` keeps one :class:`Run` for each kind of action it meets.

Without a graph (``"static"``) the same code runs eagerly, on any device: the reference for the graph.
"""

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.hosts import autocast, numerics
from qsteer.sampling import steered_action
from qsteer.steering.hidden import Watch, check_nothing_hidden, known
from qsteer.steering.kinds import alike, rebuilt, signature, state_of, tensors_in
from qsteer.trace import ActionRecord, Trace
from qsteer.types import Field, Rule, Sampler, Value

Mode = Literal["static", "graph"]
KEPT = 4
"""Kinds of action (shapes, method, critic) kept ready; a new one replaces the least recently used."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""Largest relative difference from the host's velocity or its gradient, and of a graph's action.

In bfloat16 the host's own gradient is 3 % off what its weights give in float32 (18 layers of width 512)."""
TENSOR_FLOAT = 5e-3
"""The same in float32 on CUDA, where products may be of ten bits: 1e-3 off at 8 layers of width 512."""
REHEARSALS = 3
"""Runs before a capture: libraries choose kernels and allocate in them."""
_capturing = threading.Lock()
"""CUDA captures one graph at a time."""


class MismatchError(RuntimeError):
    """The fast path does not do what the host does."""


class Compiled:
    """Samples actions like :func:`qsteer.sample`, on static buffers.

    Fields and values must be frozen dataclasses, whose tensors are copied into the buffers and whose other
    parts (networks, numbers) make the kind of action; a kind that is new is captured anew.

    Args:
        mode: ``graph``: replay a CUDA graph; ``static``: run the same code on the same buffers eagerly.
        make_prepare: returns what makes of a field the same with all that does not change between steps
            computed once; called anew when the weights have changed.
        policy: whose fields they are.
        device: where the policy is; for a graph, on CUDA.
    """

    def __init__(
        self,
        mode: Mode,
        make_prepare: Callable[[], Callable[[Any], Field]],
        policy: Any = None,
        device: torch.device | None = None,
    ) -> None:
        self.mode, self.make_prepare, self.policy, self.device = mode, make_prepare, policy, device
        self._prepare: Callable[[Any], Field] | None = None
        self._state: Hashable = None  # a policy that is being copied has none yet
        self._turn, self._holder = threading.Lock(), 0
        self._runs: OrderedDict[Hashable, Run] = OrderedDict()
        self._warned = False
        self._beside: dict[Any, torch.cuda.Stream] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        """Return one that has captured nothing: what was captured runs on this one's networks."""
        make, policy = deepcopy((self.make_prepare, self.policy), memo)
        return Compiled(self.mode, make, policy, self.device)

    @property
    def streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The stream in use, and its own for what may be computed beside the policy's prefix."""
        current = torch.cuda.current_stream(self.device)
        if current not in self._beside:
            self._beside[current] = torch.cuda.Stream(self.device)
        return current, self._beside[current]

    def __call__(
        self,
        field: Field,
        value: Value,
        noise: Float[Tensor, "B H A"],
        rule: Rule | None,
        sampler: Sampler,
        trace: Trace,
    ) -> Float[Tensor, "B H A"]:
        """Sample actions; arguments as of :func:`qsteer.sample`.

        When a kind of action is new, the prepared field is compared with ``field``, and all tensors that
        enter the action are looked at.

        Raises:
            MismatchError: the two fields differ, or a graph does not do what was captured.
            RuntimeError: the action is part of another one of this policy.
            TypeError: a tensor enters the action that is none of its inputs, nor a network's.
        """
        tensors: list[Tensor] = []
        prepared = self.prepare()(field)
        inputs, switches = (prepared, value, noise), numerics(noise.device)
        method = signature((rule, sampler), []), id(rule), id(sampler), trace.wanted, switches
        kind = signature(inputs, tensors), method
        with self._alone(), self._in_order(noise.device):
            if kind not in self._runs:
                check_field(prepared, field, noise)
                family = signature(inputs, [], alike), method
                self._warn_of_kinds(family)
                self._runs[kind] = self._new(inputs, rule, sampler, trace.wanted)
                self._runs[kind].family = family
            self._runs.move_to_end(kind)
            return self._runs[kind](tensors, trace)

    def prepare(self) -> Callable[[Any], Field]:
        """Return what prepares a field; made anew if the policy has changed since."""
        with self._alone():
            if self._prepare is None or state_of(self.policy) != self._state:
                self._prepare = self.make_prepare()
                self._state = state_of(self.policy)
                self._runs.clear()
            return self._prepare

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one thread in at a time, and refuse one that is in already."""
        if self._holder == threading.get_ident():
            raise RuntimeError(
                "compile: expected a critic that leaves its policy alone, got a call of the steered policy "
                "inside its own action; give the critic a copy made before qsteer.steer, or leave compile out"
            )
        with self._turn:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0

    def _warn_of_kinds(self, family: Hashable) -> None:
        """Warn once of actions that differ in functions or numbers only: each would be captured anew."""
        if not self._warned and sum(run.family == family for run in self._runs.values()) >= 2:
            self._warned = True
            warnings.warn(
                "compile: expected critic.bind to return the same function and numbers each time, got a "
                "third that differs in them alone, and each is checked or captured anew; return qsteer.value("
                "fn, context=obs) with one fn, made outside bind, and changing numbers as tensors in obs",
                RuntimeWarning,
                skip_file_prefixes=(os.path.dirname(os.path.dirname(__file__)),),
            )

    def _new(
        self,
        inputs: tuple[Field, Value, Tensor],
        rule: Rule | None,
        sampler: Sampler,
        wanted: tuple[bool, bool],
    ) -> "Run":
        """Return a run that takes the place, and the stream, of the one unused for longest."""
        oldest = self._runs.popitem(last=False)[1] if len(self._runs) == KEPT else None
        weights = known(self.policy, self._prepare, inputs, rule, sampler)
        if self.mode == "static":
            return Run(inputs, rule, sampler, wanted, weights)
        stream = oldest.stream if isinstance(oldest, GraphRun) else torch.cuda.Stream(self.device)
        del oldest
        return GraphRun(inputs, rule, sampler, wanted, weights, stream)

    @contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        """Keep an action on another stream from the buffers until the device has done this one."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if stream is not None:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            if stream is not None:
                stream.record_event(self._done)

    @cached_property
    def _done(self) -> torch.cuda.Event:
        return torch.cuda.Event()


class Run:
    """One kind of action on buffers of its own.

    Args:
        inputs: field, value and noise; their tensors are copied.
        rule: bends the field.
        sampler: makes the action.
        wanted: by a trace, see :attr:`~qsteer.Trace.wanted`.
        weights: all tensors that may enter beside the buffers.

    Raises:
        TypeError: another one enters.
    """

    family: Hashable = None
    """What the run has in common with those of other functions or numbers."""

    def __init__(
        self,
        inputs: tuple[Field, Value, Tensor],
        rule: Rule | None,
        sampler: Sampler,
        wanted: tuple[bool, bool],
        weights: Sequence[Tensor],
    ) -> None:
        self.buffers = [tensor.clone() for tensor in tensors_in(inputs)]
        self.inputs = rebuilt(inputs, iter(self.buffers))
        self.rule, self.sampler, self.wanted = rule, sampler, wanted
        self.device = inputs[-1].device
        self.autocast = autocast(self.device)
        with unmoved(rule, self.device), Watch([*self.buffers, *weights]) as watch:
            self.act()
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

    def act(self) -> tuple[Float[Tensor, "B H A"], ActionRecord]:
        """Compute the action of what is in the buffers, and what is reported of it."""
        field, value, noise = rebuilt(self.inputs, iter(self.buffers))  # which have cached nothing
        enabled, dtype = self.autocast
        cast = torch.autocast(self.device.type, dtype, enabled, cache_enabled=False)
        with cast, ActionRecord(*self.wanted).collect() as found:
            return steered_action(field, value, noise, self.rule, self.sampler), found


class GraphRun(Run):
    """A :class:`Run` that is captured as a CUDA graph when it is made, and checked.

    Networks are part of the graph by address: a :class:`~qsteer.critics.LiveCritic` that learns in place is
    seen. Noise that rule or sampler draw comes from the device's generator, as without a graph. Other threads
    may compute while it is captured, but not draw from that generator. After a CUDA error in the capture
    torch is in no state to go on.

    Args:
        inputs, rule, sampler, wanted, weights: of the run.
        stream: where it is rehearsed and captured; no other living graph has been captured on it, for
            cuBLAS keeps a workspace for each stream, and graphs remember its address.

    Raises:
        MismatchError: the graph's action differs from the eager one on inputs it has not seen.
        TypeError: as for :class:`Run`.
    """

    def __init__(
        self,
        inputs: tuple[Field, Value, Tensor],
        rule: Rule | None,
        sampler: Sampler,
        wanted: tuple[bool, bool],
        weights: Sequence[Tensor],
        stream: torch.cuda.Stream,
    ) -> None:
        super().__init__(inputs, rule, sampler, wanted, weights)
        self.stream, self.graph = stream, torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        with _capturing, torch.cuda.device(self.device), unmoved(rule, self.device):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(REHEARSALS):
                    self.act()
                for generator in own_generators(rule, self.device):
                    self.graph.register_generator_state(generator)
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.action, self.found = self.act()
            current.wait_stream(stream)
            self.check()

    def __call__(self, tensors: list[Tensor], trace: Trace) -> Float[Tensor, "B H A"]:
        """Return the action for these tensors in the buffers."""
        self.fill(tensors)
        self.graph.replay()
        self.found.copy().hand_over(trace)
        return self.action.clone()

    def check(self) -> None:
        """Compare the graph with the eager computation on inputs that it was not captured on."""
        self.fill([unlike(buffer) for buffer in self.buffers])
        with unmoved(self.rule, self.device):
            eager, _ = self.act()
        with unmoved(self.rule, self.device):
            self.graph.replay()
        check_alike("the graph's action", self.action, eager, self.buffers)


def check_field(field: Field, host_field: Field, noise: Float[Tensor, "B H A"]) -> None:
    """Raise unless a prepared field is the host's own step, gradient included, at one time of its grid."""
    if field is host_field:
        return
    if field.bounds != host_field.bounds:
        raise MismatchError(
            f"compile: expected the prepared field's bounds to be the host's {host_field.bounds}, got "
            f"{field.bounds}; forward them in what Host.prepare makes"
        )
    draw = torch.Generator(noise.device).manual_seed(0)
    x, direction = (torch.randn(noise.shape, generator=draw, device=noise.device).to(noise) for _ in range(2))
    times = [t for t, _ in host_field.clock.grid()]
    t = times[len(times) // 3]
    found = []
    for each in (field, host_field):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = each(x, t)
            found.append((v.detach(), torch.autograd.grad(v, x, direction)[0]))
    for name, prepared, own in zip(("velocity", "velocity's gradient"), *found, strict=True):
        check_alike(f"the prepared {name}", prepared, own, tensors_in(field))


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

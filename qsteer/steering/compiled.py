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
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.hosts import numerics
from qsteer.steering.hidden import known
from qsteer.steering.kinds import alike, signature, state_of, tensors_in
from qsteer.steering.runs import GraphRun, MismatchError, Run, check_alike
from qsteer.trace import Trace
from qsteer.types import Field, Rule, Sampler, Value

Mode = Literal["static", "graph", "inductor"]
KEPT = 4
"""Kinds of action (shapes, method, critic) kept ready; a new one replaces the least recently used."""


class Compiled:
    """Samples actions like :func:`qsteer.sample`, on static buffers.

    Fields and values must be frozen dataclasses, whose tensors are copied into the buffers and whose other
    parts (networks, numbers) make the kind of action; a kind that is new is captured anew.

    Args:
        mode: ``graph``: replay a CUDA graph; ``static``: run the same code on the same buffers eagerly;
            ``inductor``: the same, until it is compiled.
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

    @property
    def runs(self) -> "list[Run]":
        """The kinds of action that are kept, least recently used first."""
        return list(self._runs.values())

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
        if self.mode == "inductor":
            from qsteer.steering.inductor import InductorRun

            return InductorRun(inputs, rule, sampler, wanted, weights)
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

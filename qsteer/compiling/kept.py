"""The kinds of action that are kept ready."""

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.compiling.kinds import alike, numerics, signature
from qsteer.compiling.runs import GraphRun, Kind, Run
from qsteer.trace import Trace

Mode = Literal["static", "graph", "inductor"]
KEPT = 4
"""Kinds of action (shapes, method, critic) kept ready; a new one replaces the least recently used."""


def check_mode(mode: Any) -> None:
    """Raise ValueError unless it is a mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"compile: expected one of {', '.join(get_args(Mode))} or None, got {mode!r}")


class Kept:
    """Makes actions, each on the :class:`~qsteer.compiling.runs.Run` of its kind.

    Args:
        mode: ``graph``: replay a CUDA graph; ``static``: run the same code on the same buffers eagerly;
            ``inductor``: the same, until it is compiled.
        most: how many kinds are kept.
        wait: wait for the compiler when a kind is new.
    """

    def __init__(self, mode: Mode, most: int = KEPT, wait: bool = False) -> None:
        self.mode, self.most, self.wait = mode, most, wait
        self._turn, self._holder = threading.Lock(), 0
        self._runs: OrderedDict[Hashable, Run] = OrderedDict()
        self._warned = False

    def __call__(
        self, inputs: Any, method: Any, device: torch.device, make: Callable[[], Kind], trace: Trace
    ) -> Float[Tensor, "B H A"]:
        """Return the action of these inputs.

        Args:
            inputs: a tree, see :class:`~qsteer.compiling.runs.Kind`.
            method: a tree of what else tells kinds apart; its tensors are no inputs.
            device: where the action is made.
            make: returns the kind if it is new.
            trace: is told what was done.

        Raises:
            RuntimeError: the action is part of another one.
        """
        tensors: list[Tensor] = []
        manner = signature(method, []), trace.wanted, numerics(device)
        kind = signature(inputs, tensors), manner
        with self.alone(), self._in_order(device):
            if kind not in self._runs:
                made, family = make(), (signature(inputs, [], alike), manner)
                self._warn_of_kinds(family)
                self._runs[kind] = self._new(made)
                self._runs[kind].family = family
                if self.wait:
                    self._runs[kind].finished.wait()
            self._runs.move_to_end(kind)
            return self._runs[kind](tensors, trace)

    @property
    def runs(self) -> list[Run]:
        """The kinds of action that are kept, least recently used first."""
        return list(self._runs.values())

    def clear(self) -> None:
        """Keep none."""
        self._runs.clear()

    @contextmanager
    def alone(self) -> Iterator[None]:
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

    def _new(self, kind: Kind) -> Run:
        """Return a run that takes the place, and the stream, of the one unused for longest."""
        oldest = self._runs.popitem(last=False)[1] if len(self._runs) == self.most else None
        stream = None if oldest is None else oldest.stream
        del oldest
        captured = self.mode == "graph" or (self.mode == "inductor" and kind.device.type == "cuda")
        if captured and stream is None:
            stream = torch.cuda.Stream(kind.device)
        if self.mode == "inductor":
            from qsteer.compiling.inductor import InductorRun

            return InductorRun(kind, stream)
        return Run(kind) if stream is None else GraphRun(kind, stream)

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

"""What steering did to an action, step by step.

Rules report each guided step to the trace that is recording. Without one they report fallbacks only, so that
tracing costs nothing when it is off.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qsteer.clock import Time

_recording: ContextVar["ActionRecord | None"] = ContextVar("qsteer_trace", default=None)
"""The record of the action that is being sampled. Rules report into it from inside the sampler, which knows
nothing of traces; several threads may steer at once, each with a record of its own."""


@dataclass(frozen=True)
class Step:
    """One guided Euler step at time t; tensors have one entry per row, NaN on rows that were not guided."""

    t: Time
    strength: Tensor
    gradient_norm: Tensor
    value: Tensor
    value_std: Tensor

    def copy(self) -> "Step":
        """Return it with tensors of its own."""
        t = self.t.clone() if isinstance(self.t, Tensor) else self.t
        stats = (self.strength, self.gradient_norm, self.value, self.value_std)
        return Step(t, *(stat.clone() for stat in stats))


@dataclass
class Trace:
    """A record of the guided steps of the last ``keep`` actions, and a count of all fallbacks.

    ``fallbacks`` counts rows whose value, gradient or guided velocity was not finite and which therefore kept
    the base velocity for that step (or the unprojected, unselected action); ``gated`` counts those which
    :class:`~qsteer.Gated` left alone because the ensemble disagreed. ``strength`` is ``||guidance|| /
    ||velocity||`` over the entries which the critic sees: 1e-4 means that steering is absent, 1 that it
    overwhelms the policy. What has come of it is the displacement: how far the action lies from its unsteered
    twin, the policy's own Euler chain from the same noise, as root mean square over the entries which the
    critic sees, in the policy's units. Pushes that cancel or that a clip cuts off have strength, but no
    displacement.

    Args:
        steps: record the steps too, not only fallbacks. Costs one more critic evaluation per guided step.
        keep: how many sampled actions to remember.
        displacement: record the displacement, at the cost of one more Euler chain; None: as ``steps``.
    """

    steps: bool = True
    keep: int = 1000
    fallbacks: int = 0
    gated: int = 0
    actions: deque[list[Step]] = field(default_factory=deque, repr=False)
    displacements: deque[Tensor] = field(default_factory=deque, repr=False)
    displacement: bool | None = None
    _warned: bool = False

    def __post_init__(self) -> None:
        """Bound the memory of a robot that runs all day."""
        if self.keep < 1:
            raise ValueError(
                f"keep: expected at least 1 action, got {self.keep}; use steps=False to record none"
            )
        self.actions = deque(self.actions, maxlen=self.keep)
        self.displacements = deque(self.displacements, maxlen=self.keep)

    @property
    def wanted(self) -> tuple[bool, bool]:
        """Whether steps are recorded, and whether displacements are."""
        return self.steps, self.steps if self.displacement is None else self.displacement

    def arrays(self) -> dict[str, np.ndarray]:
        """Return ``t`` (K,), ``strength, gradient_norm, value, value_std`` (N, K) and ``displacement`` (M,).

        N rows of chains, K guided steps, M rows of actions. Chains guided at other times than the first one
        of the last action (a rule was swapped; the completions of a beam) are left out.
        """
        names = ("strength", "gradient_norm", "value", "value_std")
        moved = torch.cat([*self.displacements]).float().cpu().numpy() if self.displacements else np.zeros(0)
        if not self.actions:
            return {"t": np.zeros(0), **{name: np.zeros((0, 0)) for name in names}, "displacement": moved}
        times = [first_time(step.t) for step in split_chains(self.actions[-1])[0]]
        chains = [chain for action in self.actions for chain in split_chains(action)]
        alike = [chain for chain in chains if [first_time(step.t) for step in chain] == times]
        columns = {name: [torch.stack([getattr(s, name) for s in a], 1) for a in alike] for name in names}
        return {
            "t": np.array(times, dtype=np.float32),
            **{name: torch.cat(c).float().cpu().numpy() for name, c in columns.items()},
            "displacement": moved,
        }

    def plot(self, path: str | Path) -> Path:
        """Draw strength, gradient norm, value and ensemble spread against t; needs the ``plots`` extra.

        The caption says the displacement.
        """
        from qsteer.plotting import plot_trace

        return plot_trace(path=path, **self.arrays())

    def __str__(self) -> str:
        """One line per guided step: the medians over all rows; the displacement's median and 80 %."""
        data = self.arrays()
        lines = [
            f"{len(self.actions)} actions, {self.fallbacks} fallbacks"
            + (f", {self.gated} gated" if self.gated else ""),
            "    t  strength  |gradient|     value  spread",
        ]
        for k, t in enumerate(data["t"]):
            s, g, q, d = (
                np.nanmedian(data[n][:, k]) for n in ("strength", "gradient_norm", "value", "value_std")
            )
            lines.append(f"{t:5.2f}  {s:8.4f}  {g:10.3g}  {q:8.3f}  {d:6.3f}")
        if data["displacement"].size:
            lines.append(describe_displacement(data["displacement"]))
        return "\n".join(lines)

    def _count(self, lost: int, gated: int) -> None:
        """Count the fallbacks and gated rows of one action, and warn of the first fallback."""
        self.fallbacks += lost
        self.gated += gated
        if lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"steering met non-finite values or gradients: {lost} row-steps of this action fell back to "
                "the base policy (counted in trace.fallbacks, said once); look at the critic's inputs and "
                "scale",
                RuntimeWarning,
                skip_file_prefixes=(os.path.dirname(__file__),),
            )


class ActionRecord:
    """What is reported of one action, to be handed over to a trace later: threads may share a trace.

    Args:
        steps_wanted: collect the guided steps too, not only fallbacks.
        displacement_wanted: collect the displacement.
        on_step: is called where a step of a chain begins or ends.
    """

    def __init__(
        self,
        steps_wanted: bool,
        displacement_wanted: bool,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.on_step = on_step
        self.steps_wanted, self.displacement_wanted = steps_wanted, displacement_wanted
        self.displacement: Tensor | None = None
        self.steps: list[Step] = []
        self.fell_back: list[Tensor] = []
        self.gated: list[Tensor] = []

    @contextmanager
    def collect(self) -> Iterator["ActionRecord"]:
        """Collect what is reported in the block, in this thread."""
        token = _recording.set(self)
        try:
            yield self
        finally:
            _recording.reset(token)

    def copy(self) -> "ActionRecord":
        """Return it with tensors of its own, where a replay will overwrite these."""
        copy = ActionRecord(self.steps_wanted, self.displacement_wanted)
        copy.displacement = None if self.displacement is None else self.displacement.clone()
        copy.steps = [step.copy() for step in self.steps]
        copy.fell_back, copy.gated = self.fell_back, self.gated  # read when they are handed over
        return copy

    def counted(self) -> tuple[Tensor | None, list[Step], list[Tensor], list[Tensor]]:
        """Return displacement, steps, and in one number each how many rows fell back and were gated."""
        fell_back, gated = ([torch.stack(c).sum()] if c else [] for c in (self.fell_back, self.gated))
        return self.displacement, self.steps, fell_back, gated

    def hand_over(self, trace: Trace) -> None:
        """Add the action to a trace: the only place where tracing waits for the device."""
        if self.steps:
            trace.actions.append(self.steps)
        if self.displacement is not None:
            trace.displacements.append(self.displacement)
        if self.fell_back:
            zero = torch.zeros_like(self.fell_back[0])
            counts = torch.stack([torch.stack([zero, *part]).sum() for part in (self.fell_back, self.gated)])
            trace._count(*counts.tolist())


@contextmanager
def record_action(trace: Trace | None) -> Iterator[None]:
    """Record one sampled action into ``trace``; without one, only count and warn of fallbacks."""
    trace = Trace(steps=False) if trace is None else trace
    record = ActionRecord(*trace.wanted)
    try:
        with record.collect():
            yield
    finally:
        record.hand_over(trace)


def report_step() -> None:
    """Say that a step of a chain begins or ends."""
    if (action := _recording.get()) is not None and action.on_step is not None:
        action.on_step()


def report_fallbacks(fell_back: Tensor) -> None:
    """Count the rows (True) which fell back to the base policy."""
    if (action := _recording.get()) is not None:
        action.fell_back.append(fell_back.sum())


def report_gated(gated: Tensor) -> None:
    """Count the rows (True) on which the ensemble disagreed."""
    if (action := _recording.get()) is not None:
        action.gated.append(gated.sum())


def find_recorder() -> list[Step] | None:
    """Return the list to append guided steps to; None: no trace has asked for them."""
    action = _recording.get()
    return action.steps if action is not None and action.steps_wanted else None


def displacement_wanted() -> bool:
    """Return whether a trace has asked for the displacement."""
    action = _recording.get()
    return action is not None and action.displacement_wanted


def report_displacement(moved: Tensor) -> None:
    """Record how far each row's action lies from its unsteered twin."""
    if (action := _recording.get()) is not None:
        action.displacement = moved


def describe_displacement(moved: np.ndarray) -> str:
    """Return median and 10 to 90 % of displacements in words."""
    low, median, high = np.nanquantile(moved, [0.1, 0.5, 0.9])
    return f"moved from the unsteered action by {median:.3g} per entry (10 to 90 %: {low:.3g} to {high:.3g})"


def split_chains(action: list[Step]) -> list[list[Step]]:
    """Return the steps of each chain of an action: one begins where time goes back, or has other rows."""
    chains: list[list[Step]] = []
    for step in action:
        last = chains[-1][-1] if chains else None
        if last is None or len(last.value) != len(step.value) or first_time(step.t) <= first_time(last.t):
            chains.append([])
        chains[-1].append(step)
    return chains


def first_time(t: Time) -> float:
    """Return the time of the first row, in float32."""
    return float(np.float32(float(t[0]) if isinstance(t, Tensor) else t))

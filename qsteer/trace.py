"""What steering did to an action, step by step.

Rules report each guided step to the trace that is recording. Without one they report fallbacks only, so that
tracing costs nothing when it is off.
"""

import os
import warnings
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_recording: ContextVar["collecting | None"] = ContextVar("qsteer_trace", default=None)


@dataclass(frozen=True)
class Step:
    """One guided Euler step; every tensor has one entry per row, NaN on rows that were not guided."""

    t: Tensor
    strength: Tensor
    gradient_norm: Tensor
    value: Tensor
    value_std: Tensor


@dataclass
class Trace:
    """A record of the guided steps of the last ``keep`` actions, and a count of all fallbacks.

    ``fallbacks`` counts rows whose value, gradient or guided velocity was not finite and which therefore kept
    the base velocity for that step (or the unprojected, unselected action); ``gated`` counts those which
    :class:`~qsteer.Gated` left alone because the ensemble disagreed. ``strength`` is ``||guidance|| /
    ||velocity||`` over the entries which the critic sees: 1e-4 means that steering is absent, 1 that it
    overwhelms the policy.

    Args:
        steps: record the steps too, not only fallbacks. Costs one more critic evaluation per guided step.
        keep: how many sampled actions to remember.
    """

    steps: bool = True
    keep: int = 1000
    fallbacks: int = 0
    gated: int = 0
    actions: deque[list[Step]] = field(default_factory=deque, repr=False)
    _warned: bool = False

    def __post_init__(self) -> None:
        """Bound the memory of a robot that runs all day."""
        if self.keep < 1:
            raise ValueError(
                f"keep: expected at least 1 action, got {self.keep}; use steps=False to record none"
            )
        self.actions = deque(self.actions, maxlen=self.keep)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return ``t`` (K,) and ``strength, gradient_norm, value, value_std`` (N, K).

        N rows of actions, K guided steps. Actions guided at other times than the last one (a rule was
        swapped) are left out.
        """
        names = ("strength", "gradient_norm", "value", "value_std")
        if not self.actions:
            return {"t": np.zeros(0), **{name: np.zeros((0, 0)) for name in names}}
        times = torch.stack([step.t[0] for step in self.actions[-1]])
        alike = [
            a
            for a in self.actions
            if len(a) == len(times) and torch.equal(times, torch.stack([s.t[0] for s in a]))
        ]
        columns = {name: [torch.stack([getattr(s, name) for s in a], 1) for a in alike] for name in names}
        return {
            "t": times.cpu().numpy(),
            **{name: torch.cat(c).float().cpu().numpy() for name, c in columns.items()},
        }

    def plot(self, path: str | Path) -> Path:
        """Draw strength, gradient norm, value and ensemble spread against t; needs the ``plots`` extra."""
        from qsteer.plotting import plot_trace

        return plot_trace(path=path, **self.arrays())

    def __str__(self) -> str:
        """One line per guided step: the medians over all rows."""
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


class collecting:  # noqa: N801 (used as a with statement)
    """Collect what is reported of one action, to be handed over later.

    It belongs to the action until then, so threads may share a trace.

    Args:
        wanted: collect the guided steps too, not only fallbacks.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.steps: list[Step] = []
        self.fell_back: list[Tensor] = []
        self.gated: list[Tensor] = []

    def __enter__(self) -> "collecting":
        """Start the action."""
        self._token = _recording.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        """End the action."""
        _recording.reset(self._token)

    def copied(self) -> "collecting":
        """Return it with tensors of its own, where a replay will overwrite these."""
        copy = collecting(self.wanted)
        copy.steps = [Step(*(getattr(step, f.name).clone() for f in fields(step))) for step in self.steps]
        copy.fell_back, copy.gated = self.fell_back, self.gated  # read when they are handed over
        return copy

    def hand_over(self, trace: Trace) -> None:
        """Add the action to a trace: the only place where tracing waits for the device."""
        if self.steps:
            trace.actions.append(self.steps)
        if self.fell_back:
            zero = torch.zeros_like(self.fell_back[0])
            counts = torch.stack([torch.stack([zero, *part]).sum() for part in (self.fell_back, self.gated)])
            trace._count(*counts.tolist())


class recording(collecting):  # noqa: N801
    """Record one sampled action into ``trace``; without one, only count and warn of fallbacks."""

    def __init__(self, trace: Trace | None) -> None:
        self.trace = Trace(steps=False) if trace is None else trace
        super().__init__(self.trace.steps)

    def __exit__(self, *_: object) -> None:
        """Hand the action over."""
        super().__exit__()
        self.hand_over(self.trace)


def report_fallbacks(fell_back: Tensor) -> None:
    """Count the rows (True) which fell back to the base policy."""
    if (action := _recording.get()) is not None:
        action.fell_back.append(fell_back.sum())


def report_gated(gated: Tensor) -> None:
    """Count the rows (True) on which the ensemble disagreed."""
    if (action := _recording.get()) is not None:
        action.gated.append(gated.sum())


def recorder() -> list[Step] | None:
    """Return the list to append guided steps to, or None when nobody looks."""
    action = _recording.get()
    return action.steps if action is not None and action.wanted else None

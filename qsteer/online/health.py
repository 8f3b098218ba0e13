"""Health of a critic that is still learning: finiteness, values, losses, and its last good state."""

from collections import deque
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass, field
from math import isfinite
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from qsteer.checks import check_at_least
from qsteer.data.outliers import RewardScale

VALUES = ("q", "q_min", "q_max", "v", "y")
"""Entries of a learner's metrics that are values of actions or states."""


@dataclass
class Health:
    """Watches a critic while it learns, forbids steering while it diverges, and restores its last good state.

    A critic is ill when

    * a metric, a parameter or a gradient is not finite;
    * a value is beyond what any return can be: every discounted sum of 1, 2, ... rewards in ``[low, high]``
      lies in ``[min(low, low / (1 - gamma)), max(high, high / (1 - gamma))]``, which is widened by ``margin``
      times its width on both sides. This applies to a value once it has been inside without the margin: a
      fresh critic's may start anywhere;
    * the loss is ``explosion`` times its running median, and beyond the square of that width (at first an
      error may be as large as the returns, however small it was while none had been seen).

    The last two wait for a first reward other than zero, without which the size of values is not known.
    Outliers (:class:`~qsteer.data.outliers.RewardScale`) are no part of ``[low, high]``: a sensor's mistake
    must not make everything look healthy.

    Example, every n-th update of an online loop:
        >>> reason = health.check({"loss": loss} | info, learner.parameters())  # doctest: +SKIP
        >>> (health.restore if reason else health.keep)(learner, optimizer)  # doctest: +SKIP
        >>> handle.swap(rule=rule if health.steers else None)  # doctest: +SKIP

    Args:
        gamma: discount from one observed reward to the next, below 1.
        margin: share of the returns' width by which values may lie outside.
        explosion: loss over running median from which on it has exploded.
        window: losses of which the median is taken; below this number none has exploded.
        keep_every: healthy checks from one snapshot to the next.
        recovery: healthy checks in a row after which an ill critic may steer again.

    Attributes:
        trips: checks that found the critic ill.
        restores: states brought back.
        scale: of the rewards.

    Raises:
        ValueError: an argument is out of its range.
    """

    gamma: float
    margin: float = 0.5
    _: KW_ONLY
    explosion: float = 100.0
    window: int = 50
    keep_every: int = 10
    recovery: int = 20
    trips: int = field(default=0, init=False)
    restores: int = field(default=0, init=False)
    scale: RewardScale = field(default_factory=RewardScale, init=False, repr=False)
    _inside: frozenset[str] = field(default=frozenset(), init=False, repr=False)
    _losses: deque[float] = field(default_factory=deque, init=False, repr=False)
    _kept: deque[tuple[dict[str, Any], dict[str, Any], frozenset[str]]] = field(
        default_factory=lambda: deque(maxlen=2), init=False, repr=False
    )
    _since_trip: int | None = field(default=None, init=False, repr=False)
    _relapsed: bool = field(default=False, init=False, repr=False)
    _since_keep: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0.0 <= self.gamma < 1.0:
            raise ValueError(
                f"gamma: expected 0 <= gamma < 1, got {self.gamma}; without it returns are unbounded"
            )
        if not (self.margin >= 0.0 and self.explosion > 1.0):
            raise ValueError(
                f"margin, explosion: expected at least 0 and more than 1, got {self.margin}, {self.explosion}"
            )
        check_at_least(self, 1, "window", "keep_every", "recovery")
        self._losses = deque(maxlen=self.window)

    @property
    def steers(self) -> bool:
        """Whether the critic may steer: it was never ill, or has been healthy for ``recovery`` checks."""
        return self._since_trip is None or self._since_trip >= self.recovery

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What values may be, margin included; None before a reward other than zero."""
        if (returns := self._returns()) is None:
            return None
        low, high = returns
        slack = self.margin * (high - low)
        return low - slack, high + slack

    def observe_rewards(self, rewards: Tensor) -> None:
        """Take in rewards of any shape, as the environments give them; those that are not finite are ignored.

        Cost: a sort by size; waits for a device the rewards are on.
        """
        self.scale.observe(rewards)

    def check(self, info: Mapping[str, float | int | Tensor], parameters: Iterable[Tensor]) -> str | None:
        """Check the critic after an update; return why it is ill, or None.

        Args:
            info: metrics of the update: ``loss``, the values of :data:`VALUES`, and others, one number each.
            parameters: what is learnt, with the update's gradients.

        Cost: two norms over all parameters, and one wait for the device.
        """
        reason = self._diagnose(info, list(parameters))
        if reason is not None:
            self.trips += 1
            self._relapsed = not self.steers
            self._since_trip = 0
        elif self._since_trip is not None:
            self._since_trip += 1
        return reason

    def keep(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state of the learner (averages included) and of its optimiser; call it when healthy.

        The last two are kept. Cost: a copy on the device, at the first call and every ``keep_every`` calls.
        """
        if self._kept and self._since_keep + 1 < self.keep_every:
            self._since_keep += 1
            return
        self._since_keep = 0
        self._kept.append((deepcopy(learner.state_dict()), deepcopy(optimizer.state_dict()), self._inside))

    def begin(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Forget the kept states, and keep this one: another critic was put in the place of the former."""
        self._kept.clear()
        self.keep(learner, optimizer)

    def restore(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the last kept state back, bit for bit; if that is ill again before it recovers, the one before.

        Random streams go on, so that the batch which did the harm is not drawn again.

        Raises:
            RuntimeError: nothing was kept.
        """
        if not self._kept:
            raise RuntimeError(
                "restore: expected a kept state, got none; call keep() before the first update"
            )
        if self._relapsed and len(self._kept) > 1:
            self._kept.pop()
        weights, moments, self._inside = self._kept[-1]
        learner.load_state_dict(weights)
        optimizer.load_state_dict(deepcopy(moments))  # which may take tensors over as they are
        self.restores += 1

    def _diagnose(self, info: Mapping[str, float | int | Tensor], parameters: list[Tensor]) -> str | None:
        norms = {"parameters": parameters, "gradients": [p.grad for p in parameters if p.grad is not None]}
        numbers = {name: get_total_norm(tensors) for name, tensors in norms.items() if tensors} | dict(info)
        found = dict(zip(numbers, _on_host(list(numbers.values())), strict=True))
        if bad := [name for name, number in found.items() if not isfinite(number)]:
            return f"not finite: {', '.join(bad)}"
        if (bounds := self.bounds) is not None:
            low, high = bounds
            least, most = cast(tuple[float, float], self._returns())
            values = [name for name in VALUES if name in found]
            self._inside |= {name for name in values if least <= found[name] <= most}
            for name in values:
                if name in self._inside and not low <= found[name] <= high:
                    return f"{name} = {found[name]:.4g} beyond any return: [{low:.4g}, {high:.4g}]"
        if "loss" in found:
            return self._exploded(found["loss"])
        return None

    def _exploded(self, loss: float) -> str | None:
        usual = median(self._losses) if len(self._losses) == self.window else float("inf")
        self._losses.append(loss)
        if (returns := self._returns()) is None or loss <= (returns[1] - returns[0]) ** 2:
            return None
        return f"loss = {loss:.4g}, {usual:.4g} is usual" if loss > self.explosion * usual else None

    def _returns(self) -> tuple[float, float] | None:
        if (usual := self.scale.usual) is None:
            return None
        low, high = usual
        return min(low, low / (1 - self.gamma)), max(high, high / (1 - self.gamma))


def _on_host(numbers: list[float | int | Tensor]) -> list[float]:
    """Return numbers, some of them on a device, in one transfer."""
    tensors = [n for n in numbers if isinstance(n, Tensor)]
    moved = iter(torch.stack([t.detach().float() for t in tensors]).tolist() if tensors else [])
    return [next(moved) if isinstance(n, Tensor) else float(n) for n in numbers]

"""Rules made of a guidance rule: downhill, or only where the critic is sure."""

from dataclasses import dataclass

import torch

from qsteer.rules.guidance import Guidance, Steered
from qsteer.types import Field, Rule, Value


@dataclass(frozen=True)
class Negated(Rule):
    """Control arm: the same guidance downhill. It should do worse than no guidance at all.

    An automatic strength is still the one chosen for going uphill.

    Cost: that of ``rule``.

    Args:
        rule: the guidance to negate.
    """

    rule: Guidance

    def __post_init__(self) -> None:
        """Check the argument."""
        if not isinstance(self.rule, Guidance):
            raise TypeError(
                f"Negated: expected a guidance rule such as Tweedie(), got {type(self.rule).__name__}"
            )

    def __call__(self, field: Field, value: Value) -> Field:
        """Return the field steered against the value."""
        steered = self.rule(field, value)
        return steered.negated() if isinstance(steered, Steered) else steered

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """Return those of ``rule``."""
        return self.rule.generators(device)


@dataclass(frozen=True)
class Gated(Rule):
    """Guidance only where the ensemble agrees on what it gains.

    A push that lasts for the remaining time moves the denoised action D to ``D + (1 - t) push``, by which
    member j gains ``dQ_j``. Rows with ``std_j dQ_j > limit |mean_j dQ_j|`` keep the base velocity at that
    step and are counted in ``Trace.gated``. The ratio has no units: any ``k Q + b`` gates the same rows. A
    value of one member agrees with itself: it is never gated.

    Cost: that of ``rule``, and 1 critic forward on 2 rows per guided step and row.

    Args:
        rule: the guidance to gate.
        limit: largest standard deviation over absolute mean of the members' gains.

    Raises:
        TypeError: ``rule`` is no guidance.
        ValueError: ``limit`` is negative or not a number.
    """

    rule: Guidance | Negated
    limit: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.rule, Guidance | Negated):
            raise TypeError(
                f"Gated: expected a guidance rule such as Tweedie(), got {type(self.rule).__name__}"
            )
        if not self.limit >= 0.0:
            raise ValueError(f"limit: expected at least 0, got {self.limit}; inf gates nothing")

    def __call__(self, field: Field, value: Value) -> Field:
        """Return the field steered where the members agree."""
        steered = self.rule(field, value)
        return steered.gated(self.limit) if isinstance(steered, Steered) else steered

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """Return those of ``rule``."""
        return self.rule.generators(device)

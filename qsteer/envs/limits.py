"""How long one waits for a simulator, and how often it may fail."""

from dataclasses import dataclass

from qsteer.checks import check_at_least, check_positive


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a simulator counts as failed, and how many failures end the run.

    The defaults are for the slowest of simulators, whose step takes seconds: they end what hangs, at last.

    Attributes:
        step_s: seconds for an environment step; a row or chunk of n actions gets n times as many. None: no
            limit.
        reset_s: seconds for a reset, the building of a new simulator included; None: no limit.
        failures: failures of one environment, without a good step between them, or of one episode of an
            evaluation, that end the run.
    """

    step_s: float | None = 60.0
    reset_s: float | None = 600.0
    failures: int = 3

    def __post_init__(self) -> None:
        """Check the values."""
        check_positive(self, "step_s", "reset_s")
        check_at_least(self, 1, "failures")

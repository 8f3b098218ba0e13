"""Metrics of an online run: what happened between two lines, and the trackers that get them too."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from torch import Tensor


class LogWindow:
    """What happened between two lines of metrics, and how its time was spent."""

    def __init__(self, env_steps: int, update: int) -> None:
        self.start, self.env_steps, self.update = time.perf_counter(), env_steps, update
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.info: dict[str, Tensor] = {}

    @contextmanager
    def share(self, name: str) -> Iterator[None]:
        """Count the time inside under ``name``."""
        since = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - since

    def speed(self, env_steps: int, update: int) -> dict[str, float]:
        """Return rates, and the share of the time that each part took."""
        total = time.perf_counter() - self.start
        rates = {
            "env_steps/s": (env_steps - self.env_steps) / total,
            "updates/s": (update - self.update) / total,
        }
        return rates | {f"time/{name}": seconds / total for name, seconds in self.seconds.items()}


class Tracker:
    """One of accelerate's trackers, or none.

    Raises:
        ModuleNotFoundError: it is not installed.
    """

    def __init__(self, name: str | None, out: Path) -> None:
        self.tracker = None
        if name is not None:
            kinds = filter_trackers([name], logging_dir=out)
            if not kinds:
                raise ModuleNotFoundError(f"tracker: expected {name!r} to be installed: pip install {name}")
            kind = LOGGER_TYPE_TO_CLASS[str(kinds[0])]
            where = {"logging_dir": out} if kind.requires_logging_directory else {}
            self.tracker = kind("qsteer", **where)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass on a line."""
        if self.tracker is not None:
            self.tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        if self.tracker is not None:
            self.tracker.finish()

"""What a server counts, in Prometheus' text format."""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from qsteer.serving.requests import Decision

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)

LEARNING = {
    "rows": "Rows that are stored.",
    "updates": "Gradient steps.",
    "due": "Gradient steps that should have been made.",
    "refused": "Replies that are not learnt from, for what came of them is not known whole.",
    "steering": "1 while the critic steers.",
    "frozen": "1 while the critic stays as it is.",
    "trips": "Checks that found the critic ill.",
    "loss": "Latest loss.",
}
"""Of a critic that learns, see :meth:`qsteer.serving.learning.RobotLearning.state`."""


class Metrics:
    """A server's counters, each safe to be changed by any thread.

    Means are of the latest call. Episodes and successes are those that clients tell of.
    """

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "qsteer_requests", "Requests by what became of them.", ["outcome"], registry=own
        )
        self.latency = Histogram(
            "qsteer_request_seconds", "From a request to its reply.", registry=own, buckets=SECONDS
        )
        self.calls = Histogram("qsteer_call_seconds", "Calls of the policy.", registry=own, buckets=SECONDS)
        self.rows = Histogram("qsteer_batch_rows", "Requests of a call.", registry=own, buckets=ROWS)
        self.queue = Gauge("qsteer_queue", "Requests that wait.", registry=own)
        self.connections = Gauge("qsteer_connections", "Robots that are connected.", registry=own)
        self.fallbacks = Counter(
            "qsteer_fallbacks", "Guided steps that kept the policy's own velocity.", registry=own
        )
        self.episodes = Counter("qsteer_episodes", "Finished episodes.", registry=own)
        self.successes = Counter("qsteer_successes", "Episodes that succeeded.", registry=own)
        self.means = {
            name: Gauge(f"qsteer_{name}", f"Mean {name} of the latest call.", registry=own)
            for name in ("value", "disagreement", "strength", "displacement")
        }
        self.learning = {
            name: Gauge(f"qsteer_learning_{name}", text, registry=own) for name, text in LEARNING.items()
        }

    def observe(self, decisions: Sequence[Decision | Exception], seconds: float) -> None:
        """Count one call of the policy."""
        self.calls.observe(seconds)
        made = [decision for decision in decisions if isinstance(decision, Decision)]
        for name, gauge in self.means.items():
            known = [number for each in made if (number := getattr(each, name)) is not None]
            if known:
                gauge.set(sum(known) / len(known))

    def observe_learning(self, state: Mapping[str, Any]) -> None:
        """Say how far learning is."""
        for name, gauge in self.learning.items():
            gauge.set(state.get(name, 0.0))

    def text(self) -> bytes:
        """Return all of it, of :data:`CONTENT_TYPE`."""
        return generate_latest(self.registry)

"""What a server counts, in Prometheus' text format."""

from collections.abc import Sequence

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

    def observe(self, decisions: Sequence[Decision | Exception], seconds: float) -> None:
        """Count one call of the policy."""
        self.calls.observe(seconds)
        made = [decision for decision in decisions if isinstance(decision, Decision)]
        for name, gauge in self.means.items():
            known = [number for each in made if (number := getattr(each, name)) is not None]
            if known:
                gauge.set(sum(known) / len(known))

    def text(self) -> bytes:
        """Return all of it, of :data:`CONTENT_TYPE`."""
        return generate_latest(self.registry)

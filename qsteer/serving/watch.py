"""What the page shows: the robots that are connected, curves, and the latest episodes."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsteer.serving.lanes import Lanes
from qsteer.serving.requests import Decision, Request

POINTS, EPISODES, FILMS, VALUES = 600, 1000, 12, 120
"""Most points of a curve, episodes, episodes with their values, and values of one."""


@dataclass
class Robot:
    """A robot that is connected."""

    since: float
    requests: int = 0
    value: float = 0.0
    strength: float = 0.0
    values: deque[float] = field(default_factory=lambda: deque(maxlen=VALUES))


class Watch:
    """Remembers what happens, a bounded amount of it; any thread may ask for it.

    Args:
        lanes: of the robots that name their episodes.
        clock: seconds.
    """

    def __init__(self, lanes: Lanes, clock: Callable[[], float] = time.monotonic) -> None:
        self.lanes, self.clock, self._began = lanes, clock, clock()
        self._lock = threading.Lock()
        self._robots: dict[int, Robot] = {}
        self._points: list[dict[str, float]] = []
        self._apart = 1.0  # seconds between two points
        self._ended: deque[tuple[int, float]] = deque(maxlen=EPISODES)
        self._films: deque[dict[str, Any]] = deque(maxlen=FILMS)
        self._episodes = 0

    def enter(self, robot: int) -> None:
        """A robot has connected."""
        with self._lock:
            self._robots[robot] = Robot(self.clock())

    def leave(self, robot: int) -> None:
        """A robot has gone."""
        with self._lock:
            self._robots.pop(robot, None)

    def observe(
        self,
        requests: Sequence[Request],
        decisions: Sequence[Decision | Exception],
        learning: Mapping[str, Any],
    ) -> None:
        """Take in a call of the policy, and how far learning is."""
        made = [(r, d) for r, d in zip(requests, decisions, strict=True) if isinstance(d, Decision)]
        with self._lock:
            for request, decision in made:
                if (robot := self._robots.get(request.robot)) is not None:
                    robot.requests += 1
                    robot.value, robot.strength = decision.value, decision.strength
                    robot.values.append(decision.value)
            now = self.clock() - self._began
            if made and (not self._points or now >= self._points[-1]["t"] + self._apart):
                point = {"t": now, "rows": float(len(requests))}
                for name in ("value", "strength"):
                    point[name] = sum(getattr(decision, name) for _, decision in made) / len(made)
                point |= {name: learning[name] for name in ("loss", "updates") if name in learning}
                self._points.append(point)
                if len(self._points) > POINTS:
                    self._points, self._apart = self._points[::2], 2 * self._apart

    def end(self, robot: int, success: bool, total: float, length: int) -> None:
        """An episode has ended."""
        with self._lock:
            self._episodes += 1
            self._ended.append((int(success), total))
            values: list[float] = []
            if (found := self._robots.get(robot)) is not None:
                values = [*found.values]
                found.values.clear()
            self._films.append(
                {
                    "number": self._episodes,
                    "robot": robot,
                    "success": success,
                    "return": total,
                    "steps": length,
                    "values": values,
                }
            )

    def state(self) -> dict[str, Any]:
        """Return all of it, JSON-able."""
        with self._lock:
            robots = []
            for number, robot in self._robots.items():
                lane = self.lanes.find(number)
                robots.append(
                    {
                        "robot": number,
                        "seconds": round(self.clock() - robot.since, 1),
                        "requests": robot.requests,
                        "value": robot.value if robot.requests else None,
                        "strength": robot.strength if robot.requests else None,
                        "values": [*robot.values],
                        "episode": None if lane is None or lane.episode is None else str(lane.episode),
                        "steps": None if lane is None else lane.length,
                        "stored": None if lane is None else lane.stored,
                    }
                )
            return {
                "seconds": self.clock() - self._began,
                "robots": robots,
                "points": [*self._points],
                "episodes": self._episodes,
                "ended": [*self._ended],
                "films": [*self._films],
            }

"""What a message may hold under the server's own key: wishes, what came of the last actions, commands."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsteer.serving.codec import short

OWN = "qsteer"
"""The key of a message that is the server's, and not an observation: see :class:`Options`."""
SEEDS = 2**63
EPISODE = 200
"""Most characters of an episode's name."""
COMMANDS = "freeze", "learn", "rollback", "export"
"""What may be asked of a learning server, see :class:`~qsteer.serving.learning.RobotLearning`."""


class RequestError(ValueError):
    """A request that cannot be answered; its text is for the client."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """What a robot tells of the actions that it was sent last.

    Attributes:
        episode: its name, another for each episode of the robot.
        rewards: one of each step that was executed; empty: nothing is told of them.
        done: the task is over; nothing follows.
        truncated: a time limit ended the episode, or a person did; the world would go on.
        success: the task was done, at this time or before.
    """

    episode: str | int
    rewards: tuple[float, ...] = ()
    done: bool = False
    truncated: bool = False
    success: bool = False

    @property
    def ends(self) -> bool:
        """Whether the episode ended."""
        return self.done or self.truncated

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> "Feedback | None":
        """Return the feedback in a message's own map; None: there is none.

        Raises:
            RequestError: an entry is of another kind, or the episode is missing.
        """
        given = [name for name in cls.__dataclass_fields__ if name in found]
        if not given:
            return None
        episode = found.get("episode")
        if not (type(episode) is int or (isinstance(episode, str) and 0 < len(episode) <= EPISODE)):
            raise RequestError(
                f"{OWN}.episode: expected a whole number, or a text of 1 to {EPISODE} characters, got "
                f"{short(episode)}; send one beside {given}, another for each episode"
            )
        flags = {name: found.get(name, False) for name in ("done", "truncated", "success")}
        for name, flag in flags.items():
            if not isinstance(flag, bool | np.bool_):
                raise RequestError(f"{OWN}.{name}: expected true or false, got {short(flag)}")
        return cls(episode, _read_rewards(found.get("rewards", ())), **{k: bool(v) for k, v in flags.items()})


def _read_rewards(found: Any) -> tuple[float, ...]:
    numbers = found.tolist() if isinstance(found, np.ndarray) and found.ndim == 1 else found
    if not isinstance(numbers, list | tuple):
        raise RequestError(f"{OWN}.rewards: expected a list of numbers, one a step, got {short(found)}")
    read = [each.item() if isinstance(each, np.generic) else each for each in numbers]
    if bad := [each for each in read if type(each) not in (int, float) or not math.isfinite(each)]:
        raise RequestError(
            f"{OWN}.rewards: expected finite numbers, got {short(bad[0])}; look at the sensor, or end the "
            "episode without them"
        )
    return tuple(map(float, read))


@dataclass(frozen=True)
class Options:
    """What a message may ask for, and tell, under :data:`OWN`, beside its observations.

    Attributes:
        seed: of the request's noise, in [0, 2**63); None: the server draws one.
        unsteered_twin: send the frozen policy's own chunk of the same noise, too.
        feedback: what came of the last actions; None: nothing is told. Its entries lie beside the others.
        command: one of :data:`COMMANDS`, in a message with nothing else; None: none.
    """

    seed: int | None = None
    unsteered_twin: bool = False
    feedback: Feedback | None = None
    command: str | None = None

    @classmethod
    def read(cls, found: Any) -> "Options":
        """Return the options in a message's map.

        Raises:
            RequestError: it holds something else.
        """
        known = ("seed", "unsteered_twin", *Feedback.__dataclass_fields__, "command")
        if not isinstance(found, Mapping) or (unknown := found.keys() - {*known}):
            got = short(sorted(map(str, unknown))) if isinstance(found, Mapping) else type(found).__name__
            raise RequestError(f"{OWN}: expected a map of {', '.join(known)}, got {got}; leave others out")
        seed, twin = found.get("seed"), found.get("unsteered_twin", False)
        if seed is not None and (type(seed) is not int or not 0 <= seed < SEEDS):
            raise RequestError(f"{OWN}.seed: expected a whole number in [0, 2**63), got {short(seed)}")
        if type(twin) is not bool:
            raise RequestError(f"{OWN}.unsteered_twin: expected true or false, got {short(twin)}")
        command = found.get("command")
        if command is not None and (command not in COMMANDS or len(found) > 1):
            got = short(command) if len(found) == 1 else short(sorted(map(str, found)))
            raise RequestError(f"{OWN}.command: expected one of {COMMANDS} and nothing else, got {got}")
        return cls(seed, twin, Feedback.read(found), command)


@dataclass(frozen=True)
class Told:
    """A message without an observation.

    Attributes:
        feedback: what a robot tells.
        command: or what is to be done.
    """

    feedback: Feedback | None = None
    command: str | None = None

"""A toy environment that fails on demand, in the ways in which simulators do."""

import os
import signal
import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from bandit import Bandit

WAYS = ("raise", "exit", "kill", "hang", "shape", "scalar", "dtype", "parts", "keys")
SAYS = {
    "raise": "ValueError: the gripper is jammed",
    "exit": "its process ended with exit code 3",
    "kill": "its process ended with signal 9",
    "hang": "expected an answer within 3 s, got none",
    "shape": r"observation\['state'\]: expected the shape of its space, \(2,\), got \(3,\)",
    "scalar": r"observation\['state'\]: expected the shape of its space, \(2,\), got \(\)",
    "dtype": r"observation\['image'\]: expected values of its space's type, uint8, got float64",
    "parts": r"step: expected \(observation, reward, terminated, truncated, info\), got 4 values",
    "keys": r"observation: expected a mapping with \['image', 'state'\], got no \['image'\]",
    "nan": r"expected a finite observation\['state'\], got NaN or infinity",
    "reward": "expected finite rewards, got NaN or infinity",
}


class Breaking(Bandit):
    """Four steps; fails in the given way at step ``at`` (0: in the reset) of episodes with these seeds.

    Args:
        way: of :data:`SAYS`, or "never".
        seeds: of the episodes that fail; None: all.
        at: the step that fails.
        once: a file that is made at the first failure, after which there is none.
        pids: a file to which the process and what it starts are appended.
    """

    steps = 4
    observation_space = gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, (1, 2, 2), np.uint8), state=Bandit.observation_space
    )

    def __init__(
        self,
        way: str = "never",
        seeds: Collection[int] | None = None,
        at: int = 2,
        once: Path | None = None,
        pids: Path | None = None,
    ) -> None:
        self.way, self.seeds, self.at, self.once = way, seeds, at, once
        self.started = None if pids is None else subprocess.Popen(["sleep", "1000"])
        if pids is not None and self.started is not None:
            with pids.open("a") as file:
                file.write(f"{os.getpid()} {self.started.pid}\n")

    def close(self) -> None:
        if self.started is not None:
            self.started.kill()
            self.started.wait()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        state, info = super().reset(seed=seed)
        self.seed = seed
        return self.answer([self.see(state), info])

    def step(self, action: np.ndarray) -> Any:
        state, *rest = super().step(action)
        return self.answer([self.see(state), *rest])

    def see(self, state: np.ndarray) -> dict[str, np.ndarray]:
        return {"state": state, "image": np.full((1, 2, 2), self.clock, np.uint8)}

    def answer(self, parts: list[Any]) -> Any:
        if self.clock == self.at and (self.seeds is None or self.seed in self.seeds):
            if self.once is None or not self.once.exists():
                if self.once is not None:
                    self.once.touch()
                return self.fail(parts)
        return tuple(parts)

    def fail(self, parts: list[Any]) -> Any:
        observation = parts[0]
        match self.way:
            case "raise":
                raise ValueError("the gripper is jammed")
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(1000)
            case "shape":
                observation["state"] = np.zeros(3)
            case "scalar":
                observation["state"] = 0.0
            case "dtype":
                observation["image"] = observation["image"] / 255
            case "nan":
                observation["state"] = observation["state"] * np.nan
            case "reward":
                parts[1] = np.nan
            case "keys":
                del observation["image"]
            case "parts":
                del parts[2]
        return tuple(parts)


class Fails(Bandit):
    """Three steps; dies or raises at the second of an episode in five."""

    steps = 3

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.seed = seed or 0
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        outcome = super().step(action)
        if self.clock == 2 and self.seed % 10 == 0:
            os._exit(3)
        if self.clock == 2 and self.seed % 10 == 1:
            raise ValueError("the gripper is jammed")
        return outcome


class Once(Fails):
    """Raises at the second step of the episode with a seed."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        outcome = Bandit.step(self, action)
        if self.clock == 2 and self.seed == self.bad:
            raise ValueError("the gripper is jammed")
        return outcome


class Lost(Once):
    """Observes nothing after the first step of the episode with a seed."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, *rest = Bandit.step(self, action)
        return (obs * np.nan if self.clock == 1 and self.seed == self.bad else obs), *rest

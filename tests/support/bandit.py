"""Toy environments for the loops that learn while they act. Without torch: simulators start sooner."""

from typing import Any

import gymnasium
import numpy as np


class Bandit(gymnasium.Env):
    """A few steps, each of which costs the squared distance of the action to 0.6."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    steps = 2

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.clock, self.place = 0, self.np_random.normal()
        return np.array([self.place, 0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.clock += 1
        cost = float((action[0] - 0.6) ** 2)
        return np.array([self.place, float(self.clock)]), -cost, self.clock == self.steps, False, {}


class ThreeSteps(Bandit):
    """Three steps; one near the goal is a success."""

    steps = 3

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        *outcome, _ = super().step(action)
        return *outcome, {"success": outcome[1] > -0.02}


class Faulty(ThreeSteps):
    """Now and then a reward or an observation is not finite."""

    count = 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = super().reset(**options)
        Faulty.count += 1
        return (obs * np.nan, info) if Faulty.count % 9 == 8 else (obs, info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, *rest = super().step(action)
        Faulty.count += 1
        return (
            obs * (np.inf if Faulty.count % 11 == 3 else 1),
            np.nan if Faulty.count % 13 == 5 else reward,
            *rest,
        )


class Dead(ThreeSteps):
    """Its reward is never a number."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, np.nan, *rest


class Blind(ThreeSteps):
    """It sees nothing."""

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = super().reset(**options)
        return obs * np.nan, info


class Spiked(ThreeSteps):
    """One episode in fifty has a reward of -1e6."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.bad = seed is not None and seed % 50 == 7
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, *rest = super().step(action)
        return obs, -1e6 if self.bad and self.clock == 2 else reward, *rest

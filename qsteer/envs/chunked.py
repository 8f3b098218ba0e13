"""Environments that take action chunks, and whose answers are checked."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import create_empty_array
from jaxtyping import Shaped

OUTCOMES = ("success", "sum_reward", "max_reward", "length")


class ChunkedAction(gymnasium.Wrapper):
    """One step executes a chunk (H, A) of actions, or what of it the episode has room for.

    After the end of an episode and before the first reset a step does nothing. ``info`` sums up the episode
    in ``success``, ``sum_reward``, ``max_reward`` and ``length``; ``executed`` is the number of actions of
    this step. An environment with a method ``cameras(on)`` renders the last frame of a chunk only.

    Raises:
        ValueError: the environment has other spaces than boxes, or gives an observation that its own space
            does not hold: without a key, of another shape, of numbers that its type cannot take.
        TypeError: its success is no flag.
    """

    def __init__(self, env: gymnasium.Env, horizon: int, gamma: float = 1.0) -> None:
        super().__init__(env)
        action, observation = env.action_space, env.observation_space
        if not (isinstance(action, gymnasium.spaces.Box) and len(action.shape) == 1):
            raise ValueError(f"action space: expected a Box of one axis, got {action}; wrap it")
        if not all(isinstance(box, gymnasium.spaces.Box) for _, box in name_boxes(observation)):
            raise ValueError(
                f"observation space: expected a Box or a Dict of them, got {observation}; wrap the "
                "environment, for example in gymnasium.wrappers.FlattenObservation"
            )
        low, high = (np.tile(bound, (horizon, 1)) for bound in (action.low, action.high))
        self.action_space = self.chunk = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.gamma = gamma
        self._cameras: Callable[[bool], None] = getattr(env.unwrapped, "cameras", lambda on: None)
        empty: Any = create_empty_array(observation)
        self._observation: Any = (
            {key: column[0] for key, column in empty.items()} if isinstance(empty, dict) else empty[0]
        )
        self._over = [True, False]  # terminated, truncated
        self._sums, self._reported = _start_sums(), False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        self._cameras(True)
        self._over, self._sums, self._reported = [False, False], _start_sums(), False
        observation, _ = _check_parts("reset", self.env.reset(seed=seed, options=options), 2)
        self._observation = self._read(observation)
        return self._observation, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute the chunk; the reward is the discounted sum of its rewards."""
        sums, executed, discounted = self._sums, 0, 0.0
        for k, single in enumerate(action):
            if any(self._over):
                break
            self._cameras(k == len(action) - 1)
            observation, reward, *over, info = _check_parts("step", self.env.step(single), 5)
            self._over = [bool(flag) for flag in over]
            success = _read_success(info)
            self._reported |= success is not None
            if success is None:  # an environment that reports successes has reported none in this step
                success = self._over[0] and not self._reported
            sums["success"] = sums["success"] or bool(success)
            sums["sum_reward"] += float(reward)
            sums["max_reward"] = max(sums["max_reward"], float(reward))
            sums["length"] += 1
            discounted += self.gamma**k * float(reward)
            executed += 1
        if executed:
            self._observation = self._read(observation)
        return self._observation, discounted, self._over[0], self._over[1], sums | {"executed": executed}

    def _read(self, observation: Any) -> Any:
        """Return an observation in the types of its space, checked to be one."""
        space = self.env.observation_space
        if not isinstance(space, gymnasium.spaces.Dict):
            return _fit("observation", observation, space)
        if not isinstance(observation, Mapping) or (missing := space.keys() - observation.keys()):
            got = f"no {sorted(missing)}" if isinstance(observation, Mapping) else type(observation).__name__
            raise ValueError(
                f"observation: expected a mapping with {sorted(space)}, got {got}; return what "
                "observation_space says"
            )
        return {key: _fit(f"observation[{key!r}]", observation[key], box) for key, box in space.items()}


def make_chunked(make_env: Callable[[], gymnasium.Env], horizon: int, gamma: float) -> ChunkedAction:
    """Make an environment that takes chunks; other processes can be told to."""
    return ChunkedAction(make_env(), horizon, gamma)


def name_boxes(space: Any) -> Iterator[tuple[str, Any]]:
    """Return the parts of an observation space and their keys; "" is that of an only part."""
    return iter(space.items()) if isinstance(space, gymnasium.spaces.Dict) else iter([("", space)])


def _fit(name: str, value: Any, box: Any) -> Shaped[np.ndarray, "..."]:
    given = np.asarray(value)
    if given.shape != box.shape:
        raise ValueError(
            f"{name}: expected the shape of its space, {box.shape}, got {given.shape}; return what "
            "observation_space says"
        )
    fits = np.can_cast(given.dtype, box.dtype, "same_kind")
    cast = given.astype(box.dtype) if fits else given
    if not fits or (box.dtype.kind in "iu" and (cast != given).any()):
        raise ValueError(
            f"{name}: expected values of its space's type, {box.dtype}, got {given.dtype} that does not fit; "
            "return what observation_space says"
        )
    return cast


def _check_parts(method: str, given: Any, number: int) -> Any:
    if not isinstance(given, tuple) or len(given) != number:
        got = f"{len(given)} values" if isinstance(given, tuple) else type(given).__name__
        parts = "observation, info" if number == 2 else "observation, reward, terminated, truncated, info"
        raise ValueError(f"{method}: expected ({parts}), got {got}; wrap environments of the old Gym")
    return given


def _read_success(info: Mapping[str, Any]) -> bool | None:
    """Return what a step's info says of success; None: nothing.

    Raises:
        TypeError: it is neither a flag nor robomimic's ``{"task": flag}``.
    """
    name = next((name for name in ("success", "is_success") if name in info), None)
    if name is None:
        return None
    said = info[name]
    flag = said["task"] if isinstance(said, Mapping) and "task" in said else said
    try:
        value = np.asarray(flag)
    except ValueError:  # rows of different length
        value = np.asarray(None)
    if value.size != 1 or value.dtype.kind not in "biuf" or value.item() not in (0, 1):
        raise TypeError(
            f'info["{name}"]: expected a flag, or {{"task": flag}}, got {said!r}; return True or False, '
            "for example from a wrapper"
        )
    return bool(value.item())


def _start_sums() -> dict[str, Any]:
    return {"success": False, "sum_reward": 0.0, "max_reward": -np.inf, "length": 0}

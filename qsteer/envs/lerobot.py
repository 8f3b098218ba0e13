"""lerobot's environments, one at a time, for :class:`~qsteer.envs.rollouts.Simulators`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np

SEPARATOR = "/"


def env_config(
    kind: str,
    task: str | None = None,
    task_id: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Return lerobot's ``EnvConfig`` of a registered type.

    Args:
        kind: such as ``"libero"``, ``"metaworld"``, or a plugin's.
        task: the type's own word for what is to be done; None: its default.
        task_id: which task of a suite; None: the only one.
        options: other fields of the configuration, such as ``{"episode_length": 500}``.

    Raises:
        ValueError: the type is not registered, has no tasks of that kind, or no such field.
    """
    from lerobot.envs import EnvConfig

    known = sorted(EnvConfig.get_known_choices())
    if kind not in known:
        raise ValueError(
            f"environment: expected one of {', '.join(known)}, got {kind!r}; "
            "import the plugin that registers it first (--plugin)"
        )
    choice, given = EnvConfig.get_choice_class(kind), dict(options or {})
    fields = sorted(field.name for field in dataclasses.fields(choice))
    if unknown := [name for name in given if name not in fields]:
        raise ValueError(f"environment {kind!r}: expected options among {fields}, got {unknown}")
    config = choice(**given | ({} if task is None else {"task": task}))
    if task_id is not None and hasattr(config, "task_ids"):
        config.task_ids = [task_id]  # builds no other
    return config


class LerobotSimulator(gymnasium.Wrapper):
    """One environment of lerobot's ``make_env``, its observation flat: ``pixels/top``, ``agent_pos``.

    A reset's seed also chooses among the stored initial states of a LIBERO task, and an episode is truncated
    after the environment's ``_max_episode_steps``, as lerobot's own rollouts end it.

    Args:
        config: of the environment.
        task_id: which task of a suite; None: the only one.

    Raises:
        ValueError: there are several tasks and none is named, or none of that number.

    Attributes:
        instruction: the task in words; "": it has none.
    """

    def __init__(self, config: Any, task_id: int | None = None) -> None:
        from lerobot.envs import make_env

        made = {(suite, i): env for suite, envs in make_env(config).items() for i, env in envs.items()}
        chosen = [key for key in made if task_id in (None, key[1])]
        if len(chosen) != 1:
            raise ValueError(
                f"environment: expected one task, got {len(chosen)} for task_id={task_id} among "
                f"{[f'{suite} {i}' for suite, i in made]}; name one (--env-task-id)"
            )
        super().__init__(made[chosen[0]].envs[0])
        self.instruction = str(self._ask("task_description") or self._ask("task") or "")
        self.limit = self._ask("_max_episode_steps")
        self.steps = 0
        boxes = dict(flatten(self.env.observation_space))
        self.observation_space = gymnasium.spaces.Dict(boxes)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin the episode of a seed."""
        self.steps = 0
        if seed is not None and hasattr(self.unwrapped, "init_state_id"):
            self.unwrapped.init_state_id = seed
        observation, info = self.env.reset(seed=seed, options=options)
        return dict(flatten(observation)), info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        late = self.limit is not None and self.steps >= self.limit
        return dict(flatten(observation)), float(reward), terminated, truncated or late, info

    def _ask(self, name: str) -> Any:
        return self.env.get_wrapper_attr(name) if self.env.has_wrapper_attr(name) else None


def flatten(nested: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries and their paths."""
    if isinstance(nested, Mapping | gymnasium.spaces.Dict):
        for key, value in nested.items():
            yield from flatten(value, f"{path}{SEPARATOR}{key}" if path else str(key))
    else:
        yield path, nested


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dictionaries whose leaves these are."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split(SEPARATOR)
        inside = nested
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[name] = value
    return nested

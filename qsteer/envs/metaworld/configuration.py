"""The configuration of the environment, as lerobot registers it."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

STATE, IMAGE, ACTION = "observation.state", "observation.image", "action"
BLACK = 32
"""Edge of the black picture, in pixels."""
LIMIT = 500
"""Steps after which MetaWorld ends an episode."""
FULL, GRIPPER = 10, 4
"""Size of the whole state, and of the gripper's."""


@EnvConfig.register_subclass("metaworld_light")
@dataclass
class MetaworldLight(EnvConfig):
    """One task of MetaWorld.

    Attributes:
        task: MetaWorld's name, such as ``"push-v3"``.
        episode_length: after so many steps an episode is truncated, at most MetaWorld's 500.
        camera: edge of the camera's picture in pixels; the state is then the gripper's (4,): position (3, in
            metres) and opening (0 to 1). 0: the picture is black, and the state (10,) has the position of the
            object and of the goal, too.
    """

    task: str | None = "push-v3"
    fps: int = 80
    episode_length: int = 120
    camera: int = 0
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": STATE, "pixels": IMAGE}
    )

    def __post_init__(self) -> None:
        """Check the values, and say what a policy sees.

        Raises:
            ValueError: a number is out of range.
        """
        if not 1 <= self.episode_length <= LIMIT:
            raise ValueError(f"episode_length: expected 1 to {LIMIT} steps, got {self.episode_length}")
        if self.camera < 0:
            raise ValueError(f"camera: expected at least 0 pixels, got {self.camera}")
        edge, size = (self.camera, GRIPPER) if self.camera else (BLACK, FULL)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (size,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (edge, edge, 3)),
        }

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment."""
        return {"task": self.task, "episode_length": self.episode_length, "camera": self.camera}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
        """Return one task's vector of environments."""
        from qsteer.envs.metaworld.world import LightWorld

        make = [lambda: LightWorld(**self.gym_kwargs)] * n_envs
        vector = gymnasium.vector.AsyncVectorEnv if use_async_envs else gymnasium.vector.SyncVectorEnv
        return {str(self.task): {0: vector(make)}}

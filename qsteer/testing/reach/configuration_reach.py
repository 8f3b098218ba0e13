"""Configurations of the reaching policy and its environment, as lerobot registers them."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.optim.optimizers import AdamWConfig

STATE, IMAGE, ACTION = "observation.state", "observation.image", "action"
PIXELS = 32
TASKS = ("reach the left goal", "reach the right goal")


@PreTrainedConfig.register_subclass("reach")
@dataclass
class ReachConfig(PreTrainedConfig):
    """A small flow-matching policy, which is told its task in words.

    Attributes:
        chunk_size: actions of a chunk.
        n_action_steps: of these, how many are executed.
        num_steps: Euler steps.
        width: of three hidden layers.
        tasks: the instructions that it understands.
    """

    chunk_size: int = 6
    n_action_steps: int = 4
    num_steps: int = 10
    width: int = 128
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    input_features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            STATE: PolicyFeature(FeatureType.STATE, (2,)),
            IMAGE: PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS)),
        }
    )
    output_features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {ACTION: PolicyFeature(FeatureType.ACTION, (2,))}
    )
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )

    @property
    def observation_delta_indices(self) -> None:
        """One observation."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return AdamW."""
        return AdamWConfig(lr=1e-3, weight_decay=0.0)

    def get_scheduler_preset(self) -> None:
        """Return none."""
        return None

    def validate_features(self) -> None:
        """Accept the features: they are always the same."""


@EnvConfig.register_subclass("reach")
@dataclass
class ReachEnvConfig(EnvConfig):
    """The environment: ``task`` is one of :data:`TASKS`."""

    task: str | None = TASKS[0]
    episode_length: int = 30
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (PIXELS, PIXELS, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": STATE, "pixels": IMAGE}
    )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment."""
        return {"task": self.task, "episode_length": self.episode_length}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
        """Return one task's vector of environments."""
        from qsteer.testing.reach.world import ReachEnv

        make = [lambda: ReachEnv(**self.gym_kwargs)] * n_envs
        return {"reach": {0: gymnasium.vector.SyncVectorEnv(make)}}

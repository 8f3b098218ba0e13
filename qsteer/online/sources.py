"""Where an online learner's batches come from: the replay of what its critic sees, and offline data."""

from collections.abc import Sequence

import torch

from qsteer.critics.critic import CriticConfig
from qsteer.critics.encoders import FEATURES
from qsteer.data.episodes import Chunks, Transitions, join_transitions
from qsteer.data.layout import Layout
from qsteer.data.mixed import Mixed
from qsteer.data.replay import Replay
from qsteer.online.settings import OnlineTraining
from qsteer.training.critic import LEARNERS


def make_layout(config: CriticConfig, training: OnlineTraining) -> Layout:
    """Return the layout of the replay that a critic learns from: what it sees, one lane per environment."""
    return Layout(
        observations=_seen_columns(config),
        action_dim=config.action_dim,
        steps=training.row,
        horizon=config.horizon // training.row,
        gamma=training.critic.gamma,
        need=LEARNERS[training.critic.target].need,
        lanes=config.stack * training.num_envs,
        capacity=training.capacity or -(-training.env_steps // training.num_envs) + 1_000,
    )


def _seen_columns(config: CriticConfig) -> int | dict[str, tuple[tuple[int, ...], str]]:
    if not config.views and not config.features:
        return config.obs_dim
    columns: dict[str, tuple[tuple[int, ...], str]] = {
        view: ((3, config.view_size, config.view_size), "uint8") for view in config.views
    }
    if config.obs_dim:
        columns[config.observation_key] = ((config.obs_dim,), "float32")
    if config.features:
        columns[FEATURES] = ((config.features,), "float32")
    return columns


class StackedSource:
    """A source for a stack of critics: of each batch an equal group of rows from each seed's own lanes.

    Args:
        replay: rows of the environments of all seeds.
        lanes: of each seed.
        offline: data to mix in.
        share: of offline rows in a group; ``None``: uniform over all transitions.
    """

    def __init__(
        self, replay: Replay, lanes: Sequence[range], offline: Chunks | None, share: float | None
    ) -> None:
        self.replay, self.lanes = replay, lanes
        self.pools = (
            [Mixed(offline, replay, ratio=None if share is None else 1 - share, lanes=own) for own in lanes]
            if offline
            else None
        )

    def ready(self) -> bool:
        """Whether there is something to learn from for every seed."""
        return self.pools is not None or all(self.replay.ready(own) for own in self.lanes)

    def sample(self, batch_size: int, generator: torch.Generator) -> Transitions:
        """Draw transitions, equally many for each seed."""
        share = batch_size // len(self.lanes)
        if self.pools is not None:
            return join_transitions([pool.sample(share, generator) for pool in self.pools])
        return join_transitions([self.replay.sample(share, generator, own) for own in self.lanes])

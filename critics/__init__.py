"""Critics: values of actions. The ensemble, its encoders and networks, and the targets that it learns."""

from qsteer.critics.critic import BoundCritic, Critic, CriticConfig
from qsteer.critics.encoders import FEATURES, pooled
from qsteer.critics.live import LiveCritic
from qsteer.critics.targets import (
    chunk_return,
    expectile_loss,
    iql_target,
    monte_carlo_target,
    pessimistic,
    sarsa_target,
    td_target,
)

__all__ = [
    "FEATURES",
    "BoundCritic",
    "Critic",
    "CriticConfig",
    "LiveCritic",
    "chunk_return",
    "expectile_loss",
    "iql_target",
    "monte_carlo_target",
    "pessimistic",
    "pooled",
    "sarsa_target",
    "td_target",
]

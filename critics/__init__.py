"""Critics: what says which actions are good. Networks, the ensemble, and the targets they learn."""

from qsteer.critics.critic import BoundCritic, Critic, CriticConfig
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
    "BoundCritic",
    "Critic",
    "CriticConfig",
    "chunk_return",
    "expectile_loss",
    "iql_target",
    "monte_carlo_target",
    "pessimistic",
    "sarsa_target",
    "td_target",
]

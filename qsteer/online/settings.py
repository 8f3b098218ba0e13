"""How to learn online: counts, cadences and shares of a run."""

from dataclasses import dataclass, field

from qsteer.checks import check_at_least, check_positive
from qsteer.training.critic import CriticTraining


@dataclass(frozen=True, kw_only=True)
class OnlineTraining:
    """How to learn online. Steps are environment steps (actions), and are counted for each seed by itself.

    Attributes:
        critic: what the critic learns, how, and from which seed; its ``steps`` and cadences are not used.
        env_steps: how many to act.
        num_envs: environments of each seed.
        row: actions per stored row: 1, every state is observed; the horizon, only decisions are (images,
            features of the policy).
        warmup: steps of the unsteered policy, before the critic learns from them and steers.
        updates_per_step: gradient steps per environment step, those of the warm-up included.
        offline_share: of offline data in each batch, in [0, 1); None: uniform over all transitions.
        capacity: rows kept per environment; the oldest are overwritten; None: all are kept.
        evaluate_every: steps between evaluations; 0: none.
        episodes: of an evaluation, on fixed seeds.
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints of the learner. Rows are kept as soon as they are acted.
        refuse_outliers: refuse rows whose reward only a sensor's mistake explains, and cut their episodes,
            see :class:`~qsteer.data.outliers.RewardScale`. Turn it off where rewards other than successes may
            be rare and more than 16384 times the usual size.
    """

    critic: CriticTraining = field(default_factory=lambda: CriticTraining(target="sarsa", ema=0.005))
    env_steps: int = 50_000
    num_envs: int = 8
    row: int = 1
    warmup: int = 2_000
    updates_per_step: float = 1.0
    offline_share: float | None = None
    capacity: int | None = None
    evaluate_every: int = 5_000
    episodes: int = 20
    log_every: int = 500
    checkpoint_every: int = 5_000
    refuse_outliers: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        counts = "env_steps", "num_envs", "row", "episodes", "log_every", "checkpoint_every"
        check_at_least(self, 1, *counts)
        check_at_least(self, 0, "warmup", "evaluate_every")
        check_positive(self, "updates_per_step")
        if self.offline_share is not None and not 0 <= self.offline_share < 1:
            raise ValueError(
                f"OnlineTraining.offline_share: expected a number in [0, 1), got {self.offline_share}"
            )

"""Rewards that only a sensor's mistake explains are kept from the critic, and listed."""

import logging
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from qsteer.data.episodes import Chunks
from qsteer.data.outliers import Outlier, RewardScale
from qsteer.data.replay import Replay
from qsteer.files import append_json_line
from qsteer.online.health import Health
from qsteer.online.settings import OnlineTraining

logger = logging.getLogger(__name__)

OUTLIERS = "outliers.jsonl"


class RewardGuard:
    """What a run's health learns of rewards, and what is done about outliers.

    New rows are refused at the door (:class:`~qsteer.online.collect.Collector`); rows that were stored before
    so much was known of rewards are taken out again.
    """

    def __init__(self, health: Health, replay: Replay, out: Path, training: OnlineTraining) -> None:
        self.health, self.replay, self.out, self.training = health, replay, out, training
        health.observe_rewards(replay.rewards())

    def read_offline(self, offline: Chunks) -> None:
        """Take in the rewards of offline data, after a check for outliers.

        Raises:
            ValueError: there are.
        """
        training, data = self.training, offline.episodes
        rewards, scale = data.rewards.cpu(), RewardScale()
        scale.observe(rewards)
        found = scale.find(rewards) & ~(data.terminals.cpu() & (rewards > 0))
        if training.refuse_outliers and found.any():
            rows = found.nonzero()[:, 0].tolist()
            raise ValueError(
                f"offline: expected rewards of the usual size, below {scale.limit:.4g}, got "
                f"{rewards[rows[0]].item():.6g} in row {rows[0]} (first of {len(rows)} such rows of "
                f"{len(rewards)}); drop their trajectories, or set OnlineTraining.refuse_outliers=False"
            )
        self.health.observe_rewards(rewards)
        if training.row > 1:  # a row's are between one step's and those of all its steps
            gamma = training.critic.gamma
            self.health.observe_rewards(rewards * sum(gamma**k for k in range(training.row)))

    def list_outliers(self, outliers: list[Outlier], env_steps: int) -> None:
        """Write down what was refused at the door."""
        for outlier in outliers:
            self._list({"env_steps": env_steps} | outlier._asdict())
        outliers.clear()

    def drop_outliers(self) -> None:
        """Take stored outliers out, say which, and write them down."""
        if not self.training.refuse_outliers:
            return
        limit = self.health.scale.limit
        for lane, row, reward in self.replay.drop(self.health.scale.find):
            tqdm.write(
                f"{self.out.name}: row {row} of environment {lane}: the reward {reward:.6g} is beyond "
                f"{limit:.4g}; it is taken out (listed in {OUTLIERS}; refuse_outliers=False keeps such rows)"
            )
            self._list({"lane": lane, "row": row, "reward": reward, "limit": limit})

    def _list(self, line: Mapping[str, float | int]) -> None:
        """Write a line; where the disk does not take it, it goes to the log."""
        try:
            append_json_line(self.out / OUTLIERS, line)
        except OSError as error:
            logger.error("%s: not listed: %s: %s", self.out / OUTLIERS, dict(line), error)

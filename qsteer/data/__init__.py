"""Recorded experience: episodes, a policy's own batches, the replay of online learning, other formats."""

from qsteer.data.batches import Batches, DatasetBatches, SafetensorsBatches, lerobot_batches, record
from qsteer.data.episodes import Chunks, Episodes, Transitions
from qsteer.data.layout import Layout, Rows, Trajectory
from qsteer.data.mixed import Mixed
from qsteer.data.replay import Replay

__all__ = [
    "Batches",
    "Chunks",
    "DatasetBatches",
    "Episodes",
    "Layout",
    "Mixed",
    "Replay",
    "Rows",
    "SafetensorsBatches",
    "Trajectory",
    "Transitions",
    "lerobot_batches",
    "record",
]

"""Recorded experience: episodes, a policy's own batches, the replay of online learning, other formats."""

from qsteer.data.batches import Batches, DatasetBatches, SafetensorsBatches, lerobot_batches, record
from qsteer.data.episodes import Chunks, Episodes, Transitions
from qsteer.data.replay import Layout, Mixed, Replay

__all__ = [
    "Batches",
    "Chunks",
    "DatasetBatches",
    "Episodes",
    "Layout",
    "Mixed",
    "Replay",
    "SafetensorsBatches",
    "Transitions",
    "lerobot_batches",
    "record",
]

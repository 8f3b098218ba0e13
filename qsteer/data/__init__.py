"""Recorded experience: episodes, the replay that online learning writes, exchange with other formats."""

from qsteer.data.episodes import Chunks, Episodes, Transitions
from qsteer.data.replay import Layout, Mixed, Replay

__all__ = ["Chunks", "Episodes", "Layout", "Mixed", "Replay", "Transitions"]

"""A recorded dataset of the reaching world and a policy cloned on it for a moment, once per process."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from qsteer.data.lerobot import open_dataset, open_policy
from qsteer.testing.reach.cloning import clone
from qsteer.testing.reach.world import record_dataset

EPISODES = 12


@cache
def folder(success: bool, steps: int = 20) -> Path:
    """A folder with ``dataset`` and ``policy``."""
    path = Path(mkdtemp(prefix="reach"))
    clone(record_dataset(path / "dataset", EPISODES, success=success), path / "policy", steps=steps)
    return path


def opened(success: bool = True, steps: int = 20) -> tuple[Any, Any, Any]:
    """Dataset, policy and its preprocessor."""
    policy, before, _ = open_policy(folder(success, steps) / "policy")
    return open_dataset(folder(success, steps) / "dataset"), policy, before

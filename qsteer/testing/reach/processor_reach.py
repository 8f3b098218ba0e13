"""Processors of the reaching policy: lerobot's default ones."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors

from qsteer.testing.reach.configuration_reach import ReachConfig


def make_reach_pre_post_processors(config: ReachConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Return pre- and post-processor."""
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)

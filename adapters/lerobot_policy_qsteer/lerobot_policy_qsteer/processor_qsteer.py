"""Processors of a steered policy: the base's own."""

from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors

from lerobot_policy_qsteer.configuration_qsteer import QSteerConfig


def make_qsteer_pre_post_processors(config: QSteerConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Return pre- and post-processor of the checkpoint ``config.base``, on the configured device.

    Args:
        config: of the steered policy; a saved steering has the processors beside it.
        dataset_stats: not used: the critic was trained under the base's statistics.
    """
    base = PreTrainedConfig.from_pretrained(str(config.base), revision=config.base_revision)
    return make_pre_post_processors(
        base,
        pretrained_path=str(config.base),
        pretrained_revision=config.base_revision,
        preprocessor_overrides={"device_processor": {"device": str(config.device)}},
    )

"""lerobot's plugin for steered policies, ``--policy.type=qsteer``; lerobot imports it by its name."""

from lerobot_policy_qsteer.configuration_qsteer import QSteerConfig

__all__ = ["QSteerConfig"]

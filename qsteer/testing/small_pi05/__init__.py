"""A pi0.5 of any size, ``--policy.type=small_pi05``, as a plugin of lerobot's; it is imported by its name."""

from qsteer.testing.small_pi05.configuration_small_pi05 import SmallPI05Config

__all__ = ["SmallPI05Config"]

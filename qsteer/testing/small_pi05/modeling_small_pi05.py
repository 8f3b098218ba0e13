"""The policy: lerobot's own code for pi0.5 throughout, built smaller."""

from typing import Any

from lerobot.policies.pi05 import modeling_pi05

from qsteer.testing.lerobot import shrink
from qsteer.testing.small_pi05.configuration_small_pi05 import SmallPI05Config


class SmallPI05Policy(modeling_pi05.PI05Policy):
    """lerobot's, of another size; arguments are its own."""

    config_class = SmallPI05Config
    name = "small_pi05"

    def __init__(self, config: SmallPI05Config, **kwargs: Any) -> None:
        with shrink(modeling_pi05, config.width, config.depth, config.vocabulary):
            super().__init__(config, **kwargs)

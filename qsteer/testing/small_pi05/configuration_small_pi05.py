"""The configuration, as lerobot registers it."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config


@PreTrainedConfig.register_subclass("small_pi05")
@dataclass
class SmallPI05Config(PI05Config):
    """lerobot's, whose own sizes are those of two Gemmas.

    Attributes:
        width: of the VLM, its vision tower and the action expert.
        depth: layers of the VLM and of the action expert.
        vocabulary: tokens of the VLM.
        tokenizer: its folder or hub name, see :func:`~qsteer.testing.checkpoints.write_tokenizer`.
    """

    width: int = 128
    depth: int = 4
    vocabulary: int = 64
    tokenizer: str = ""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a number is out of range.
        """
        super().__post_init__()
        if self.width % 16 or self.width < 32:
            raise ValueError(f"width: expected a multiple of 16 from 32, got {self.width}")
        if self.depth < 1 or self.vocabulary < 1:
            raise ValueError(
                f"depth, vocabulary: expected at least 1, got {self.depth} and {self.vocabulary}"
            )

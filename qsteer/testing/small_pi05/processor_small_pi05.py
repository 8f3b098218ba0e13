"""lerobot's own processors of pi0.5, with another tokenizer."""

from typing import Any

import torch
from lerobot.policies.pi05 import processor_pi05
from lerobot.processor import TokenizerProcessorStep

from qsteer.testing.lerobot import replaced
from qsteer.testing.small_pi05.configuration_small_pi05 import SmallPI05Config


def make_small_pi05_pre_post_processors(
    config: SmallPI05Config, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[Any, Any]:
    """Return the pre- and post-processor; lerobot finds this function by its name."""

    def tokenize(tokenizer_name: str, **options: Any) -> TokenizerProcessorStep:
        return TokenizerProcessorStep(config.tokenizer, **options)

    with replaced(processor_pi05, TokenizerProcessorStep=tokenize):
        return processor_pi05.make_pi05_pre_post_processors(config, dataset_stats)

"""openpi's PyTorch models pi0 and pi0.5, alone or in its ``Policy``. Imports nothing of openpi.

Its JAX models have no gradients that torch could follow, and are not served.
"""

from dataclasses import replace
from typing import Any

from qsteer.adapters.lerobot import repeat_context
from qsteer.clock import MIRRORED
from qsteer.hosts import Host


def observe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return an openpi ``Observation`` under lerobot's names: state, images, tokens."""
    seen = arguments["observation"]
    named = {
        "observation.state": seen.state,
        **{f"observation.images.{name}": image for name, image in seen.images.items()},
        "observation.language.tokens": seen.tokenized_prompt,
        "observation.language.attention_mask": seen.tokenized_prompt_mask,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


PI0_PYTORCH = Host(
    serves="PI0Pytorch",
    marks=("_preprocess_observation",),  # lerobot's class of that name has none
    entry="sample_actions",
    step="denoise_step",
    batch="sample_actions",
    clock=replace(MIRRORED, count="sum"),
    steps=10,
    executed="config.action_horizon",
    action_shape="config.action_dim",
    padded=True,
    chunk="config.action_horizon",
    observe=observe,
    repeat=repeat_context,
    layers="paligemma_with_expert.gemma_expert.model.layers",
    bounds=None,  # of quantiles, or of mean and standard deviation: the model does not know
)

HOSTS = (PI0_PYTORCH,)

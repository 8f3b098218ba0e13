"""lerobot's EO1. Imports nothing of lerobot.

Its velocity is a function inside its loop, which crops the key-value cache and writes the embedded chunk
among the prompt's: each call has copies of both. It draws its noise itself, and has no real-time chunking.
"""

from typing import Any

from torch import Tensor

from qsteer.adapters.closures import read_closure, with_closure
from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.experts import depths, prefix_features
from qsteer.adapters.lerobot import action_bounds, repeat_context
from qsteer.clock import MIRRORED
from qsteer.hosts import LOCAL, Host


def context(arguments: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """Return the loop's own function, and the variables around it."""
    return {LOCAL: step[LOCAL]} | read_closure(step[LOCAL])


def repeat(context: dict[str, Any], k: int) -> dict[str, Any]:
    """Return the context of ``k`` rows per observation, with a cache and embeddings of its own."""
    places = context["position_ids"]  # (3, B, L)
    own = repeat_context({name: given for name, given in context.items() if name != "position_ids"}, k)
    if k == 1:
        return own | {"position_ids": places, "inputs_embeds": own["inputs_embeds"].clone()}
    return own | {"position_ids": places.repeat_interleave(k, 1)}


def velocity(policy: Any, context: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity by the loop's own function."""
    return with_closure(context[LOCAL], context)(x, t)


def features(context: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return tokens and mask of the prefix, see :func:`qsteer.adapters.experts.prefix_features`."""
    values = [layer.values for layer in depths(context["past_key_values"].layers)]
    return prefix_features(values, context["attention_mask"][:, : context["act_start"]].bool(), None)


EO1 = Host(
    serves="EO1Policy",
    entry="model.sample_actions",
    step="model.embed_suffix",
    batch="predict_action_chunk",
    clock=MIRRORED,
    steps="config.num_denoise_steps",
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    x="noisy_actions",
    local="denoise_fn",
    chunk="config.chunk_size",
    queue="_action_queue",
    context=context,
    repeat=repeat,
    velocity=velocity,
    features=features,
    layers="model.vlm_backbone.model.language_model.layers",
    bounds=action_bounds,
    contract=read_lerobot,
)

HOSTS = (EO1,)

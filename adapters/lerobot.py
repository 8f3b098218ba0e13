"""lerobot 0.6's flow-matching policies pi0, pi0.5 and SmolVLA. Imports nothing of lerobot."""

from copy import copy
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.experts import depths, prefix_features
from qsteer.adapters.pi import PiExpert
from qsteer.adapters.smolvla import SmolExpert
from qsteer.clock import MIRRORED
from qsteer.hosts import Host
from qsteer.types import Bounds


def repeat_context(context: Any, k: int) -> Any:
    """Repeat a step's arguments, transformers' key-value caches included, for ``k`` rows per observation.

    A cache comes back with layers of its own, for k = 1 on the same tensors: SmolVLA's step appends to its
    cache, and what it leaves there would hold the graphs of all guided steps.
    """

    def is_cache(leaf: Any) -> bool:
        return hasattr(leaf, "batch_repeat_interleave")

    def repeated(leaf: Any) -> Any:
        if is_cache(leaf):
            leaf = copy(leaf)
            leaf.layers = [copy(layer) for layer in leaf.layers]
            if k > 1:
                leaf.batch_repeat_interleave(k)
        elif isinstance(leaf, Tensor) and k > 1:
            leaf = leaf.repeat_interleave(k, dim=0)
        return leaf

    return pytree.tree_map(repeated, context, is_leaf=is_cache)


def features(context: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return tokens and mask of the prefix, see :func:`qsteer.adapters.experts.prefix_features`."""
    values = [layer.values for layer in depths(context["past_key_values"].layers)]
    return prefix_features(values, context["prefix_pad_masks"], context.get("state"))


def action_bounds(policy: Any) -> Bounds:
    """Return the bounds of a policy's normalised actions, by how its processor normalises them.

    Only ``MIN_MAX`` maps all data into [-1, 1]. Under ``MEAN_STD`` a third of them lie beyond; ``QUANTILES``
    maps the 1st and 99th percentile of each dimension to -1 and 1, ``QUANTILE10`` the 10th and 90th, so that
    2 and 20 in 100 lie beyond; ``IDENTITY`` leaves the robot's units, of which nothing is known. Nor has a pi
    model in Aloha's joints bounds, for it turns the normalised actions into its own.
    """
    mode = policy.config.normalization_mapping.get("ACTION")
    bounded = mode == "MIN_MAX" and not getattr(policy.config, "adapt_to_pi_aloha", False)
    return (-1.0, 1.0) if bounded else None


PI05 = Host(
    serves="PI05Policy",
    entry="model.sample_actions",
    step="model.denoise_step",
    batch="predict_action_chunk",
    clock=MIRRORED,
    steps="config.num_inference_steps",
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    chunk="config.chunk_size",
    queue="_action_queue",
    rtc="model._rtc_enabled",
    repeat=repeat_context,
    features=features,
    prepare=PiExpert,
    layers="model.paligemma_with_expert.gemma_expert.model.layers",
    bounds=action_bounds,
    contract=read_lerobot,
)

PI0 = replace(PI05, serves="PI0Policy")

SMOLVLA = replace(
    PI05,
    serves="SmolVLAPolicy",
    batch="_get_action_chunk",
    steps="config.num_steps",
    queue="_queues",
    layers="model.vlm_with_expert.lm_expert.layers",
    prepare=SmolExpert,
)

HOSTS = (PI0, PI05, SMOLVLA)

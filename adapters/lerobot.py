"""lerobot 0.6's flow-matching policies pi0, pi0.5 and SmolVLA. Imports nothing of lerobot."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.experts import depths, prefix_features
from qsteer.adapters.pi import PiExpert
from qsteer.adapters.smolvla import SmolExpert
from qsteer.chunking import Held
from qsteer.clock import MIRRORED, Time
from qsteer.flow import factor
from qsteer.hosts import Host, HostField
from qsteer.types import Bounds, Field


def repeat_context(context: Any, k: int) -> Any:
    """Repeat a step's arguments, transformers' key-value caches included, for ``k`` rows per observation.

    A cache comes back with layers of its own, for k = 1 on the same tensors: SmolVLA's step appends to its
    cache, and what it leaves there would hold the graphs of all guided steps.
    """

    def is_cache(leaf: Any) -> bool:
        return hasattr(leaf, "batch_repeat_interleave")

    def own(cache: Any) -> Any:
        cache = copy(cache)
        if hasattr(cache, "layers"):
            cache.layers = [copy(layer) for layer in cache.layers]
        else:  # transformers before 4.54, which openpi has
            cache.key_cache, cache.value_cache = list(cache.key_cache), list(cache.value_cache)
        return cache

    def repeated(leaf: Any) -> Any:
        if is_cache(leaf):
            leaf = own(leaf)
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


@dataclass(frozen=True, kw_only=True)
class ProcessedHeld(Held):
    """A velocity held to the former chunk by lerobot's own processor, in its arithmetic."""

    processor: Any
    left: Tensor
    """What is left of the former chunk, as the policy was given it."""
    delay: int | None
    until: int | None

    def hold(self, v: Float[Tensor, "B H A"], x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Return the held velocity, given the policy's own at (x, t)."""
        clock = self.field.clock
        time = factor(clock.to_host(t), x) if isinstance(t, Tensor) else clock.exact(t)
        own = clock.velocity(v)
        held = self.processor.denoise_step(x, self.left, self.delay, time, lambda _: own, self.until)
        return clock.velocity(held)

    def repeat(self, k: int) -> "ProcessedHeld":
        """Return the field for ``k`` rows per observation."""
        left = self.left if self.left.ndim < 3 else self.left.repeat_interleave(k, 0)
        previous = self.previous.repeat_interleave(k, 0)
        return replace(self, field=self.field.repeat(k), previous=previous, left=left)


def hold(policy: Any, field: HostField, arguments: dict[str, Any], noise: Float[Tensor, "B H A"]) -> Field:
    """Return the velocity as ``policy.model.rtc_processor`` holds it; without a former chunk, as it is."""
    left = arguments.get("prev_chunk_left_over")
    if left is None:
        return field
    processor = policy.model.rtc_processor
    delay, until = arguments.get("inference_delay"), arguments.get("execution_horizon")
    rows = left if left.ndim == 3 else left[None]
    horizon = processor.rtc_config.execution_horizon if until is None else until
    weights = processor.get_prefix_weights(delay, min(horizon, rows.shape[1]), noise.shape[1])
    previous = torch.zeros_like(noise)
    previous[:, : rows.shape[1], : rows.shape[2]] = rows
    return ProcessedHeld(
        field=field,
        previous=previous,
        weights=weights.to(noise)[:, None],
        processor=processor,
        left=left,
        delay=delay,
        until=until,
    )


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
    hold=hold,
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

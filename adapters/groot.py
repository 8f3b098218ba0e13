"""lerobot's GR00T N1.7. Imports nothing of lerobot.

Its own real-time chunking starts from the former chunk and slows the velocity down: refused with steering.
"""

from typing import Any

import torch
from torch import Tensor

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import PAPER, whole_steps
from qsteer.hosts import Host


def observe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the batch, with the newest of its normalised, padded states (B, S) as ``observation.state``."""
    batch = arguments["batch"]
    return batch | {"observation.state": batch["state"][:, -1]}


def context(arguments: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """Return what the action head knows of the observations.

    Raises:
        RuntimeError: it is given the former chunk.
    """
    if "action" in arguments["action_input"]:
        raise RuntimeError(
            "policy: expected no former chunk, got prev_chunk_left_over: GR00T's own real-time chunking is "
            "not composed with steering; infer synchronously, or remove the steering"
        )
    seen = arguments["backbone_output"]
    names = "backbone_features", "state_features", "embodiment_id"
    masks = {name: seen[name] for name in ("image_mask", "backbone_attention_mask") if name in seen}
    return {name: arguments[name] for name in names} | masks


def velocity(policy: Any, context: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """Return the action head's velocity; it knows whole steps of ``num_timestep_buckets``."""
    head, robot = policy._groot_model.action_head, context["embodiment_id"]
    steps = whole_steps(t, head.num_timestep_buckets)
    chunk = head.action_encoder(x, steps, robot)
    if head.config.add_pos_embed:
        chunk = chunk + head.position_embedding(torch.arange(chunk.shape[1], device=x.device))[None]
    out = head.model(
        hidden_states=torch.cat((context["state_features"], chunk), 1),
        encoder_hidden_states=context["backbone_features"],
        timestep=steps,
        **{name: context[name] for name in ("image_mask", "backbone_attention_mask") if name in context}
        if head.config.use_alternate_vl_dit
        else {},
    )
    return head.action_decoder(out, robot)[:, -head.action_horizon :]


GROOT = Host(
    serves="GrootPolicy",
    entry="_groot_model.action_head.get_action_with_features",
    step="_groot_model.action_head.action_encoder.forward",
    batch="predict_action_chunk",
    clock=PAPER,
    steps="_groot_model.action_head.num_inference_timesteps",
    executed="_action_queue_steps",
    action_shape="config.action_feature.shape",
    x="actions",
    t="timesteps",
    chunk="config.chunk_size",
    queue="_action_queue",
    observe=observe,
    context=context,
    velocity=velocity,
    result=lambda action: {"action_pred": action},
    features=lambda context: context["backbone_features"].mean(1),
    bounds=action_bounds,
    contract=read_lerobot,
)

HOSTS = (GROOT,)

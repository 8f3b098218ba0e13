"""lerobot's VLA-JEPA. Imports nothing of lerobot."""

from typing import Any

from torch import Tensor

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import PAPER, whole_steps
from qsteer.hosts import Host


def velocity(policy: Any, context: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """Return the action head's velocity; it knows whole steps of ``action_num_timestep_buckets``."""
    head = policy.model.action_model
    steps = whole_steps(t, head.config.action_num_timestep_buckets)
    tokens = context["conditioning_tokens"]
    hidden = head._build_inputs(tokens, x, context["state"], steps)
    out = head.model(hidden_states=hidden, encoder_hidden_states=tokens, timestep=steps)
    return head.action_decoder(out[:, -head.action_horizon :])


VLA_JEPA = Host(
    serves="VLAJEPAPolicy",
    entry="model.action_model.predict_action",
    step="model.action_model._build_inputs",
    batch="predict_action_chunk",
    clock=PAPER,
    steps="model.action_model.num_inference_timesteps",
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    x="actions",
    t="timesteps",
    chunk="config.chunk_size",
    queue="_queues",
    velocity=velocity,
    features=lambda context: context["conditioning_tokens"].mean(1),
    bounds=action_bounds,
    contract=read_lerobot,
)

HOSTS = (VLA_JEPA,)

"""lerobot's MolmoAct2, its continuous actions. Imports nothing of lerobot.

Its loop reads a table of what depends on the time alone, which its action expert also computes by itself. On
a GPU the loop runs in a CUDA graph of its own, in which nothing can be bent: that is to be switched off. Its
real-time chunking is another loop, and refused.
"""

from typing import Any

from torch import Tensor

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import PAPER
from qsteer.flow import repeat_rows
from qsteer.hosts import Host
from qsteer.randomness import normal

SHARED = ("kind", "rope_cache", "self_mask")
"""What is the same for all rows."""


def context(arguments: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """Return what the action expert knows of the observations, and which dimensions are padding."""
    known = step["context"]
    return {"kind": type(known), **vars(known), "padding": arguments.get("action_dim_is_pad")}


def repeat(context: dict[str, Any], k: int) -> dict[str, Any]:
    """Return the context of ``k`` rows per observation."""
    if k == 1:
        return context
    rows = {name: given for name, given in context.items() if name not in SHARED}
    return context | repeat_rows(rows, k)


def velocity(policy: Any, context: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """Return the action expert's velocity, 0 where the robot has no dimension."""
    known = {name: given for name, given in context.items() if name not in ("kind", "padding")}
    model = policy.model.model
    v = model.action_expert.forward_with_context(x, t, context=context["kind"](**known))
    enabled = model.config.mask_action_dim_padding
    return model._mask_action_dim_tensor(v, action_dim_is_pad=context["padding"], enabled=enabled)


def draw(like: Tensor) -> Tensor:
    """Return noise like a chunk's, whose masked entries are 0 in every row."""
    return normal(like.shape, like) * (like != 0).any(0)


def refuses(policy: Any) -> str | None:
    """Return what of a configuration is no loop that can be entered."""
    config = policy.config
    if config.enable_lora_vlm:
        return "enable_lora_vlm=True; merge the adapters, and load it without"
    if config.inference_action_mode != "continuous":
        return f"inference_action_mode={config.inference_action_mode!r}; set it to 'continuous'"
    model = policy.model.model
    if model.action_cuda_graph_manager.enabled and model.device.type == "cuda":
        return (
            "its loop in a CUDA graph; set policy.config.enable_inference_cuda_graph = False, and call "
            "policy.eval()"
        )
    return None


MOLMOACT2 = Host(
    serves="MolmoAct2Policy",
    entry="model.model.generate_actions_from_inputs",
    step="model.model.action_expert.forward_with_context",
    batch="predict_action_chunk",
    clock=PAPER,
    steps="model.model.config.flow_matching_num_steps",
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    x="actions",
    chunk="config.chunk_size",
    queue="_action_queue",
    rtc="_rtc_enabled",
    context=context,
    repeat=repeat,
    velocity=velocity,
    noise=draw,
    features=lambda context: context["kv_contexts"][-1][1].flatten(2).mean(1),
    refuses=refuses,
    bounds=action_bounds,
    contract=read_lerobot,
)

HOSTS = (MOLMOACT2,)

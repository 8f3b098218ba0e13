"""lerobot's Evo1. Imports nothing of lerobot.

Its noise is uniform in [-1, 1], and its velocity a function inside its loop. That function is for the rows of
the batch, so that candidates are asked for one after another.
"""

from typing import Any

import torch
from torch import Tensor

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import PAPER, whole_steps
from qsteer.hosts import LOCAL, Host
from qsteer.randomness import uniform

TIMES = 999
"""The largest index into its table of times."""


def context(arguments: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """Return the loop's own function, and how many times its rows are repeated."""
    return {LOCAL: step[LOCAL], "times": 1}


def repeat(context: dict[str, Any], k: int) -> dict[str, Any]:
    """Return the context of ``k`` rows per observation."""
    return context | {"times": k * context["times"]}


def velocity(policy: Any, context: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity by the loop's own function, for as many rows at once as it knows."""
    head, k = policy.model.action_head, context["times"]
    index = whole_steps(t, TIMES).clamp(max=TIMES)
    times = head.time_pos_enc(TIMES + 1)[0].to(x.device)[index].to(head.dtype)
    rows = zip(x.unflatten(0, (-1, k)).unbind(1), times.unflatten(0, (-1, k)).unbind(1), strict=True)
    return torch.stack([context[LOCAL](chunk, time) for chunk, time in rows], 1).flatten(0, 1)


def draw(like: Tensor) -> Tensor:
    """Return noise like a chunk's, whose masked entries are 0 in every row."""
    return (2 * uniform(like.shape, like) - 1) * (like != 0).any(0)


EVO1 = Host(
    serves="Evo1Policy",
    entry="model.action_head.get_action",
    step="model.action_head._project_actions",
    batch="predict_action_chunk",
    clock=PAPER,
    steps="model.action_head.num_inference_timesteps",
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    x="action_seq",
    local="predict_velocity",
    noise=draw,
    chunk="config.chunk_size",
    queue="_action_queue",
    rtc="_rtc_enabled",
    context=context,
    repeat=repeat,
    velocity=velocity,
    result=lambda action: action.flatten(1),
    bounds=action_bounds,
    contract=read_lerobot,
)

HOSTS = (EVO1,)

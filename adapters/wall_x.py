"""lerobot's Wall-X, its continuous actions. Imports nothing of lerobot.

Its velocity is a function inside its loop, which runs the whole prompt at each step, and is given one time
for all rows. The number of steps is an argument that lerobot leaves at 10.
"""

from typing import Any

import torch
from torch import Tensor

from qsteer.adapters.closures import read_closure, with_closure
from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import Clock
from qsteer.flow import repeat_rows
from qsteer.hosts import LOCAL, Host


def context(arguments: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """Return the loop's own function, and the variables around it.

    Raises:
        RuntimeError: it was given a key-value cache.
    """
    around = read_closure(step[LOCAL])
    if around["past_key_values"] is not None:
        raise RuntimeError(
            "policy: expected no key-value cache, got past_key_values; call predict_action_chunk(batch)"
        )
    return {LOCAL: step[LOCAL]} | around


def repeat(context: dict[str, Any], k: int) -> dict[str, Any]:
    """Return the context of ``k`` rows per observation."""
    if k == 1:
        return context
    places = context["position_ids"]  # (3, B, L)
    rows = {name: given for name, given in context.items() if name != "position_ids"}
    return repeat_rows(rows, k) | {
        "position_ids": None if places is None else places.repeat_interleave(k, 1),
        "batch_size": k * context["batch_size"],
    }


def velocity(policy: Any, context: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity by the loop's own function; rows of other times are asked for apart."""
    step = with_closure(context[LOCAL], context)
    times = t.unique()
    if len(times) == 1:
        return step(times[0], x)
    each = torch.stack([step(time, x) for time in times])
    return each[torch.searchsorted(times, t), torch.arange(len(x), device=x.device)]


def refuses(policy: Any) -> str | None:
    """Return what of a configuration has no velocity."""
    mode = policy.config.prediction_mode
    return None if mode == "diffusion" else f"prediction_mode={mode!r}; set it to 'diffusion'"


WALL_X = Host(
    serves="WallXPolicy",
    entry="model.predict",
    step="model.action_preprocessor.step",
    batch="predict_action_chunk",
    clock=Clock(count="linspace"),
    steps=10,
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    x="noisy_action",
    num_steps="num_inference_timesteps",
    local="step",
    chunk="config.chunk_size",
    queue="_queues",
    context=context,
    repeat=repeat,
    velocity=velocity,
    result=lambda action: {"predict_action": action},
    features=lambda context: context["inputs_embeds"].mean(1),
    refuses=refuses,
    bounds=action_bounds,
    contract=read_lerobot,
)

HOSTS = (WALL_X,)

"""lerobot's X-VLA. Imports nothing of lerobot.

It predicts the clean action and renoises it from the noise where it began (:mod:`qsteer.renoising`). What it
predicts for a gripper is a logit, which the network is never given back: the critic sees its sigmoid, as the
robot does, and a gradient in x has nothing to say of that entry of x.
"""

from typing import Any

import torch
from torch import Tensor

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import Clock
from qsteer.hosts import Host
from qsteer.types import Bounds


def predict(policy: Any, context: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """Return the clean action that the policy predicts."""
    model = policy.model
    proprio, seen = model.action_space.preprocess(context["proprio"], x)
    own = context | {"proprio": proprio, "action_with_noise": seen, "t": t.to(x.dtype)}
    return model.transformer(**own)


def decode(policy: Any, action: Tensor) -> Tensor:
    """Return what the robot is given: without padding, the sigmoid of gripper logits."""
    return policy.model.action_space.postprocess(action.clone())


def features(context: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the tokens of Florence-2's encoder, all of them present."""
    tokens = context["vlm_features"]
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def bounds(policy: Any) -> Bounds:
    """Return the bounds of the normalised actions; none where some of them are logits."""
    return None if policy.model.action_space.gripper_idx else action_bounds(policy)


X_VLA = Host(
    serves="XVLAPolicy",
    entry="model.generate_actions",
    step="model.transformer.forward",
    batch="_get_action_chunk",
    clock=Clock(noise=1.0, action=0.0),
    steps="config.num_denoising_steps",
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    x="action_with_noise",
    t="t",
    num_steps="steps",
    chunk="config.chunk_size",
    queue="_queues",
    renoises=True,
    velocity=predict,
    decode=decode,
    features=features,
    layers="model.transformer.blocks",
    reads=("norm1", "norm2"),
    bounds=bounds,
    contract=read_lerobot,
)

HOSTS = (X_VLA,)

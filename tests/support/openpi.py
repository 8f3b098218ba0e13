"""A stand-in for openpi's PyTorch models and its ``Policy``: their interface on lerobot's small ones.

openpi is on no package index. Signatures, the time that is summed up in float32, what is bound when and the
numpy interface are those of its public code; the networks are lerobot's port of them.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lerobot.policies.pi0.modeling_pi0 import make_att_2d_masks
from torch import Tensor, nn

from qsteer.testing import hosts


@dataclass
class Observation:
    """What the model sees."""

    images: dict[str, Tensor]
    image_masks: dict[str, Tensor]
    state: Tensor
    tokenized_prompt: Tensor | None = None
    tokenized_prompt_mask: Tensor | None = None


class PI0Pytorch(nn.Module):
    """openpi's entry and step."""

    def __init__(self, pi05: bool = False, compiled: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.pi05 = pi05
        self.port = (hosts.pi05 if pi05 else hosts.pi0)(seed=seed).model
        config = self.port.config
        self.config = SimpleNamespace(
            action_horizon=config.chunk_size, action_dim=config.max_action_dim, pi05=pi05
        )
        if compiled:
            self.sample_actions = torch.compile(self.sample_actions, backend="eager")

    @property
    def paligemma_with_expert(self) -> nn.Module:
        return self.port.paligemma_with_expert

    def _preprocess_observation(self, observation: Observation, *, train: bool = True) -> tuple[Any, ...]:
        return (
            list(observation.images.values()),
            list(observation.image_masks.values()),
            observation.tokenized_prompt,
            observation.tokenized_prompt_mask,
            observation.state,
        )

    @torch.no_grad()
    def sample_actions(
        self, device: Any, observation: Observation, noise: Any = None, num_steps: int = 10
    ) -> Tensor:
        rows = len(observation.state)
        if noise is None:
            noise = torch.randn(rows, self.config.action_horizon, self.config.action_dim, device=device)
        images, masks, tokens, token_masks, state = self._preprocess_observation(observation, train=False)
        embedded, pad, attend = self.port.embed_prefix(images, masks, tokens, token_masks)
        _, cache = self.paligemma_with_expert.forward(
            attention_mask=torch.where(make_att_2d_masks(pad, attend)[:, None], 0.0, -2.3819763e38),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        dt = torch.tensor(-1.0 / num_steps, dtype=torch.float32, device=device)
        x, time = noise, torch.tensor(1.0, dtype=torch.float32, device=device)
        while time >= -dt / 2:
            x = x + dt * self.denoise_step(state, pad, cache, x, time.expand(rows))
            time += dt
        return x

    def denoise_step(
        self, state: Tensor, prefix_pad_masks: Tensor, past_key_values: Any, x_t: Tensor, timestep: Tensor
    ) -> Tensor:
        own = {} if self.pi05 else {"state": state}
        return self.port.denoise_step(
            prefix_pad_masks=prefix_pad_masks,
            past_key_values=past_key_values,
            x_t=x_t,
            timestep=timestep,
            **own,
        )


class Policy:
    """openpi's wrapper: numpy in, numpy out, one observation at a time."""

    def __init__(self, model: PI0Pytorch, sample_kwargs: dict[str, Any] | None = None) -> None:
        self._model = model.eval()
        self._sample_kwargs = sample_kwargs or {}
        self._pytorch_device = "cpu"
        self._sample_actions = model.sample_actions

    def infer(self, obs: dict[str, Any], *, noise: np.ndarray | None = None) -> dict[str, Any]:
        rows = {key: torch.from_numpy(np.array(value))[None] for key, value in obs.items()}
        given = dict(self._sample_kwargs)
        if noise is not None:
            given["noise"] = torch.from_numpy(noise)[None]
        seen = Observation(
            images={"base_0_rgb": rows["image"]},
            image_masks={"base_0_rgb": torch.ones(1, dtype=torch.bool)},
            state=rows["state"],
            tokenized_prompt=rows["prompt"],
            tokenized_prompt_mask=torch.ones_like(rows["prompt"], dtype=torch.bool),
        )
        actions = self._sample_actions(self._pytorch_device, seen, **given)
        return {"actions": np.asarray(actions[0].detach()), "policy_timing": {"infer_ms": 0.0}}


def observe(rows: int = 1, seed: int = 0) -> Observation:
    """Random observations for the bare model."""
    draw = torch.Generator().manual_seed(seed)
    return Observation(
        images={"base_0_rgb": torch.rand(rows, 3, 28, 28, generator=draw) * 2 - 1},
        image_masks={"base_0_rgb": torch.ones(rows, dtype=torch.bool)},
        state=torch.randn(rows, 6, generator=draw),
        tokenized_prompt=torch.randint(4, 60, (rows, 5), generator=draw),
        tokenized_prompt_mask=torch.ones(rows, 5, dtype=torch.bool),
    )


def request(seed: int = 0) -> dict[str, Any]:
    """One observation for :class:`Policy`."""
    seen = observe(1, seed)
    return {
        "image": seen.images["base_0_rgb"][0].numpy(),
        "state": seen.state[0].numpy(),
        "prompt": seen.tokenized_prompt[0].numpy(),
    }

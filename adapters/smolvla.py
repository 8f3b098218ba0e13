"""lerobot's SmolVLA, prepared as :mod:`qsteer.adapters.experts` says. Imports no lerobot.

Most layers of its expert look at the prefix alone, at the VLM's keys and values projected by the layer. The
host's own step projects the whole prefix each time; here that is done once for an action.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from qsteer.adapters.experts import (
    Block,
    Expert,
    ExpertField,
    Modulation,
    Moment,
    depths,
    grouped,
    joined,
    prefix_features,
    project,
    turned,
)
from qsteer.hosts import HostField

WAVELENGTH = 10_000
"""Longest of the host's rotary embedding, whatever the VLM's configuration says."""


class SmolExpert(Expert):
    """The action expert of a SmolVLA.

    Args:
        policy: lerobot's SmolVLAPolicy.

    Raises:
        TypeError: it keeps no keys and values, or its expert has biases.
    """

    def __init__(self, policy: Any) -> None:
        model, both = policy.model, policy.model.vlm_with_expert
        llama = both.lm_expert
        check_expert(policy.config, llama)
        stride, period = both.num_vlm_layers // both.num_expert_layers, both.self_attn_every_n_layers
        self.places = range(0, both.num_vlm_layers, stride)
        """The VLM's layers beside which there is one of the expert."""
        across = [
            "cross" in both.attention_mode and not (period > 0 and place % period == 0)
            for place in self.places
        ]
        blocks = [joined(layer, *way) for layer, *way in zip(llama.layers, across, strict=True)]
        super().__init__(model, llama, blocks, llama.norm.variance_epsilon)
        norms = [n for layer in llama.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.modulations = [Modulation(norm.weight.detach().float()) for norm in (*norms, llama.norm)]

    def __call__(self, field: HostField) -> "SmolField":
        """Return the prepared field of the one which the host has encoded."""
        layers = field.context["past_key_values"].layers
        beside = [layers[place] for place in self.places]
        seen = [self.see(block, each) for block, each in zip(self.blocks, beside, strict=True)]
        return SmolField(
            expert=self,
            keys=tuple(keys for keys, _ in seen),
            values=tuple(values for _, values in seen),
            present=field.context["prefix_pad_masks"],
            shown=tuple(layer.values for layer in depths(layers)),
            clock=field.clock,
            bounds=field.bounds,
        )

    @torch.no_grad()
    def see(self, block: Block, layer: Any) -> tuple[Float[Tensor, "B h L d"], Float[Tensor, "B h L d"]]:
        """Return the keys and values which a block sees of a VLM's layer; scores are computed in float32."""
        keys, values = layer.keys, layer.values
        if block.across:
            attention = block.layer.self_attn
            keys, values = (
                linear(x.transpose(1, 2).flatten(2).to(linear.weight.dtype))
                .unflatten(-1, (-1, attention.head_dim))
                .transpose(1, 2)
                for linear, x in ((attention.k_proj, keys), (attention.v_proj, values))
            )
        return keys.float(), values.to(self.dtype)

    @torch.no_grad()
    def evaluate(self, u: Float[Tensor, "B"]) -> Moment:
        """Return what the expert knows of host times."""
        return Moment(self.embed_time(u), self.modulations)

    def rotation(self, places: Int[Tensor, "B S"], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary embedding's cosine and sine of places, each (B, S, d), for keys like these."""
        half = like.shape[-1] // 2
        wavelengths = WAVELENGTH ** (torch.arange(half, device=places.device) / half)
        radians = (places[..., None] / wavelengths).repeat(1, 1, 2)
        return radians.cos(), radians.sin()


@dataclass(frozen=True, kw_only=True)
class SmolField(ExpertField):
    """The velocity of a SmolVLA whose prefix is encoded.

    Attributes:
        shown: the VLM's values at some depths, for :attr:`features`.
    """

    shown: tuple[Float[Tensor, "B h L d"], ...]

    def attend(self, block: Block, y: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "R S W"]:
        """Return the attention of the chunk's tokens y (R, S, W): across, to the prefix alone."""
        if not block.across:
            return super().attend(block, y, keys, values)
        _, h, _, d = keys.shape
        q = turned(F.linear(y, block.qkv).unflatten(-1, (-1, d)), *self.turns_across)
        scores = self.fold(grouped(q, h)) @ keys.mT + self.mask_across
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return project(block, self.unfold(weights @ values), y.shape[1])

    @property
    def order(self) -> Bool[Tensor, "S S"]:
        """No action is seen by an earlier one."""
        return torch.ones(self.size, self.size, dtype=torch.bool, device=self.present.device).tril()

    @cached_property
    def mask_across(self) -> Float[Tensor, "B 1 1 L"]:
        """What is added to the logits of those that look at the prefix alone."""
        present = self.present[:, None, None]
        return torch.zeros_like(present, dtype=torch.float32).masked_fill(~present, -torch.inf)

    @cached_property
    def turns_across(self) -> tuple[Tensor, Tensor]:
        """The rotary embedding of those that look at the prefix alone: their places begin at 0."""
        return self._turns(torch.arange(self.size, device=self.present.device)[None])

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """See :class:`qsteer.types.Field`."""
        return prefix_features([self._rows(values) for values in self.shown], self._rows(self.present), None)


def check_expert(config: Any, expert: Any) -> None:
    """Raise TypeError unless a SmolVLA's expert is what is prepared of it."""
    if not config.use_cache:
        raise TypeError(
            "compile: expected a SmolVLA that keeps the prefix's keys and values, got use_cache=False in its "
            "configuration; set it to True, or leave compile out"
        )
    biases = [name for name, _ in expert.named_parameters() if name.endswith("bias")]
    if biases:
        raise TypeError(
            f"compile: expected a SmolVLA whose expert has no biases, got {biases[0]}; leave compile out"
        )

"""lerobot's pi0 and pi0.5, prepared as :mod:`qsteer.adapters.experts` says. Imports no lerobot.

In pi0.5 the time modulates every norm: a quarter of the expert's weights, read by the host's own step for one
number. Its table here holds these too.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qsteer.adapters.experts import Expert, ExpertField, Modulation, Moment, depths, joined, prefix_features
from qsteer.hosts import HostField


class PiExpert(Expert):
    """The action expert of a pi0 or pi0.5.

    Args:
        policy: lerobot's PI0Policy or PI05Policy.
    """

    def __init__(self, policy: Any) -> None:
        gemma = policy.model.paligemma_with_expert.gemma_expert.model
        super().__init__(policy.model, gemma, [joined(layer) for layer in gemma.layers], gemma.norm.eps)

    def __call__(self, field: HostField) -> "PiField":
        """Return the prepared field of the one which the host has encoded."""
        context = field.context
        layers = context["past_key_values"].layers
        return PiField(
            expert=self,
            keys=tuple(layer.keys for layer in layers),
            values=tuple(layer.values for layer in layers),
            present=context["prefix_pad_masks"],
            state=context.get("state"),
            clock=field.clock,
            bounds=field.bounds,
        )

    @torch.no_grad()
    def evaluate(self, u: Float[Tensor, "B"]) -> Moment:
        """Return what the expert knows of host times."""
        config, layers = self.model.config, self.transformer.layers
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        embedding, condition = None, None
        if self.has_state:
            embedding = self.embed_time(u)
        else:
            *_, condition = self.model.embed_suffix(
                u.new_zeros(len(u), config.chunk_size, config.max_action_dim), u
            )
        norms.append(self.transformer.norm)
        return Moment(embedding, [modulation(norm, condition, self.dtype) for norm in norms])

    def rotation(self, places: Int[Tensor, "B S"], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary embedding's cosine and sine of places, each (B, S, d), for keys like these."""
        return self.transformer.rotary_emb(like, places)

    @property
    def has_state(self) -> bool:
        """Whether a token of the state stands before the chunk: pi0; pi0.5 reads the state as text."""
        return hasattr(self.model, "state_proj")


@dataclass(frozen=True, kw_only=True)
class PiField(ExpertField):
    """The velocity of a pi0 or pi0.5 whose prefix is encoded.

    Attributes:
        state: what stands beside the prefix in pi0; None: pi0.5.
    """

    state: Float[Tensor, "B D"] | None

    def embed(self, x: Float[Tensor, "R H A"], moment: Moment) -> Float[Tensor, "R S W"]:
        """Return the tokens which the expert reads: in pi0 the state's comes first."""
        tokens = super().embed(x, moment)
        return tokens if self.state_token is None else torch.cat([self.state_token, tokens], 1)

    @property
    def size(self) -> int:
        """Tokens of the chunk, and of the state before it."""
        return super().size + (self.state is not None)

    @property
    def order(self) -> Bool[Tensor, "S S"] | None:
        """No action is seen by a state before it."""
        if self.state is None:
            return None
        later = torch.ones(self.size, self.size, dtype=torch.bool, device=self.present.device)
        later[0, 1:].fill_(False)
        return later

    @cached_property
    def state_token(self) -> Float[Tensor, "R 1 W"] | None:
        """The embedded state."""
        if self.state is None:
            return None
        project = self.expert.model.state_proj
        return self._rows(project(self.state.to(project.weight.dtype))[:, None])

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """See :class:`qsteer.types.Field`."""
        present, state = self._rows(self.present), None if self.state is None else self._rows(self.state)
        return prefix_features([self._rows(values) for values in depths(self.values)], present, state)


def modulation(norm: Any, condition: Tensor | None, dtype: torch.dtype) -> Modulation:
    """Return what ``norm`` does for a condition (B, W), gates in the expert's dtype."""
    if condition is None or norm.dense is None:
        return Modulation(1.0 + norm.weight.float())
    scale, shift, gate = norm.dense(condition)[:, None].chunk(3, -1)
    return Modulation(1.0 + scale.float(), shift.float(), gate.to(dtype))

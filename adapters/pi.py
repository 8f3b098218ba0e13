"""lerobot's pi0 and pi0.5 with all that does not change between Euler steps prepared. Imports no lerobot.

The host's own step, called ten times for one action, copies the prefix's keys and values, repeats them for
every query head, builds masks and positions, and evaluates the embedding of the time and, in pi0.5, the
modulation of every norm by it: a quarter of the expert's weights, read for one number. :class:`PiField` is
the same function without these. Its attention looks at prefix and chunk apart, so that a backward pass
computes no gradients for the prefix, and candidates share one prefix instead of a copy each. What is left is
a thousand small kernels a step on a GPU, so it has as few as it can: projections of the same tokens are one
product, queries and keys are turned together, and queries of one key lie in one matrix without being copied.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from qsteer.clock import Clock, Time
from qsteer.compiling.kinds import numerics
from qsteer.flow import expand_time
from qsteer.hosts import HostField
from qsteer.sampling import outside_inference_mode
from qsteer.types import Bounds, Field


class Modulation(NamedTuple):
    """What an (adaptive) RMS norm does to what it has normalised, ``y * scale + shift``, and its gate."""

    scale: Tensor
    shift: Tensor | None = None
    gate: Tensor | None = None


class Moment(NamedTuple):
    """All that the expert knows of a time."""

    embedding: Tensor | None
    """The time's part of pi0's action-time layer, (1, 1, W); None: pi0.5."""
    modulations: list[Modulation]
    """Of the two norms of each layer, and of the last norm."""


class Block(NamedTuple):
    """A layer of the expert, and what it needs of its weights side by side."""

    layer: Any
    qkv: Tensor
    """Of queries, keys and values; those of the queries times the attention's scale, a power of two."""
    gate_up: Tensor


class PiExpert:
    """The action expert of a pi0 or pi0.5, and a table of what it knows of the times it has met.

    They hold as long as the policy's weights do not change; then another is made. The projections take their
    memory once more: 0.4 GB of a full pi0.5 in bfloat16.

    Args:
        policy: lerobot's PI0Policy or PI05Policy.
    """

    def __init__(self, policy: Any) -> None:
        self.model = policy.model
        self.gemma = self.model.paligemma_with_expert.gemma_expert.model
        self.dtype = self.gemma.layers[0].self_attn.q_proj.weight.dtype
        self.blocks = [joined(layer) for layer in self.gemma.layers]
        self._moments: dict[Hashable, Moment] = {}

    def __call__(self, field: HostField) -> "PiField":
        """Return the prepared field of the one which the host has encoded."""
        context = field.context
        layers = context["past_key_values"].layers
        keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
        return PiField(
            self,
            keys,
            values,
            context["prefix_pad_masks"],
            context.get("state"),
            field.clock,
            bounds=field.bounds,
        )

    def moment(self, u: Time, x: Float[Tensor, "R H A"]) -> Moment:
        """Return what the expert knows of host time u; one that all rows of x share is looked up."""
        if isinstance(u, Tensor):
            return self._evaluate(u)
        key = u, numerics(x.device)
        if key not in self._moments:
            self._moments[key] = self._evaluate(expand_time(u, x[:1], torch.float32))
        return self._moments[key]

    @torch.no_grad()
    def _evaluate(self, u: Float[Tensor, "B"]) -> Moment:
        config, layers = self.model.config, self.gemma.layers
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        embedding, condition = None, None
        if self.has_state:
            from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

            layer, width = self.model.action_time_mlp_in, self.model.action_in_proj.out_features
            periods = config.min_period, config.max_period
            time = create_sinusoidal_pos_embedding(u, width, *periods, device=u.device).to(u.dtype)
            embedding = F.linear(time, layer.weight[:, width:], layer.bias)[:, None]
        else:
            *_, condition = self.model.embed_suffix(
                u.new_zeros(len(u), config.chunk_size, config.max_action_dim), u
            )
        return Moment(
            embedding, [modulation(norm, condition, self.dtype) for norm in (*norms, self.gemma.norm)]
        )

    @property
    def has_state(self) -> bool:
        """Whether a token of the state stands before the chunk: pi0; pi0.5 reads the state as text."""
        return hasattr(self.model, "state_proj")

    def embed(self, x: Float[Tensor, "R H A"], moment: Moment) -> Float[Tensor, "R H W"]:
        """Return the tokens of the noisy chunk."""
        actions = self.model.action_in_proj(x)
        if moment.embedding is None:
            return actions
        weight = self.model.action_time_mlp_in.weight[:, : actions.shape[-1]]
        return self.model.action_time_mlp_out(F.silu(F.linear(actions, weight) + moment.embedding))


@dataclass(frozen=True)
class PiField(Field):
    """The velocity of a pi0 or pi0.5 whose prefix is encoded.

    Up to the order of sums it is the host's own step, gradient included.

    Attributes:
        expert: evaluates the chunk.
        keys, values: of the prefix, for each layer.
        present: which tokens of the prefix are there.
        state: what stands beside the prefix in pi0; None: pi0.5.
        clock: the host's.
        each: rows per observation; B observations have R = B each rows.
        through: the last layers which the gradient runs through; None: all.
        bounds: the host's.
    """

    expert: PiExpert
    keys: tuple[Float[Tensor, "B h L d"], ...]
    values: tuple[Float[Tensor, "B h L d"], ...]
    present: Bool[Tensor, "B L"]
    state: Float[Tensor, "B D"] | None
    clock: Clock
    each: int = 1
    through: int | None = None
    bounds: Bounds = (-1.0, 1.0)

    def repeat(self, k: int) -> "PiField":
        """Return the field for ``k`` rows per observation, which share its prefix."""
        return replace(self, each=self.each * k)

    def truncated(self, layers: int) -> "PiField":
        """Return the same velocity with a gradient through its last layers, see :class:`qsteer.Tweedie`.

        Raises:
            ValueError: there are fewer layers.
        """
        if not 1 <= layers <= len(self.keys):
            raise ValueError(f"layers: expected 1 to {len(self.keys)}, which the expert has, got {layers}")
        return replace(self, through=layers)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """What the expert computes in."""
        return self.expert.dtype

    def __call__(self, x: Float[Tensor, "R H A"], t: Time) -> Float[Tensor, "R H A"]:
        """Run the expert on the chunk."""
        expert = self.expert
        moment = expert.moment(self.clock.to_host(t), x)
        h = expert.embed(x, moment)
        if self.state_token is not None:
            h = torch.cat([self.state_token, h], 1)
        h, modulations = h.to(expert.dtype), iter(moment.modulations)
        cut = 0 if self.through is None else len(self.keys) - self.through
        for i, (block, keys, values) in enumerate(zip(expert.blocks, self.keys, self.values, strict=True)):
            m, read = next(modulations), h.detach() if i < cut else h
            y = normed(block.layer.input_layernorm, read, m)
            h = added(h, self.attend(block, y, keys, values), m)
            m, read = next(modulations), h.detach() if i < cut else h
            h = added(h, feed(block, normed(block.layer.post_attention_layernorm, read, m)), m)
        h = normed(expert.gemma.norm, h[:, -x.shape[1] :], next(modulations))
        return self.clock.velocity(expert.model.action_out_proj(h.float()))

    def attend(self, block: Block, y: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "R S W"]:
        """Return the attention of the chunk's tokens y (R, S, W) to the prefix and to one another."""
        (_, h, length, d), heads = keys.shape, len(block.qkv) // keys.shape[3]
        qk, v = F.linear(y, block.qkv).unflatten(-1, (heads, d)).split((heads - h, h), 2)
        q, k = turned(qk, *self.turns).split((heads - 2 * h, h), 2)
        q, k, v = q.unflatten(2, (h, -1)).transpose(1, 2).flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.cat([self.unfold(self.fold(q) @ keys.mT), q @ k.mT], -1) + self.mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        before, among = weights.split((length, y.shape[1]), -1)
        out = self.unfold(self.fold(before) @ values) + among @ v
        return block.layer.self_attn.o_proj(out.unflatten(2, (y.shape[1], -1)).transpose(1, 2).flatten(2))

    def fold(self, q: Float[Tensor, "R h n c"]) -> Float[Tensor, "B h en c"]:
        """Put the rows of an observation, which share its prefix, into one matrix: for h = 1 no copy."""
        return q.unflatten(0, (-1, self.each)).transpose(1, 2).flatten(2, 3)

    def unfold(self, a: Float[Tensor, "B h en c"]) -> Float[Tensor, "R h n c"]:
        """Undo :meth:`fold`."""
        return a.unflatten(2, (self.each, -1)).transpose(1, 2).flatten(0, 1)

    @cached_property
    def mask(self) -> Float[Tensor, "R 1 n LS"]:
        """What is added to the logits: no token that is absent is seen; no action is, by a state before it.

        Its n = S g rows are those of the queries, g of them at each of S tokens; one row will do without a
        state.
        """
        present, size = self._rows(self.present)[:, None, None], self._size
        seen = F.pad(present, (0, size), value=True)
        if self.state is not None:
            attention = self.expert.gemma.layers[0].self_attn
            later = torch.ones(size, size, dtype=torch.bool, device=seen.device)
            later[0, 1:].fill_(False)
            groups = attention.q_proj.out_features // attention.k_proj.out_features
            later = F.pad(later, (present.shape[-1], 0), value=True)
            seen = seen & later.repeat_interleave(groups, 0)
        return torch.zeros_like(seen, dtype=self.expert.dtype).masked_fill(~seen, -torch.inf)

    @property
    def _size(self) -> int:
        """Tokens S of the chunk, and of the state before it."""
        return self.expert.model.config.chunk_size + (self.state is not None)

    @cached_property
    def turns(self) -> tuple[Tensor, Tensor]:
        """The rotary embedding's cosine and signed sine, (R, S, 1, d): the chunk comes after the prefix."""
        places = self.present.sum(-1, keepdim=True) + torch.arange(self._size, device=self.present.device)
        cos, sin = self.expert.gemma.rotary_emb(self.keys[0], places)
        first, second = sin.chunk(2, -1)
        return self._rows(cos[:, :, None]), self._rows(torch.cat([-first, second], -1)[:, :, None])

    @cached_property
    def state_token(self) -> Float[Tensor, "R 1 W"] | None:
        """The embedded state."""
        if self.state is None:
            return None
        project = self.expert.model.state_proj
        return self._rows(project(self.state.to(project.weight.dtype))[:, None])

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.each == 1 else x.repeat_interleave(self.each, 0)

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """See :class:`qsteer.types.Field`."""
        present, state = self._rows(self.present), None if self.state is None else self._rows(self.state)
        return prefix_features([self._rows(values) for values in self.values], present, state)


def prefix_features(
    values: Sequence[Float[Tensor, "B h L d"]], present: Bool[Tensor, "B L"], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the prefix as the denoiser sees it: values at a third, two thirds and the end of its depth.

    Values, for keys carry their position's rotation. Tokens and the mask of those present. A state which
    stands beside the prefix (pi0) is the last token: ``[state, 1, 0 ..]``, where the one keeps the state's
    scale through the normalisation of tokens.
    """
    depths = (len(values) // 3, 2 * len(values) // 3, len(values) - 1)
    tokens = torch.cat([values[depth].transpose(1, 2).flatten(2) for depth in depths], -1)
    if state is not None:
        token = F.pad(state, (0, 1), value=1.0)[:, None]
        token = F.pad(token, (0, tokens.shape[-1] - token.shape[-1]))
        tokens, present = torch.cat([tokens, token], 1), F.pad(present, (0, 1), value=True)
    return tokens, present


def modulation(norm: Any, condition: Tensor | None, dtype: torch.dtype) -> Modulation:
    """Return what ``norm`` does for a condition (B, W), gates in the expert's dtype."""
    if condition is None or norm.dense is None:
        return Modulation(1.0 + norm.weight.float())
    scale, shift, gate = norm.dense(condition)[:, None].chunk(3, -1)
    return Modulation(1.0 + scale.float(), shift.float(), gate.to(dtype))


def normed(norm: Any, h: Tensor, m: Modulation) -> Tensor:
    """Return the (adaptive) RMS norm of ``h``, in float32 as the host computes it, in h's dtype."""
    y = F.rms_norm(h.float(), (norm.dim,), eps=norm.eps)
    return (y * m.scale if m.shift is None else torch.addcmul(m.shift, y, m.scale)).to(h.dtype)


def added(h: Tensor, branch: Tensor, m: Modulation) -> Tensor:
    """Return the residual stream with a branch added through its gate."""
    return h + branch if m.gate is None else torch.addcmul(h, branch, m.gate)


def turned(x: Float[Tensor, "R S h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "R S h d"]:
    """Return queries and keys with the rotary embedding of their places."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@outside_inference_mode()
def joined(layer: Any) -> Block:
    """Put a layer's projections of the same tokens side by side."""
    attention, mlp = layer.self_attn, layer.mlp
    q = attention.q_proj.weight * attention.scaling
    qkv = torch.cat([q, attention.k_proj.weight, attention.v_proj.weight])
    return Block(layer, qkv, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def feed(block: Block, y: Float[Tensor, "R S W"]) -> Float[Tensor, "R S W"]:
    """Return the feed-forward part of a layer."""
    gate, up = F.linear(y, block.gate_up).chunk(2, -1)
    return block.layer.mlp.down_proj(block.layer.mlp.act_fn(gate) * up)

"""Action experts with all that does not change between Euler steps prepared. Imports no lerobot.

The host's own step, called ten times for one action, copies the prefix's keys and values, repeats them for
every query head, builds masks and positions, and evaluates the embedding of the time. :class:`ExpertField` is
the same function without these. Its attention looks at prefix and chunk apart, so that a backward pass
computes no gradients for the prefix, and candidates share one prefix instead of a copy each. What is left is
a thousand small kernels a step on a GPU, so it has as few as it can: projections of the same tokens are one
product, queries and keys are turned together, and queries of one key lie in one matrix without being copied.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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
    """The time's part of the action-time layer, (1, 1, W); None: there is no such layer, as in pi0.5."""
    modulations: list[Modulation]
    """Of the two norms of each layer, and of the last norm."""


class Block(NamedTuple):
    """A layer of the expert, and what it needs of its weights side by side."""

    layer: Any
    qkv: Tensor
    """Of queries, keys and values; those of the queries times the attention's scale."""
    gate_up: Tensor
    across: bool = False
    """Whether the chunk's tokens look at the prefix alone; then ``qkv`` is of queries only."""


class Expert(ABC):
    """An action expert, and a table of what it knows of the times it has met.

    They hold as long as the policy's weights do not change; then another is made. The projections take their
    memory once more: 0.4 GB of a full pi0.5 in bfloat16.

    Args:
        model: of a policy of the pi family.
        transformer: its expert.
        blocks: the expert's layers.
        eps: of its norms.
    """

    def __init__(self, model: Any, transformer: Any, blocks: Sequence[Block], eps: float) -> None:
        self.model, self.transformer, self.blocks, self.eps = model, transformer, blocks, eps
        self.dtype = blocks[0].qkv.dtype
        self._moments: dict[Hashable, Moment] = {}

    @abstractmethod
    def __call__(self, field: HostField) -> "ExpertField":
        """Return the prepared field of the one which the host has encoded."""

    @abstractmethod
    def evaluate(self, u: Float[Tensor, "B"]) -> Moment:
        """Return what the expert knows of host times."""

    @abstractmethod
    def rotation(self, places: Int[Tensor, "B S"], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary embedding's cosine and sine of places, each (B, S, d), for keys like these."""

    def moment(self, u: Time, x: Float[Tensor, "R H A"]) -> Moment:
        """Return what the expert knows of host time u; one that all rows of x share is looked up."""
        if isinstance(u, Tensor):
            return self.evaluate(u)
        key = u, numerics(x.device)
        if key not in self._moments:
            self._moments[key] = self.evaluate(expand_time(u, x[:1], torch.float32))
        return self._moments[key]

    def embed_time(self, u: Float[Tensor, "B"]) -> Float[Tensor, "B 1 W"]:
        """Return the time's part of the action-time layer."""
        from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

        layer, width = self.model.action_time_mlp_in, self.model.action_in_proj.out_features
        periods = self.model.config.min_period, self.model.config.max_period
        time = create_sinusoidal_pos_embedding(u, width, *periods, device=u.device).to(u.dtype)
        return F.linear(time, layer.weight[:, width:], layer.bias)[:, None]

    def embed(self, x: Float[Tensor, "R H A"], moment: Moment) -> Float[Tensor, "R H W"]:
        """Return the tokens of the noisy chunk."""
        actions = self.model.action_in_proj(x)
        if moment.embedding is None:
            return actions
        weight = self.model.action_time_mlp_in.weight[:, : actions.shape[-1]]
        return self.model.action_time_mlp_out(F.silu(F.linear(actions, weight) + moment.embedding))


@dataclass(frozen=True, kw_only=True)
class ExpertField(Field):
    """The velocity of a policy with an action expert whose prefix is encoded.

    Up to the order of sums it is the host's own step, gradient included.

    Attributes:
        expert: evaluates the chunk.
        keys, values: of the prefix, for each layer.
        present: which tokens of the prefix are there.
        clock: the host's.
        each: rows per observation; B observations have R = B each rows.
        through: the last layers which the gradient runs through; None: all.
        bounds: the host's.
    """

    expert: Expert
    keys: tuple[Float[Tensor, "B h L d"], ...]
    values: tuple[Float[Tensor, "B h L d"], ...]
    present: Bool[Tensor, "B L"]
    clock: Clock
    each: int = 1
    through: int | None = None
    bounds: Bounds = (-1.0, 1.0)

    def repeat(self, k: int) -> "ExpertField":
        """Return the field for ``k`` rows per observation, which share its prefix."""
        return replace(self, each=self.each * k)

    def truncated(self, layers: int) -> "ExpertField":
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
        h, modulations = self.embed(x, moment).to(expert.dtype), iter(moment.modulations)
        cut = 0 if self.through is None else len(self.keys) - self.through
        for i, (block, keys, values) in enumerate(zip(expert.blocks, self.keys, self.values, strict=True)):
            m, read = next(modulations), h.detach() if i < cut else h
            h = added(h, self.attend(block, normed(read, m, expert.eps), keys, values), m)
            m, read = next(modulations), h.detach() if i < cut else h
            h = added(h, feed(block, normed(read, m, expert.eps)), m)
        h = normed(h[:, self.size - x.shape[1] :], next(modulations), expert.eps)
        return self.clock.velocity(expert.model.action_out_proj(h.float()))

    def embed(self, x: Float[Tensor, "R H A"], moment: Moment) -> Float[Tensor, "R S W"]:
        """Return the tokens which the expert reads."""
        return self.expert.embed(x, moment)

    def attend(self, block: Block, y: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "R S W"]:
        """Return the attention of the chunk's tokens y (R, S, W) to the prefix and to one another."""
        (_, h, length, d), heads = keys.shape, len(block.qkv) // keys.shape[3]
        qk, v = F.linear(y, block.qkv).unflatten(-1, (heads, d)).split((heads - h, h), 2)
        q, k = turned(qk, *self.turns).split((heads - 2 * h, h), 2)
        q, k, v = grouped(q, h), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.cat([self.unfold(self.fold(q) @ keys.mT), q @ k.mT], -1) + self.mask
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        before, among = weights.split((length, y.shape[1]), -1)
        return project(block, self.unfold(self.fold(before) @ values) + among @ v, y.shape[1])

    def fold(self, q: Float[Tensor, "R h n c"]) -> Float[Tensor, "B h en c"]:
        """Put the rows of an observation, which share its prefix, into one matrix: for h = 1 no copy."""
        return q if self.each == 1 else q.unflatten(0, (-1, self.each)).transpose(1, 2).flatten(2, 3)

    def unfold(self, a: Float[Tensor, "B h en c"]) -> Float[Tensor, "R h n c"]:
        """Undo :meth:`fold`."""
        return a if self.each == 1 else a.unflatten(2, (self.each, -1)).transpose(1, 2).flatten(0, 1)

    @property
    def size(self) -> int:
        """How many tokens S the expert reads."""
        return self.expert.model.config.chunk_size

    @property
    def order(self) -> Bool[Tensor, "S S"] | None:
        """Which of its tokens (columns) each of them (rows) sees; None: all."""
        return None

    @cached_property
    def mask(self) -> Float[Tensor, "R 1 n LS"]:
        """What is added to the logits: no token that is absent is seen, nor one that ``order`` hides.

        Its n = S g rows are those of the queries, g of them at each of S tokens; one row will do where all
        are in sight of each other.
        """
        present = self._rows(self.present)[:, None, None]
        seen = F.pad(present, (0, self.size), value=True)
        if self.order is not None:
            attention = self.expert.blocks[0].layer.self_attn
            groups = attention.q_proj.out_features // attention.k_proj.out_features
            order = F.pad(self.order, (present.shape[-1], 0), value=True)
            seen = seen & order.repeat_interleave(groups, 0)
        return torch.zeros_like(seen, dtype=self.expert.dtype).masked_fill(~seen, -torch.inf)

    @cached_property
    def turns(self) -> tuple[Tensor, Tensor]:
        """The rotary embedding's cosine and signed sine, (R, S, 1, d): the chunk comes after the prefix."""
        places = self.present.sum(-1, keepdim=True) + torch.arange(self.size, device=self.present.device)
        cos, sin = self._turns(places)
        return self._rows(cos), self._rows(sin)

    def _turns(self, places: Int[Tensor, "B S"]) -> tuple[Tensor, Tensor]:
        cos, sin = self.expert.rotation(places, self.keys[0])
        first, second = sin.chunk(2, -1)
        return cos[:, :, None], torch.cat([-first, second], -1)[:, :, None]

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.each == 1 else x.repeat_interleave(self.each, 0)


def depths[T](layers: Sequence[T]) -> tuple[T, T, T]:
    """Return those at a third, two thirds and the end of the depth."""
    return layers[len(layers) // 3], layers[2 * len(layers) // 3], layers[-1]


def prefix_features(
    values: Sequence[Float[Tensor, "B h L d"]], present: Bool[Tensor, "B L"], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the prefix as the denoiser sees it: its values, at some of the :func:`depths`.

    Values, for keys carry their position's rotation. Tokens and the mask of those present. A state which
    stands beside the prefix (pi0) is the last token: ``[state, 1, 0 ..]``, where the one keeps the state's
    scale through the normalisation of tokens.
    """
    tokens = torch.cat([each.transpose(1, 2).flatten(2) for each in values], -1)
    if state is not None:
        token = F.pad(state, (0, 1), value=1.0)[:, None]
        token = F.pad(token, (0, tokens.shape[-1] - token.shape[-1]))
        tokens, present = torch.cat([tokens, token], 1), F.pad(present, (0, 1), value=True)
    return tokens, present


def normed(h: Tensor, m: Modulation, eps: float) -> Tensor:
    """Return the (adaptive) RMS norm of ``h``, in float32 as the host computes it, in h's dtype."""
    if m.shift is None:
        return F.rms_norm(h.float(), h.shape[-1:], m.scale, eps).to(h.dtype)
    return torch.addcmul(m.shift, F.rms_norm(h.float(), h.shape[-1:], eps=eps), m.scale).to(h.dtype)


def added(h: Tensor, branch: Tensor, m: Modulation) -> Tensor:
    """Return the residual stream with a branch added through its gate."""
    return h + branch if m.gate is None else torch.addcmul(h, branch, m.gate)


def turned(x: Float[Tensor, "R S h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "R S h d"]:
    """Return queries and keys with the rotary embedding of their places."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def grouped(q: Float[Tensor, "R S heads d"], h: int) -> Float[Tensor, "R h n d"]:
    """Put the n = S g queries that look at one of h keys into one matrix."""
    return q.unflatten(2, (h, -1)).transpose(1, 2).flatten(2, 3)


def project(block: Block, out: Float[Tensor, "R h n d"], size: int) -> Float[Tensor, "R S W"]:
    """Return a layer's output for what its ``size`` tokens have read."""
    return block.layer.self_attn.o_proj(out.unflatten(2, (size, -1)).transpose(1, 2).flatten(2))


@outside_inference_mode()
def joined(layer: Any, across: bool = False) -> Block:
    """Put a layer's projections of the same tokens side by side; across: it looks at the prefix alone."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj.weight * attention.scaling]
    if not across:
        qkv += [attention.k_proj.weight, attention.v_proj.weight]
    return Block(layer, torch.cat(qkv), torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), across)


def feed(block: Block, y: Float[Tensor, "R S W"]) -> Float[Tensor, "R S W"]:
    """Return the feed-forward part of a layer."""
    gate, up = F.linear(y, block.gate_up).chunk(2, -1)
    return block.layer.mlp.down_proj(block.layer.mlp.act_fn(gate) * up)

"""Networks that turn chunks and times into a chunk; features of the observation are encoded once."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from qsteer.critics.networks import Normalizer


class ChunkNetwork(nn.Module, ABC):
    """A function of some chunks (B, H, A) and times (B,), under features of the observation."""

    last: nn.Linear

    def start_at_zero(self) -> None:
        """Make the untrained network's output zero."""
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @abstractmethod
    def encode(self, features: Any) -> Any:
        """Return what the network needs of the features: tensors with one leading row per observation."""

    @abstractmethod
    def forward(self, z: Any, chunks: Sequence[Tensor], times: Sequence[Tensor]) -> Float[Tensor, "B H A"]:
        """Return a chunk for encoded features ``z``."""


class Fourier(nn.Module):
    """``sin(k pi t), cos(k pi t)`` for k = 1 .. harmonics, of each of several times."""

    frequencies: Tensor

    def __init__(self, harmonics: int) -> None:
        """Fix the frequencies."""
        super().__init__()
        self.register_buffer("frequencies", torch.pi * torch.arange(1.0, harmonics + 1), persistent=False)

    def forward(self, times: Sequence[Float[Tensor, "B"]]) -> Float[Tensor, "B D"]:
        """Return ``2 * harmonics`` features per time, side by side."""
        angles = torch.stack([t.to(self.frequencies.dtype) for t in times], 1)[..., None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


class ChunkMLP(ChunkNetwork):
    """An MLP on ``[features, chunks, Fourier(times)]`` for feature vectors (B, F) (QPILOTS appendix B).

    The first layer is linear in the features, so that their half of it is computed once per observation.
    """

    def __init__(
        self,
        *,
        features: int,
        horizon: int,
        action_dim: int,
        chunks: int,
        times: int,
        hidden: Sequence[int],
        harmonics: int,
    ) -> None:
        """Build the network; ``chunks`` and ``times`` are numbers of arguments."""
        super().__init__()
        size = horizon * action_dim
        self.normalizer, self.fourier = Normalizer(features), Fourier(harmonics)
        self.features = nn.Linear(features, hidden[0])
        self.first = nn.Linear(chunks * size + times * 2 * harmonics, hidden[0], bias=False)
        self.rest = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(hidden))
        self.last = nn.Linear(hidden[-1], size)

    def fit_normalisation(self, features: Float[Tensor, "N F"]) -> None:
        """Take the features' mean and standard deviation into the checkpoint."""
        self.normalizer.fit(features)

    def encode(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """Return the features' half of the first layer."""
        return self.features(self.normalizer(features.to(self.normalizer.mean)))

    def forward(
        self, z: Float[Tensor, "B D"], chunks: Sequence[Tensor], times: Sequence[Tensor]
    ) -> Float[Tensor, "B H A"]:
        """Return a chunk."""
        h = torch.cat([*(c.flatten(1).to(z.dtype) for c in chunks), self.fourier(times).to(z.dtype)], 1)
        h = z + self.first(h)
        for layer in self.rest:
            h = layer(F.silu(h))
        return self.last(F.silu(h)).view_as(chunks[0]).to(chunks[0].dtype)


class ChunkTransformer(ChunkNetwork):
    """A transformer over the steps of a chunk that attends to feature tokens (B, L, F) of the observation.

    Blocks are modulated by the times, with gates that start at zero (adaLN-Zero, Peebles & Xie 2023). Keys
    and values of the feature tokens are computed once per observation.
    """

    def __init__(
        self,
        *,
        features: int,
        horizon: int,
        action_dim: int,
        chunks: int,
        times: int,
        width: int,
        depth: int,
        heads: int,
        harmonics: int,
    ) -> None:
        """Build the network; ``chunks`` and ``times`` are numbers of arguments."""
        super().__init__()
        self.fourier = Fourier(harmonics)
        self.normalise = nn.LayerNorm(features)
        self.chunk = nn.Linear(chunks * action_dim, width)
        self.position = nn.Parameter(torch.randn(horizon, width) / math.sqrt(width))
        self.time = nn.Sequential(nn.Linear(times * 2 * harmonics, width), nn.SiLU(), nn.Linear(width, width))
        self.memories = nn.ModuleList(nn.Linear(features, 2 * width) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last = nn.Linear(width, action_dim)

    def encode(self, features: tuple[Float[Tensor, "B L F"], Bool[Tensor, "B L"]]) -> Any:
        """Return each block's keys and values of the feature tokens, and the tokens' mask."""
        tokens, mask = features
        tokens = self.normalise(tokens.to(self.position))
        return [memory(tokens) for memory in self.memories], mask.bool()

    def forward(self, z: Any, chunks: Sequence[Tensor], times: Sequence[Tensor]) -> Float[Tensor, "B H A"]:
        """Return a chunk."""
        memories, mask = z
        h = self.chunk(torch.cat([c.to(self.position) for c in chunks], -1)) + self.position
        time = self.time(self.fourier(times).to(h.dtype))
        for block, memory in zip(self.blocks, memories, strict=True):
            h = block(h, time, memory, mask)
        return self.last(standard(h)).to(chunks[0].dtype)


class Block(nn.Module):
    """Attention among the chunk's steps, to the observation, and an MLP, each gated by the times."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the block; its gates start at zero."""
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.qkv = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.observed = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        h: Float[Tensor, "B H W"],
        time: Float[Tensor, "B W"],
        memory: Tensor,
        mask: Tensor,
    ) -> Float[Tensor, "B H W"]:
        """Return the steps' next state."""
        parts = self.modulation(F.silu(time))[:, None].chunk(9, -1)
        for i, branch in enumerate((self._mix, self._observe, self._mlp)):
            scale, shift, gate = parts[3 * i : 3 * i + 3]
            h = h + gate * branch(standard(h) * (1 + scale) + shift, memory, mask)
        return h

    def _mix(self, h: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self._split(self.qkv(h), 3)
        return self.mixed(self._join(F.scaled_dot_product_attention(q, k, v)))

    def _observe(self, h: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        (q,), (k, v) = self._split(self.query(h), 1), self._split(memory, 2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.observed(self._join(seen))

    def _mlp(self, h: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.mlp(h)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return rearrange(x, "b l (n h d) -> n b h l d", n=parts, h=self.heads).unbind(0)

    def _join(self, x: Tensor) -> Tensor:
        return rearrange(x, "b h l d -> b l (h d)")


def standard(h: Tensor) -> Tensor:
    """Return the layer norm without weights, written out.

    The gradient of a forward-mode derivative of ``torch.nn.functional.layer_norm`` is wrong (torch 2.11),
    and flow map losses take one.
    """
    variance, mean = torch.var_mean(h, -1, correction=0, keepdim=True)
    return (h - mean) * (variance + 1e-5).rsqrt()

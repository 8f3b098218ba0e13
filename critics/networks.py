"""What the networks are made of: an ensemble in one batched call, and normalisation of inputs."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Normalizer(nn.Module):
    """Standardise features, ``(x - mean) / std``; the statistics are buffers, hence part of the checkpoint.

    A feature's standard deviation counts as at least 0.01: noise in one that hardly varies is not blown up.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        """Start as the identity on ``size`` features."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, data: Float[Tensor, "N F"]) -> None:
        """Take mean and (population) standard deviation from ``data``."""
        std, mean = torch.std_mean(data.double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=0.01))

    def forward(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """Return standardised features."""
        return (x - self.mean) / self.std


class EnsembleLinear(nn.Module):
    """``members`` independent linear layers as one batched product; each is initialised as ``nn.Linear`` is.

    ``weight`` (J, in, out), ``bias`` (J, 1, out), both uniform on ±1/sqrt(in).
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        """Draw the members' weights."""
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "J B I"]) -> Float[Tensor, "J B O"]:
        """Return ``x W + b`` for each member."""
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleMLP(nn.Module):
    """J LayerNorm MLPs ``[context, input] -> number``, evaluated together without a loop over members.

    The first layer is linear in its two arguments, so its context half is computed once per observation
    (:meth:`encode`) and reused for every action and every Euler step (:meth:`forward`). LayerNorm comes after
    the GELU and has no gain or offset of its own: the linear layer that follows would absorb them.
    """

    def __init__(self, members: int, context: int, inputs: int, hidden: Sequence[int]) -> None:
        """Build ``members`` networks of widths ``(context + inputs, *hidden, 1)``."""
        super().__init__()
        self.context = context
        widths = (context + inputs, *hidden, 1)
        self.first = EnsembleLinear(members, widths[0], widths[1])
        self.rest = nn.ModuleList(EnsembleLinear(members, i, o) for i, o in pairwise(widths[1:]))

    def encode(self, context: Float[Tensor, "B C"]) -> Float[Tensor, "J B D"]:
        """Return the context's half of the first layer, bias included."""
        weight, bias = self.first.weight, self.first.bias
        return torch.baddbmm(bias, context.expand(len(weight), -1, -1), weight[:, : self.context])

    def forward(
        self, z: Float[Tensor, "J B D"], x: Float[Tensor, "B I"] | None = None
    ) -> Float[Tensor, "J B"]:
        """Return each member's number for encoded contexts ``z`` and inputs ``x`` (``None``: it has none)."""
        if x is not None:
            z = torch.baddbmm(z, x.expand(len(z), -1, -1), self.first.weight[:, self.context :])
        for layer in self.rest:
            z = layer(F.layer_norm(F.gelu(z), z.shape[-1:]))
        return z.squeeze(-1)

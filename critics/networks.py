"""Parts of the networks: an ensemble in one batched call, and normalisation of inputs."""

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

    def __init__(self, size: int, groups: int = 1) -> None:
        """Start as the identity on ``size`` features.

        Args:
            size: number of features F.
            groups: into how many equal groups the rows fall, each with statistics of its own (G, 1, F).
        """
        super().__init__()
        self.groups = groups
        shape = (size,) if groups == 1 else (groups, 1, size)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def fit(self, data: Float[Tensor, "N F"]) -> None:
        """Take mean and (population) standard deviation from ``data``."""
        std, mean = torch.std_mean(self._grouped(data.double()), dim=-2, correction=0)
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(std.clamp(min=0.01).view_as(self.std))

    def forward(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """Return standardised features."""
        out = (self._grouped(x) - self.mean) / self.std
        return out if self.groups == 1 else out.flatten(0, 1)

    def _grouped(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.unflatten(0, (self.groups, -1))


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

    With groups, ``G J`` networks stand side by side, those of a group one after another, and the rows of a
    batch fall into G equal groups, likewise; the networks of a group see its rows alone. The B rows are then
    ``b = B / G`` rows of each of ``N = G J`` networks; without groups, ``N = J`` and ``b = B``.
    """

    def __init__(
        self, members: int, context: int, inputs: int, hidden: Sequence[int], groups: int = 1
    ) -> None:
        """Build ``groups * members`` networks of widths ``(context + inputs, *hidden, 1)``."""
        super().__init__()
        self.members, self.context, self.groups = members, context, groups
        widths = (context + inputs, *hidden, 1)
        layers = [EnsembleLinear(groups * members, i, o) for i, o in pairwise(widths)]
        self.first, self.rest = layers[0], nn.ModuleList(layers[1:])

    def encode(self, context: Float[Tensor, "B C"]) -> Float[Tensor, "N b D"]:
        """Return the context's half of the first layer, bias included."""
        weight, bias = self.first.weight, self.first.bias
        return torch.baddbmm(bias, self._to_networks(context), weight[:, : self.context])

    def forward(
        self, z: Float[Tensor, "N b D"], x: Float[Tensor, "B I"] | None = None
    ) -> Float[Tensor, "J B"]:
        """Return each member's number for encoded contexts ``z`` and inputs ``x`` (``None``: it has none)."""
        if x is not None:
            z = torch.baddbmm(z, self._to_networks(x), self.first.weight[:, self.context :])
        for layer in self.rest:
            z = layer(F.layer_norm(F.gelu(z), z.shape[-1:]))
        q = z.squeeze(-1)
        return q if self.groups == 1 else q.unflatten(0, (self.groups, -1)).movedim(0, 1).flatten(1)

    def _to_networks(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "N b I"]:
        """Give each network the rows of its group."""
        if self.groups == 1:
            return x.expand(self.members, -1, -1)
        return x.unflatten(0, (self.groups, -1)).repeat_interleave(self.members, dim=0)

"""What a critic sees besides the state: camera views, and what the frozen policy made of its observation."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from qsteer.critics.networks import Normalizer

FEATURES = "policy.features"
"""Where an observation holds the frozen policy's pooled features (B, F)."""


class ViewEncoder(nn.Module):
    """DrQ's encoder of one camera view: 3x3 convolutions with ReLU, then :class:`Trunk`; orthogonal weights.

    Image augmentation for deep RL from pixels: DrQ (Kostrikov et al. 2021), with the trunk of DrQ-v2.
    """

    def __init__(self, size: int, channels: int, strides: Sequence[int], latent: int) -> None:
        """Build the encoder of square views of ``size`` pixels; one layer per stride."""
        super().__init__()
        gain = nn.init.calculate_gain("relu")
        self.layers = nn.ModuleList(
            initialise_orthogonal(nn.Conv2d(channels if i else 3, channels, 3, stride), gain)
            for i, stride in enumerate(strides)
        )
        self.trunk = Trunk(channels * find_encoded_size(size, strides) ** 2, latent)

    def forward(self, view: Float[Tensor, "B 3 s s"]) -> Float[Tensor, "B L"]:
        """Return the latent of views with values in [0, 1]."""
        view = view - 0.5
        for layer in self.layers:
            view = layer(view).relu()
        return self.trunk(view.flatten(1))


class FeatureEncoder(nn.Module):
    """Normalise the policy's features, then :class:`Trunk`: they weigh as one view, however many."""

    def __init__(self, features: int, latent: int) -> None:
        """Build the encoder of vectors of ``features`` entries."""
        super().__init__()
        self.normalizer, self.trunk = Normalizer(features), Trunk(features, latent)

    def forward(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B L"]:
        """Return the latent of pooled features."""
        return self.trunk(self.normalizer(features))


class Trunk(nn.Sequential):
    """Linear layer, LayerNorm, tanh (DrQ-v2): from ``inputs`` numbers to ``latent`` ones in [-1, 1]."""

    def __init__(self, inputs: int, latent: int) -> None:
        """Build the layer."""
        super().__init__(initialise_orthogonal(nn.Linear(inputs, latent)), nn.LayerNorm(latent), nn.Tanh())


def initialise_orthogonal(layer: nn.Module, gain: float | int = 1) -> nn.Module:
    """Draw orthogonal weights for a layer, set its bias to zero, and return it."""
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, gain)
        else:
            nn.init.zeros_(parameter)
    return layer


def find_encoded_size(size: int, strides: Sequence[int]) -> int:
    """Return the edge that 3x3 convolutions without padding leave of ``size`` pixels; below 1: none."""
    for stride in strides:
        size = (size - 3) // stride + 1
    return size


def to_unit_view(image: Shaped[Tensor, "B 3 h w"], size: int, like: Tensor) -> Float[Tensor, "B 3 s s"]:
    """Return images as views of ``size`` x ``size`` pixels with values in [0, 1], on the device of ``like``.

    Args:
        image: uint8, or floating point in [0, 1]. If its size differs, each pixel becomes the mean of the
            area that it covers; images that are not square are squeezed.
        size: edge of the view.
        like: gives device and dtype.
    """
    view = image.to(like)
    view = view / 255 if image.dtype == torch.uint8 else view
    return view if view.shape[-2:] == (size, size) else F.interpolate(view, (size, size), mode="area")


def shift_randomly(
    view: Float[Tensor, "B C s s"], pixels: int, generator: torch.Generator
) -> Float[Tensor, "B C s s"]:
    """Shift each row by up to ``pixels`` in both directions, its border repeated (DrQ's augmentation).

    The same as padding by replication and cropping at random. The generator may live on any device.

    Cost: one gather.
    """
    rows, _, size, _ = view.shape
    shift = torch.randint(-pixels, pixels + 1, (2, rows, 1), generator=generator, device=generator.device)
    y, x = (torch.arange(size, device=view.device) + shift.to(view.device)).clamp(0, size - 1)
    row = torch.arange(rows, device=view.device)[:, None, None]
    return view.movedim(1, -1)[row, y[:, :, None], x[:, None, :]].movedim(-1, 1)


def pooled(features: Any) -> Float[Tensor, "B F"]:
    """Return one vector per observation of what a field offers as ``features``; see :data:`FEATURES`.

    Args:
        features: (B, F), returned as it is, or tokens (B, L, F) and their mask (B, L): the mean of the tokens
            present, at least in single precision.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(features, Tensor) and features.ndim == 2:
        return features
    if isinstance(features, tuple | list) and len(features) == 2:
        tokens, mask = features
        if isinstance(tokens, Tensor) and tokens.ndim == 3 and mask.shape == tokens.shape[:2]:
            present = mask.bool()[..., None]
            total = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).where(present, 0).sum(1)
            return total / present.sum(1).clamp(min=1)
    raise ValueError(
        f"policy's features: expected a tensor (B, F), or tokens (B, L, F) and their mask (B, L), got "
        f"{_describe_shapes(features)}; set Host.features (PlainPolicy offers its obs), or use a critic with "
        "CriticConfig(features=0)"
    )


def _describe_shapes(tree: Any) -> str:
    if isinstance(tree, Tensor):
        return str(tuple(tree.shape))
    if isinstance(tree, tuple | list):
        return f"[{', '.join(map(_describe_shapes, tree))}]"
    return type(tree).__name__

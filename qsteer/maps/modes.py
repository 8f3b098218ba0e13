"""How many kinds of actions a policy has in mind along its chain, and whether their mean is one of them."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsteer.flow import denoise
from qsteer.maps.flow_maps import EulerMap
from qsteer.maps.glass import GlassPosterior
from qsteer.types import Field

WINDOW = 0.25
"""Half width, in standard deviations, of where samples near the denoised action are counted."""
GAUSSIAN = math.erf(WINDOW / math.sqrt(2))
"""The share of samples there if they are normal."""
SCARCE = 1 / 3
"""The denoised action lies off the samples if it has fewer than this part of that share."""
CHAIN_STEPS = 20


class Modes(NamedTuple):
    """The endpoint posteriors ``p(x1 | x_t)`` of one time.

    Attributes:
        time: t.
        spread: standard deviation of an entry: root mean square over entries and states.
        off: share of states whose denoised action lies where samples are scarce.
    """

    time: float
    spread: float
    off: float


@torch.no_grad()
def measure_modes(
    field: Field,
    noise: Float[Tensor, "B H A"],
    *,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    samples: int = 64,
    steps: int = 16,
    generator: torch.Generator | None = None,
) -> list[Modes]:
    """Measure along the chain where a rule that asks the critic at the denoised action may be misled.

    At each time posterior samples are drawn by GLASS. Along the direction in which those of a state differ
    most, they are counted within a quarter of a standard deviation of the denoised action: a Gaussian has
    20 % there, two separate kinds of actions hardly any. See :func:`scarce`.

    Args:
        field: the policy's velocity for B states.
        noise: where their chains begin.
        times: increasing, in [0, 1).
        samples: of each state and time.
        steps: of GLASS.
        generator: of the samples' noise; None: torch's own.

    Raises:
        ValueError: times do not increase within [0, 1), or there are fewer than 32 samples.

    Cost: ``samples * steps`` velocities for each state and time, and 20 of the chain.
    """
    bounds = (0.0, *times, 1.0)
    if list(bounds) != sorted(bounds) or not times or times[-1] >= 1:
        raise ValueError(f"times: expected some that increase in [0, 1), got {tuple(times)}")
    if samples < 32:
        raise ValueError(f"samples: expected at least 32, which tell a gap from chance, got {samples}")
    posterior, chain = GlassPosterior(steps=steps).on(field), EulerMap(field, CHAIN_STEPS)
    x, rows = noise, []
    for before, t in pairwise((0.0, *times)):
        x = chain(x, before, t)
        eps = torch.randn(samples, *x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x1 = posterior(eps, x, t)
        off = scarce(x1, denoise(x, field(x, t), t))
        spread = x1.var(0).mean().sqrt()
        rows.append(Modes(t, float(spread), float(off.float().mean())))
    return rows


def scarce(x1: Float[Tensor, "N B H A"], mean: Float[Tensor, "B H A"]) -> Bool[Tensor, "B"]:
    """Return whether few of a state's samples lie near ``mean``, along the direction of greatest spread."""
    centred = (x1 - x1.mean(0)).flatten(2).movedim(1, 0)  # (B, N, H A)
    widest = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]
    along = torch.einsum("bnd,bd->bn", centred, widest)
    there = torch.einsum("bd,bd->b", (mean - x1.mean(0)).flatten(1), widest)
    near = (along - there[:, None]).abs() < WINDOW * along.std(1, keepdim=True)
    return near.float().mean(1) < SCARCE * GAUSSIAN

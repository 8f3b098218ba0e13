"""QGF: the value's gradient at the denoised action, without the policy's Jacobian."""

from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import Time
from qsteer.rules.guidance import Ascent, Guidance, at_denoised
from qsteer.rules.strength import Scaling, Strength
from qsteer.types import Field, Value


@dataclass(frozen=True)
class QGF(Guidance):
    """Q-guided flow: the critic's gradient at the denoised action, the Jacobian replaced by the identity.

    Guides every step, t = 0 too. ``QGF()`` is the paper's raw scaling with a constant weight (its grid: 0.004
    to 0.12); ``QGF(weight=0.2, scaling="match_norm")`` measures its strength as Tweedie does.

    Cost: 1 velocity forward, 1 critic forward and backward; never a velocity backward.

    Args:
        weight: factor of the gradient (``raw``), or relative norm (``match_norm``).
    """

    weight: Strength = 0.02
    _: KW_ONLY
    scaling: Scaling = "raw"

    @property
    def strength(self) -> Strength:
        """``weight``."""
        return self.weight

    @property
    def at_noise(self) -> bool:
        """QGF guides t = 0 too."""
        return True

    def ascent(self, field: Field, value: Value, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Differentiate the value at the denoised action."""
        with torch.no_grad():
            v = field(x, t)
        q, a, g = at_denoised(value, x, v, t, self.bounds(field))
        return Ascent(v, g, q, a)

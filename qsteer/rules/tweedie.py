"""QPILOTS-U: the value's gradient at the denoised action, taken back through the policy."""

import math
import os
import warnings
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import Chain, Time
from qsteer.flow import ask, clip_through, denoise, expand_time, nonzero, norm, repeat_time, times
from qsteer.rules.guidance import Ascent, Estimate, Guidance, at_denoised, gradient
from qsteer.rules.strength import Strength
from qsteer.types import Field, Value


@dataclass(frozen=True)
class Tweedie(Guidance):
    """QPILOTS-U: the gradient of ``Q(D(x, t))`` with respect to x, through the policy (eq. 14, 15, 17).

    The full Jacobian ``J = dD/dx`` keeps the push on the manifold of the policy's actions. t = 0 is left
    alone.

    Cost: 1 velocity forward, 1 velocity backward, 1 critic forward and backward.

    Args:
        alpha: norm of the guidance relative to the velocity's (``match_norm``), useful range 0.1 to 0.5; or
            ``"auto"``: see :class:`Auto`.
        layers: go back through the denoiser's last ``layers`` layers only, and past the others along its
            residual stream, ``h <- e + detach(h - e)`` with the embedded chunk e: another method, whose
            velocity backward costs about that share. None: through all.

    Raises:
        ValueError: an argument is out of its range, or (when called) the field cannot be cut there.
    """

    alpha: Strength = 0.2
    _: KW_ONLY
    layers: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.layers is not None and (not isinstance(self.layers, int) or self.layers < 1):
            raise ValueError(
                f"Tweedie: expected at least 1 layer to go back through, got {self.layers!r}; None goes "
                "through all, and QGF through none"
            )

    @property
    def strength(self) -> Strength:
        """``alpha``."""
        return self.alpha

    def ascent(self, field: Field, value: Value, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Differentiate the value of the denoised action with respect to the noisy one."""
        x = x.requires_grad_()
        v = (field if self.layers is None else field.truncated(self.layers))(x, t)
        warn_if_constant(v)
        a = clip_through(denoise(x, v, t), self.bounds(field))
        q = ask(value, a)
        in_action = gradient(q, a)
        return Ascent(v, torch.autograd.grad(a, x, in_action)[0], q, a, in_action)


@dataclass(frozen=True)
class ForwardTweedie(Guidance):
    """Tweedie without a backward pass through the policy: a finite difference in place of the transpose.

    Where the velocity is that of a distribution of actions, ``J = dD/dx = t Cov[x1 | x_t] / (1 - t)^2`` is
    symmetric, so that Tweedie's ``J^T g``, with g the value's gradient at D, is ``J g``:

        ``J g = g + (1 - t) (v(x + h g, t) - v(x, t)) / h + O(h)``.

    A learnt velocity is the velocity of a distribution up to its errors only: this is another method.
    :func:`qsteer.evaluation.gradients.agreement` says how far the two are apart on a given policy.

    h is chosen for each row: ``h g`` has a root mean square of ``eps`` over the entries where g is not 0.
    Entries of x are of order 1, so the difference is wrong by about eps / 2 for its length and by 2 u / eps
    for the velocity's rounding, of relative precision u; their sum is least at ``eps = 2 sqrt(u)``.

    ``stale`` takes the direction g of the chain's previous guided step, so that both velocities are rows of
    one batch; its first guided step waits for g. It is a third method, and cheaper only where a second row is
    cheaper than a second pass.

    Cost: 2 velocity forwards, one after the other, 1 critic forward and backward; never a velocity backward.
    With ``stale`` 1 velocity forward on 2 rows (the chain's first guided step: 2 on 1 row); the base velocity
    is then computed in a larger batch, which may round differently.

    Args:
        alpha: norm of the guidance relative to the velocity's (``match_norm``), or ``"auto"``.
        eps: size of the perturbation; None: ``2 sqrt(u)``, u the machine epsilon of what the field computes
            in (``field.dtype``, or that of x if it is the coarser one): 7e-4 in float32, 0.18 in bfloat16.
        stale: take the previous guided step's direction.

    Raises:
        ValueError: an argument is out of its range.
    """

    alpha: Strength = 0.2
    _: KW_ONLY
    eps: float | None = None
    stale: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.eps is not None and not 0.0 < self.eps < float("inf"):
            raise ValueError(f"eps: expected a finite positive number, got {self.eps}; None chooses by dtype")

    @property
    def strength(self) -> Strength:
        """``alpha``."""
        return self.alpha

    def ascent(self, field: Field, value: Value, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Perturb the noisy action along the value's gradient, and see where the denoised action goes."""
        with torch.no_grad():
            v = field(x, t)
        q, a, g = at_denoised(value, x, v, t, self.bounds(field))
        with torch.no_grad():
            h = self.reach(field, g)
            there = field(x + times(h, g), t)
            return Ascent(v, g + times(expand_time(1 - t, x) / h, there - v), q, a, g)

    def begin(self, field: Field, value: Value, chain: Chain) -> Estimate:
        """Return :meth:`ascent`; with ``stale``, one that keeps the chain's last gradient as direction."""
        if not self.stale:
            return super().begin(field, value, chain)
        last: Tensor | None = None

        def estimate(x: Tensor, t: Time) -> Ascent:
            nonlocal last
            if last is None or last.shape != x.shape:
                found = self.ascent(field, value, x, t)
                last = found.action_gradient
            else:
                found, last = self.stale_ascent(field, value, x, t, last)
            return found

        return estimate

    def stale_ascent(
        self,
        field: Field,
        value: Value,
        x: Float[Tensor, "B H A"],
        t: Time,
        along: Float[Tensor, "B H A"],
    ) -> tuple[Ascent, Float[Tensor, "B H A"]]:
        """Perturb along a direction that is known already; return the value's gradient for the next step."""
        with torch.no_grad():
            h = self.reach(field, along)
            both = torch.stack([x, x + times(h, along)], 1).flatten(0, 1)
            v, there = field.repeat(2)(both, repeat_time(t, 2)).unflatten(0, (-1, 2)).unbind(1)
        q, a, g = at_denoised(value, x, v, t, self.bounds(field))
        return Ascent(v, along + times(expand_time(1 - t, x) / h, there - v), q, a, along), g

    def reach(self, field: Field, g: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return h, the step along g."""
        coarse = max(torch.finfo(dtype).eps for dtype in (g.dtype, field.dtype or g.dtype))
        eps = 2 * math.sqrt(coarse) if self.eps is None else self.eps
        return eps * g.flatten(1).count_nonzero(1).clamp(min=1).sqrt() / nonzero(norm(g))


def warn_if_constant(v: Float[Tensor, "B H A"]) -> None:
    """Warn of a velocity that has lost its gradient."""
    if not v.requires_grad:
        warnings.warn(
            "Tweedie: expected a velocity that is differentiable in x, got one without a gradient: its "
            "Jacobian is lost, and the rule is a QGF; compute the velocity without no_grad() or detach()",
            RuntimeWarning,
            skip_file_prefixes=(os.path.dirname(os.path.dirname(__file__)),),
        )

"""How far a rule pushes: scalings of the direction, and a strength that the critic chooses itself."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from qsteer.checks import unwrap_numbers
from qsteer.clock import Time
from qsteer.flow import ask_members, clamp_time, clip_actions, nonzero, spread
from qsteer.types import Bounds, Value

Scaling = Literal["match_norm", "raw", "clip_norm", "sigma"]


def scale(
    scaling: Scaling, strength: float, v_norm: Float[Tensor, "B"], g_norm: Float[Tensor, "B"], t: Time
) -> Float[Tensor, "B"]:
    """Return the factor of the direction of ascent for each row.

    Args:
        scaling: see :class:`~qsteer.rules.Guidance`.
        strength: of the rule.
        v_norm: norm of the velocity, over the entries which the critic sees.
        g_norm: norm of the direction.
        t: time.
    """
    match scaling:
        case "match_norm":
            return strength * v_norm / nonzero(g_norm)
        case "clip_norm":
            return strength * (v_norm / nonzero(g_norm)).clamp(max=1.0)
        case "raw":
            return torch.full_like(g_norm, strength)
        case "sigma":
            return (torch.ones_like(g_norm) * strength * half_variance(t)).to(g_norm.dtype)


def half_variance(t: Time) -> Time:
    """Return ``sigma_t^2 / 2 = clamp(1/t - 1, 0, 25)``, half the variance rate of the canonical diffusion."""
    return 1 / clamp_time(t, 1 / 26, 1.0) - 1


@dataclass(frozen=True)
class Auto:
    """A strength for each row and step: the critic's optimum within what it can know.

    QPILOTS leaves "an adaptive choice tied to local critic curvature" to future work; this is one. A push of
    relative norm alpha that lasts for the remaining time moves the final action from D to
    ``a(alpha) = clip(D + (1 - t) alpha ||v|| g / ||g||)``. With the members' improvements along that ray,
    ``dQ_j(alpha) = Q_j(a(alpha)) - Q_j(a(0))``, the strength maximises

        ``L(alpha) = mean_j dQ_j(alpha) - caution std_j dQ_j(alpha)``,

    a lower confidence bound of the improvement, not of the value: offsets between members cancel. To second
    order its maximum is ``(mean_j s_j - caution std_j s_j) / c``, s_j the members' slopes along the ray and c
    their curvature, and 0 where that is negative. L is compared on ``candidates`` strengths and refined by
    the parabola through the best and its neighbours. Any ``k Q + b``, k > 0, gives the same strength.

    Members trained on the same data are wrong together where there was none, so their disagreement alone does
    not hold a push back. The policy does: the displacement may be at most ``trust`` standard deviations of
    its posterior p(x1 | x_t), which is a Kullback-Leibler divergence of ``trust^2 / 2`` between the posterior
    and its shifted copy. Tweedie's Jacobian is J = t Cov[x1 | x_t] / (1 - t)^2, so its displacement
    ``delta = beta J^T grad Q`` is ``beta sqrt(t grad Q . J^T grad Q) / (1 - t)`` deviations long, all of
    which its backward pass has computed. Other rules take the posterior of unit Gaussian actions, of standard
    deviation ``(1 - t) / sqrt((1 - t)^2 + t^2)``.

    A value of one member knows no disagreement: then this is a line search within the trust region.

    Cost: 1 critic forward on ``candidates`` rows per guided step and row; no backward.

    Args:
        caution: standard deviations of the improvements that are held against a push.
        trust: longest displacement, in standard deviations of the policy's posterior; inf: any.
        largest: the largest strength.
        candidates: strengths that are compared, quadratically denser near 0.

    Raises:
        ValueError: an argument is out of its range.
    """

    caution: float = 2.0
    trust: float = 1.0
    largest: float = 1.0
    candidates: int = 8

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        if not (
            0.0 <= self.caution < float("inf") and 0.0 < self.largest < float("inf") and self.trust > 0.0
        ):
            raise ValueError(
                "Auto: expected finite caution >= 0 and largest > 0, and trust > 0, got "
                f"{self.caution}, {self.largest} and {self.trust}"
            )
        if self.candidates < 3:
            raise ValueError(f"Auto: expected at least 3 candidates, got {self.candidates}")

    def choose(
        self,
        value: Value,
        start: Float[Tensor, "B H A"],
        ray: Float[Tensor, "B H A"],
        deviations: Float[Tensor, "B"],
        bounds: Bounds,
    ) -> Float[Tensor, "B"]:
        """Return the strength of each row; NaN where the critic is not finite on ``start + strength ray``.

        ``deviations`` is the length of ``ray`` in standard deviations of the policy's posterior.
        """
        steps = torch.linspace(0, 1, self.candidates, dtype=ray.dtype, device=ray.device) ** 2
        grid = steps[:, None] * (self.trust / deviations).clamp(max=self.largest)
        rise = improvements(value, clip_actions(start + grid[..., None, None] * ray, bounds)).to(ray.dtype)
        bound = rise.mean(0) - self.caution * spread(rise)
        best, last = bound.argmax(0, keepdim=True), self.candidates - 1
        around = best.clamp(1, last - 1) + torch.arange(-1, 2, device=ray.device)[:, None]
        (x0, x1, x2), (y0, y1, y2) = grid.gather(0, around), bound.gather(0, around)
        slope, next_slope = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        bend = (next_slope - slope) / (x2 - x0)
        top = (x0 + x1) / 2 - slope / (2 * bend)
        below, at, above = (grid.gather(0, (best + i).clamp(0, last))[0] for i in (-1, 0, 1))
        strength = torch.where(bend < 0, top.clamp(below, above), at)
        return torch.where(torch.isfinite(bound).all(0), strength, torch.nan)


type Strength = float | Literal["auto"] | Auto


@torch.no_grad()
def improvements(value: Value, a: Float[Tensor, "K B H A"]) -> Float[Tensor, "J K B"]:
    """Return by how much each member prefers each of K actions to the first, in one call."""
    q = ask_members(value.repeat(len(a)), rearrange(a, "k b h a -> (b k) h a"))
    q = rearrange(q, "j (b k) -> j k b", k=len(a))
    return q - q[:, :1]

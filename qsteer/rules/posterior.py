"""QPILOTS-M and MFM-GF: guidance by samples of the endpoint posterior p(x1 | x_t)."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from qsteer.checks import check_function
from qsteer.clock import Time
from qsteer.flow import FunctionPosterior, ask, clip_through, factor, nonzero, spread
from qsteer.maps.meta import MetaFlowMap
from qsteer.randomness import normal
from qsteer.rules.guidance import Ascent, Guidance, gradient
from qsteer.rules.strength import Strength
from qsteer.types import Field, PosteriorSampler, Value


@dataclass(frozen=True)
class PosteriorGuidance(Guidance):
    """What the rules that look at samples of the endpoint posterior share.

    Args:
        posterior: a :class:`~qsteer.types.PosteriorSampler`: a trained :class:`qsteer.maps.MetaFlowMap`,
            :class:`qsteer.maps.GlassPosterior` (no training), or a function ``(eps, x, t) -> x1``. Give the
            map itself, not one that is bound: the rule binds it to each observation.
        alpha: norm of the guidance relative to the velocity's (``match_norm``).
        samples: posterior samples N per step; their noise is torch's, or :func:`qsteer.randomness.seeded`.
        standardize: weigh each row's samples by their values over the values' spread, so that no scale of the
            critic makes one sample decide alone; without, the tilt is ``exp(tau Q)`` itself.
        tau: inverse temperature of the tilt.
    """

    posterior: PosteriorSampler | MetaFlowMap | Callable[[Tensor, Tensor, Tensor], Tensor]
    alpha: Strength = 0.2
    samples: int = 8
    _: KW_ONLY
    standardize: bool = True
    tau: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if not isinstance(self.posterior, PosteriorSampler | MetaFlowMap):
            check_function("posterior", self.posterior, "GlassPosterior()", "qsteer.types.PosteriorSampler")
        if self.samples < 1 or not 0 < self.tau < float("inf"):
            raise ValueError(
                f"samples, tau: expected at least 1 and a positive number, got {self.samples}, {self.tau}"
            )

    @property
    def strength(self) -> Strength:
        """``alpha``."""
        return self.alpha

    def on(self, field: Field) -> "PosteriorGuidance":
        """Bind the posterior to the policy and its observations."""
        if isinstance(self.posterior, PosteriorSampler | MetaFlowMap):
            return replace(self, posterior=self.posterior.on(field))
        return replace(self, posterior=FunctionPosterior(self.posterior))

    def repeat(self, k: int) -> "PosteriorGuidance":
        """Return the rule for ``k`` rows per observation."""
        return replace(self, posterior=self.bound.repeat(k))

    @property
    def bound(self) -> PosteriorSampler:
        """The posterior of the observations, after :meth:`on`."""
        return cast(PosteriorSampler, self.posterior)

    def draw(
        self, field: Field, x: Float[Tensor, "B H A"], t: Time
    ) -> tuple[Float[Tensor, "B H A"], Float[Tensor, "N B H A"]]:
        """Return the base velocity and N posterior samples, clipped; v is evaluated once for both."""
        eps = normal((self.samples, *x.shape), x, rows=1)
        v, x1 = self.bound.draw(field, eps, x, t)
        return v, clip_through(x1, self.bounds(field))

    def tilt(self, q: Float[Tensor, "N B"]) -> Float[Tensor, "N B"]:
        """Return psi, the log-weights of the samples."""
        if self.standardize and self.samples > 1:
            q = (q - q.mean(0)) / nonzero(spread(q)).to(q.dtype)
        return self.tau * q


@dataclass(frozen=True)
class Posterior(PosteriorGuidance):
    """QPILOTS-M: the gradient of ``log mean_n exp psi(x1_n)`` over N posterior samples (eq. 16, MFM-G).

    It is the gradient of the log-tilt potential V_t itself as N grows, where Tweedie replaces the posterior
    by its mean: ``tau sum_n softmax(psi)_n grad Q(x1_n)``. Samples are differentiable in x, so the gradient
    goes through the posterior's own dependence on x.

    Cost: 1 velocity forward, 1 critic forward and backward on N rows, and the posterior's forward and
    backward: with ``GlassPosterior(steps=m)`` 1 velocity backward, and m - 1 velocity forwards and backwards
    on N rows; with a :class:`~qsteer.maps.MetaFlowMap` 1 forward and backward of the map on N rows, and if it
    is residual 1 velocity backward.
    """

    def ascent(self, field: Field, value: Value, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Differentiate the log-mean-exp of the samples' values with respect to x."""
        x = x.requires_grad_()
        v, x1 = self.draw(field, x, t)
        q = values(value, x1)
        weights = self.tilt(q.detach()).softmax(0)
        g = gradient(self.tau * (weights * q).sum(0), x)
        return Ascent(v, g, q.mean(0), x1.mean(0))


@dataclass(frozen=True)
class GradientFreePosterior(PosteriorGuidance):
    """MFM-GF: how far weighing the samples moves their mean. Any black-box score will do.

    ``(sum_n softmax(psi)_n x1_n - mean_n x1_n) / (1 - t)`` is ``(sigma_t^2 / 2) grad V_t`` as N grows (Meta
    Flow Maps); divided by ``sigma_t^2 / 2 = (1 - t) / t`` it estimates what the other rules estimate. Neither
    the policy nor the critic is differentiated.

    Cost, beside the posterior's: 1 velocity forward, 1 critic forward on N rows. Never a backward.
    """

    def ascent(self, field: Field, value: Value, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Compare the weighted with the plain mean of the samples."""
        with torch.no_grad():
            v, x1 = self.draw(field, x, t)
            q = values(value, x1).to(
                torch.promote_types(x1.dtype, torch.float32)
            )  # counts of a rule of thumb
            weights = (self.tilt(q).softmax(0) - 1 / len(q)).to(x1.dtype)
            # from sample 0: samples that agree move nothing, not even by rounding, which scaling amplifies
            moved = (weights[:, :, None, None] * (x1 - x1[0])).sum(0)
            return Ascent(v, factor(t, x) * moved / factor((1 - t) ** 2, x), q.mean(0), x1.mean(0))


def values(value: Value, x1: Float[Tensor, "N B H A"]) -> Float[Tensor, "N B"]:
    """Return the value of N actions per observation, in one call."""
    q = ask(value.repeat(len(x1)), rearrange(x1, "n b h a -> (b n) h a"))
    return rearrange(q, "(b n) -> n b", n=len(x1))

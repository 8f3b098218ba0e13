"""Guidance rules: how a value bends a velocity field.

Every rule here is one estimate of the gradient of the log-tilt potential
``V_t(x) = log E[exp Q(x1) | x_t = x]``, one scaling of it, and one choice of guided steps; the three are
independent. The sampler knows nothing of them.

Notation: ``D(x, t) = x + (1 - t) v(x, t)`` is the denoised action. Costs are per guided step and row.
"""

import math
import os
import warnings
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import PAPER, Clock, clock_of
from qsteer.course import known
from qsteer.flow import clip_through, denoise, finite_rows, rows
from qsteer.trace import Step, recorder, report_fallbacks, report_gated
from qsteer.types import Bounds, Field, PosteriorSampler, Rule, Value

Scaling = Literal["match_norm", "raw", "clip_norm", "sigma"]
_EPS = 1e-8
_EDGE = 1e-6  # a host's float32 time may miss a window's edge by an ulp


class Ascent(NamedTuple):
    """What an estimator found at one step: all detached, one row per row of x."""

    velocity: Tensor
    """(B, H, A) the base velocity at (x, t)."""
    gradient: Tensor
    """(B, H, A) the direction of ascent, unscaled."""
    value: Tensor
    """(B,) the value where the gradient was taken."""
    action: Tensor
    """(B, H, A) the action at which the value was taken."""
    action_gradient: Tensor | None = None
    """(B, H, A) the value's gradient grad Q in the denoised action, where ``gradient`` is J^T grad Q."""


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
        clip: Bounds,
    ) -> Float[Tensor, "B"]:
        """Return the strength of each row; NaN where the critic is not finite on ``start + strength ray``.

        ``deviations`` is the length of ``ray`` in standard deviations of the policy's posterior.
        """
        steps = torch.linspace(0, 1, self.candidates, dtype=ray.dtype, device=ray.device) ** 2
        grid = steps[:, None] * (self.trust / deviations).clamp(max=self.largest)
        rise = improvements(value, clamped(start + grid[..., None, None] * ray, clip)).to(ray.dtype)
        bound = rise.mean(0) - self.caution * rise.std(0, correction=0)
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


@dataclass(frozen=True)
class Guidance(Rule):
    """A rule of the form ``v <- v + strength * scale * g``; subclasses say what g is.

    A strength is a number, or ``"auto"``, which is ``Auto()``: chosen by the critic for each row and step.

    Args:
        scaling: ``match_norm``: g is rescaled to the velocity's norm (QPILOTS eq. 17); ``clip_norm``: the
            same, but never scaled up; ``raw``: g as it is; ``sigma``: g times
            ``sigma_t^2 / 2 = clamp(1/t - 1, 0, 25)``, the exactly steered ODE when g is the exact gradient of
            V_t. Norms are per row, over the entries which the critic sees.
        clip: bounds of the clean action at which the critic is asked, with a straight-through gradient; None:
            no clip.
        start: first guided time, inclusive.
        stop: last guided time, inclusive.
        every: guide the first step in the window and every ``every``-th from there, with the same strength:
            another method, at about 1/``every`` of the cost. Steps are those of the sampler.

    Raises:
        ValueError: an argument is out of its range.
    """

    _: KW_ONLY
    scaling: Scaling = "match_norm"
    clip: Bounds = (-1.0, 1.0)
    start: float = 0.0
    stop: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling: expected one of {', '.join(get_args(Scaling))}, got {self.scaling!r}")
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(
                f"start, stop: expected 0 <= start <= stop <= 1 in paper time (0 is noise), got "
                f"{self.start}, {self.stop}"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected an int of at least 1, got {self.every!r}; 1 guides every step")
        check_bounds(self.clip)
        if self.auto is not None:
            if self.scaling != "match_norm":
                raise ValueError(
                    f"{type(self).__name__}: expected scaling 'match_norm' with an automatic strength, which "
                    f"is relative to the velocity, got {self.scaling!r}"
                )
        elif not (isinstance(self.strength, float | int) and 0.0 <= self.strength < float("inf")):
            raise ValueError(
                f"{type(self).__name__}: expected a finite strength of at least 0, got {self.strength}; "
                "to descend use qsteer.Negated(rule), to let the critic choose 'auto' or qsteer.Auto()"
            )

    @property
    @abstractmethod
    def strength(self) -> Strength:
        """The factor of the scaled direction."""

    @property
    def auto(self) -> Auto | None:
        """How the strength is chosen; None: it is a number."""
        return (
            Auto() if self.strength == "auto" else self.strength if isinstance(self.strength, Auto) else None
        )

    @property
    def at_noise(self) -> bool:
        """Whether t = 0 is guided too. There D(x, 0) is the mean action, whatever x is."""
        return False

    @abstractmethod
    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Return the base velocity at (x, t) and the direction of ascent. Called with gradients enabled."""

    def on(self, field: Field) -> "Guidance":
        """Return the rule for this field's observations; rules that carry a learnt map bind it here, once."""
        return self

    def __call__(self, field: Field, value: Value) -> Field:
        """Return the steered field; of strength 0 it is ``field`` itself, bit for bit and at no cost."""
        return Steered(self, field, value) if self.strength else field

    def guides(self, t: Float[Tensor, "B"], steps: int = PAPER.steps) -> Tensor:
        """Return which rows are guided at their times; ``every`` counts the chain's ``steps``."""
        inside = (t >= self.start - _EDGE) & (t <= self.stop + _EDGE)
        if not self.at_noise:
            inside = inside & (t > 0)
        if self.every == 1:
            return inside
        first = max(math.ceil((self.start - _EDGE) * steps), 0 if self.at_noise else 1)
        return inside & ((t * steps).round() % self.every == first % self.every)

    def scale(self, v_norm: Tensor, g_norm: Tensor, t: Tensor) -> Tensor:
        """Return the factor of g for each row, shapes (B,); an automatic strength counts as 1."""
        strength = self.strength if isinstance(self.strength, float | int) else 1.0
        match self.scaling:
            case "match_norm":
                return strength * v_norm / (g_norm + _EPS)
            case "clip_norm":
                return strength * (v_norm / (g_norm + _EPS)).clamp(max=1.0)
            case "raw":
                return torch.full_like(g_norm, strength)
            case "sigma":
                return strength * (1 / t - 1).clamp(0.0, 25.0).to(g_norm.dtype)


@dataclass(frozen=True)
class Steered:
    """The field a guidance rule makes: one Euler step of ``base`` bent by the rule."""

    rule: Guidance
    base: Field
    value: Value
    sign: int = 1
    limit: float = float("inf")
    steps: int | None = None

    @property
    def clock(self) -> Clock:
        """The base field's clock, with the steps of the chain."""
        clock = clock_of(self.base)
        return clock if self.steps is None else replace(clock, steps=self.steps)

    @property
    def features(self) -> Any:
        """The base field's features."""
        return getattr(self.base, "features", None)

    @cached_property
    def bound(self) -> Guidance:
        """The rule, bound to the observations."""
        return self.rule.on(self.base)

    def repeat(self, k: int) -> "Steered":
        """Return the steered field for ``k`` rows per observation."""
        return replace(self, base=self.base.repeat(k), value=self.value.repeat(k))

    def chain(self, steps: int | None) -> "Steered":
        """Return the steered field for one chain of ``steps`` steps; what a rule remembers begins anew."""
        return replace(self, steps=self.steps if steps is None else steps)

    def __call__(self, x: Float[Tensor, "B H A"], t: Float[Tensor, "B"]) -> Float[Tensor, "B H A"]:
        """Return the guided velocity; rows where anything is not finite keep the base velocity."""
        guided = self.rule.guides(t, self.clock.steps)
        if not known(lambda: bool(guided.any())):
            return self.base(x, t)
        with torch.enable_grad():
            v, g, q, a, in_action = self.bound.ascent(self.base, self.value, x.detach(), t)
        mask = getattr(self.value, "mask", None)
        g, seen = (g, v) if mask is None else (torch.where(mask.bool(), part, 0.0) for part in (g, v))
        v_norm, g_norm = seen.flatten(1).norm(dim=1), g.flatten(1).norm(dim=1)
        push = self.sign * rows(self.rule.scale(v_norm, g_norm, t), x) * g
        if (auto := self.rule.auto) is not None:
            start, ray = denoise(x.detach(), v, t), self.sign * rows(1 - t, x) * push
            if in_action is None:
                deviations = torch.hypot(1 - t, t).to(x.dtype) * v_norm
            else:
                slope = torch.where(g == 0, 0.0, g * in_action).flatten(1).sum(1)
                deviations = (t.to(x.dtype) * slope.clamp(min=0)).sqrt() * v_norm / g_norm
            push = rows(auto.choose(self.value, start, ray, deviations, self.rule.clip), x) * push
        finite = finite_rows(v + push) & torch.isfinite(q)
        report_fallbacks(guided & ~finite)
        guided = guided & finite
        if self.limit < float("inf"):
            ends = torch.stack([denoise(x.detach(), w, t) for w in (v, v + push)])
            gain = improvements(self.value, clamped(ends, self.rule.clip))[:, 1]
            sure = gain.std(0, correction=0) <= self.limit * gain.mean(0).abs()
            report_gated(guided & ~sure)
            guided = guided & sure
        if (record := recorder()) is not None:
            members = self.value.members(a).detach()
            nan = torch.full_like(q, torch.nan)
            strength = push.flatten(1).norm(dim=1) / v_norm
            stats = (strength, g_norm, members.mean(0), members.std(0, unbiased=False))
            record.append(Step(t, *(torch.where(guided, s, nan) for s in stats)))
        return torch.where(guided[:, None, None], v + push, v)


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

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Differentiate the value of the denoised action with respect to the noisy one."""
        x = x.requires_grad_()
        v = (field if self.layers is None else truncated(field, self.layers))(x, t)
        if not v.requires_grad:
            warnings.warn(
                "Tweedie: expected a velocity that is differentiable in x, got one without a gradient: its "
                "Jacobian is lost, and the rule is a QGF; compute the velocity without no_grad() or detach()",
                RuntimeWarning,
                skip_file_prefixes=(os.path.dirname(__file__),),
            )
        a = clip_through(denoise(x, v, t), self.clip)
        q = value(a)
        in_action = gradient(q, a)
        g = torch.autograd.grad(a, x, in_action)[0]
        return Ascent(v.detach(), g, q.detach(), a.detach(), in_action)


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
    _last: list[Tensor] | None = field(default=None, repr=False, compare=False)  # of one chain, see on()

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.eps is not None and not 0.0 < self.eps < float("inf"):
            raise ValueError(f"eps: expected a finite positive number, got {self.eps}; None chooses by dtype")

    @property
    def strength(self) -> Strength:
        """``alpha``."""
        return self.alpha

    def on(self, field: Field) -> "ForwardTweedie":
        """Return the rule for one chain, with a memory for its last gradient if it needs one."""
        return replace(self, _last=[]) if self.stale else self

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Perturb the noisy action along the value's gradient, and see where the denoised action goes."""
        along = self._last[0] if self._last and self._last[0].shape == x.shape else None
        with torch.no_grad():
            if along is None:
                v = field(x, t)
            else:
                h = self.reach(field, along)
                both = torch.stack([x, x + rows(h, x) * along], 1).flatten(0, 1)
                v, there = field.repeat(2)(both, t.repeat_interleave(2)).unflatten(0, (-1, 2)).unbind(1)
        q, a, g = at_denoised(value, x, v, t, self.clip)
        if along is None:
            along, h = g, self.reach(field, g)
            with torch.no_grad():
                there = field(x + rows(h, x) * along, t)
        if self._last is not None:
            self._last[:] = [g]
        return Ascent(v, along + rows((1 - t) / h, x) * (there - v), q, a, along)

    def reach(self, field: Field, g: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return h, the step along g."""
        dtypes = g.dtype, getattr(field, "dtype", None) or g.dtype
        coarse = max(torch.finfo(dtype).eps for dtype in dtypes)
        eps = 2 * math.sqrt(coarse) if self.eps is None else self.eps
        flat = g.flatten(1)
        return eps * flat.count_nonzero(1).clamp(min=1).sqrt() / (flat.norm(dim=1) + _EPS)


@dataclass(frozen=True)
class PosteriorGuidance(Guidance):
    """What the rules that look at samples of the endpoint posterior share.

    Args:
        posterior: a :class:`~qsteer.types.PosteriorSampler`: a trained :class:`qsteer.maps.MetaFlowMap`,
            :class:`qsteer.maps.GlassPosterior` (no training), or a function ``(eps, x, t) -> x1``. Give the
            map itself, not one that is bound: the rule binds it to each observation.
        alpha: norm of the guidance relative to the velocity's (``match_norm``).
        samples: posterior samples N per step; their noise comes from torch's global generator.
        standardize: weigh each row's samples by their values over the values' spread, so that no scale of the
            critic makes one sample decide alone; without, the tilt is ``exp(tau Q)`` itself.
        tau: inverse temperature of the tilt.
    """

    posterior: PosteriorSampler
    alpha: Strength = 0.2
    samples: int = 8
    _: KW_ONLY
    standardize: bool = True
    tau: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if isinstance(self.posterior, type) or not callable(getattr(self.posterior, "on", self.posterior)):
            raise TypeError(
                "posterior: expected a sampler (eps, x, t) -> x1, such as GlassPosterior() or a MetaFlowMap, "
                f"got {self.posterior!r}; pass an instance"
            )
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
        bind = getattr(self.posterior, "on", None)
        return self if bind is None else replace(self, posterior=bind(field))

    def draw(self, field: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Float[Tensor, "N B H A"]]:
        """Return the base velocity and N posterior samples, clipped; v is evaluated once for both."""
        eps = torch.randn(self.samples, *x.shape, dtype=x.dtype, device=x.device)
        given = getattr(self.posterior, "given", None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and given is not None):
            v = field(x, t)
        x1 = self.posterior(eps, x, t) if given is None else given(v, eps, x, t)
        return v.detach(), clip_through(x1, self.clip)

    def tilt(self, q: Float[Tensor, "N B"]) -> Float[Tensor, "N B"]:
        """Return psi, the log-weights of the samples."""
        if self.standardize and self.samples > 1:
            q = (q - q.mean(0)) / (q.std(0, unbiased=False) + _EPS)
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

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Differentiate the log-mean-exp of the samples' values with respect to x."""
        x = x.requires_grad_()
        v, x1 = self.draw(field, x, t)
        q = values(value, x1)
        weights = self.tilt(q.detach()).softmax(0)
        g = gradient(self.tau * (weights * q).sum(0), x)
        return Ascent(v, g, q.detach().mean(0), x1.detach().mean(0))


@dataclass(frozen=True)
class GradientFreePosterior(PosteriorGuidance):
    """MFM-GF: how far weighing the samples moves their mean. Any black-box score will do.

    ``(sum_n softmax(psi)_n x1_n - mean_n x1_n) / (1 - t)`` is ``(sigma_t^2 / 2) grad V_t`` as N grows (Meta
    Flow Maps); divided by ``sigma_t^2 / 2 = (1 - t) / t`` it estimates what the other rules estimate. Neither
    the policy nor the critic is differentiated.

    Cost, beside the posterior's: 1 velocity forward, 1 critic forward on N rows. Never a backward.
    """

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Compare the weighted with the plain mean of the samples."""
        with torch.no_grad():
            v, x1 = self.draw(field, x, t)
            q = values(value, x1)
            weights = self.tilt(q).softmax(0) - 1 / len(q)
            # from sample 0: samples that agree move nothing, not even by rounding, which scaling amplifies
            moved = (weights[:, :, None, None] * (x1 - x1[0])).sum(0)
            g = rows(t / (1 - t) ** 2, x) * moved
        return Ascent(v, g, q.mean(0), x1.mean(0))


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

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Differentiate the value at the denoised action."""
        with torch.no_grad():
            v = field(x, t)
        q, a, g = at_denoised(value, x, v, t, self.clip)
        return Ascent(v, g, q, a)


@dataclass(frozen=True)
class NoisyGradient(Guidance):
    """Baseline (CGQL, QFQL): the critic's gradient at the noisy action itself, where it was never trained.

    Cost: 1 velocity forward, 1 critic forward and backward.

    Args:
        alpha: norm of the guidance relative to the velocity's.
    """

    alpha: Strength = 0.2

    @property
    def strength(self) -> Strength:
        """``alpha``."""
        return self.alpha

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Differentiate the value at x."""
        with torch.no_grad():
            v = field(x, t)
        x = x.requires_grad_()
        a = clip_through(x, self.clip)
        q = value(a)
        return Ascent(v, gradient(q, x), q.detach(), a.detach())


@dataclass(frozen=True)
class ThroughTime(Guidance):
    """Baseline (BPTT): the gradient of the value of the finished action, through the rest of the Euler chain.

    Cost: at step i of K, K - i velocity forwards and backwards, 1 critic forward and backward.

    Args:
        alpha: norm of the guidance relative to the velocity's.
        steps: K of the whole chain; None: the field's own number.
    """

    alpha: Strength = 0.2
    steps: int | None = None

    @property
    def strength(self) -> Strength:
        """``alpha``."""
        return self.alpha

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Differentiate the value of the chain's end with respect to x."""
        clock, now = clock_of(field), known(lambda: float(t[0]))
        rest = [(s, dt) for s, dt in clock.grid(self.steps) if s >= now - _EDGE]
        if not rest or rest[0][0] > now + _EDGE:
            raise ValueError(
                f"ThroughTime: expected the chain's own number of steps, got t = {now:.3f} off the "
                f"grid of steps={self.steps}; give ThroughTime(steps=...) the sampler's"
            )
        x = x.requires_grad_()
        velocity = field(x, t)
        a = x + rest[0][1] * velocity
        for s, dt in rest[1:]:
            a = a + dt * field(a, clock.times(s, a))
        a = clip_through(a, self.clip)
        q = value(a)
        return Ascent(velocity.detach(), gradient(q, x), q.detach(), a.detach())


@dataclass(frozen=True)
class RandomDirection(Guidance):
    """Control arm: a random direction of the same norm. A gain it shares is no gain of the critic's.

    Guides the steps Tweedie guides. Directions come from a generator of the rule's own, so the caller's noise
    is the same as in every other arm.

    Cost: 1 velocity forward.

    Args:
        alpha: norm of the guidance relative to the velocity's.
        seed: seed of the directions.
    """

    alpha: float = 0.2
    seed: int = 0
    _generators: dict[torch.device, torch.Generator] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.auto is not None:
            raise ValueError(
                f"RandomDirection: expected a number as strength, got {self.alpha!r}: a control that asks "
                "the critic how far to go controls for nothing"
            )

    @property
    def strength(self) -> float:
        """``alpha``."""
        return self.alpha

    def ascent(self, field: Field, value: Value, x: Tensor, t: Tensor) -> Ascent:
        """Draw a direction."""
        with torch.no_grad():
            v = field(x, t)
            if x.device not in self._generators:
                self._generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
            g = torch.randn(x.shape, generator=self._generators[x.device], device=x.device, dtype=x.dtype)
        return Ascent(v, g, torch.zeros_like(x[:, 0, 0]), clip_through(denoise(x, v, t), self.clip))


@dataclass(frozen=True)
class Negated(Rule):
    """Control arm: the same guidance downhill. It should do worse than no guidance at all.

    An automatic strength is still the one chosen for going uphill.

    Cost: that of ``rule``.

    Args:
        rule: the guidance to negate.
    """

    rule: Guidance

    def __post_init__(self) -> None:
        """Check the argument."""
        if not isinstance(self.rule, Guidance):
            raise TypeError(
                f"Negated: expected a guidance rule such as Tweedie(), got {type(self.rule).__name__}"
            )

    def __call__(self, field: Field, value: Value) -> Field:
        """Return the field steered against the value."""
        steered = self.rule(field, value)
        return replace(steered, sign=-1) if isinstance(steered, Steered) else steered


@dataclass(frozen=True)
class Gated(Rule):
    """Guidance only where the ensemble agrees on what it gains.

    A push that lasts for the remaining time moves the denoised action D to ``D + (1 - t) push``, by which
    member j gains ``dQ_j``. Rows with ``std_j dQ_j > limit |mean_j dQ_j|`` keep the base velocity at that
    step and are counted in ``Trace.gated``. The ratio has no units: any ``k Q + b`` gates the same rows. A
    value of one member agrees with itself: it is never gated.

    Cost: that of ``rule``, and 1 critic forward on 2 rows per guided step and row.

    Args:
        rule: the guidance to gate.
        limit: largest standard deviation over absolute mean of the members' gains.

    Raises:
        TypeError: ``rule`` is no guidance.
        ValueError: ``limit`` is negative or not a number.
    """

    rule: Guidance | Negated
    limit: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.rule, Guidance | Negated):
            raise TypeError(
                f"Gated: expected a guidance rule such as Tweedie(), got {type(self.rule).__name__}"
            )
        if not self.limit >= 0.0:
            raise ValueError(f"limit: expected at least 0, got {self.limit}; inf gates nothing")

    def __call__(self, field: Field, value: Value) -> Field:
        """Return the field steered where the members agree."""
        steered = self.rule(field, value)
        return replace(steered, limit=self.limit) if isinstance(steered, Steered) else steered


def gradient(q: Float[Tensor, "B"], x: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
    """Return the gradient of each row's value with respect to its row of x, and to nothing else."""
    if not q.requires_grad:
        raise ValueError(
            "value: expected a score that is differentiable in the action, got one without a gradient; "
            "compute it in torch without detach() or no_grad(), or "
            "select with qsteer.BestOfN, which needs no gradient"
        )
    return torch.autograd.grad(q.sum(), x)[0]


def at_denoised(
    value: Value, x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Float[Tensor, "B"], clip: Bounds
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B H A"], Float[Tensor, "B H A"]]:
    """Return the value of the denoised action, that action, and the value's gradient in it."""
    a = clamped(denoise(x, v, t), clip).detach().requires_grad_()
    q = value(a)
    return q.detach(), a.detach(), gradient(q, a)


def truncated(field: Field, layers: int) -> Field:
    """Return the field whose gradient runs through its last ``layers`` layers.

    Raises:
        ValueError: it does not know its layers.
    """
    cut = getattr(field, "truncated", None)
    if cut is None:
        raise ValueError(
            f"Tweedie(layers={layers}): expected the velocity of a policy whose layers are known, got "
            f"{type(field).__name__}; name them in the policy's Host record, or leave layers out"
        )
    return cut(layers)


def values(value: Value, x1: Float[Tensor, "N B H A"]) -> Float[Tensor, "N B"]:
    """Return the value of N actions per observation, in one call."""
    q = value.repeat(len(x1))(rearrange(x1, "n b h a -> (b n) h a"))
    return rearrange(q, "(b n) -> n b", n=len(x1))


@torch.no_grad()
def improvements(value: Value, a: Float[Tensor, "K B H A"]) -> Float[Tensor, "J K B"]:
    """Return by how much each member prefers each of K actions to the first, in one call."""
    q = value.repeat(len(a)).members(rearrange(a, "k b h a -> (b k) h a"))
    q = rearrange(q, "j (b k) -> j k b", k=len(a))
    return q - q[:, :1]


def clamped(a: Tensor, bounds: Bounds) -> Tensor:
    """Return actions clipped to bounds, if there are any."""
    return a if bounds is None else a.clamp(*bounds)


def check_bounds(bounds: Bounds) -> None:
    """Raise ValueError unless bounds are None or (low, high)."""
    if bounds is not None and not (
        isinstance(bounds, tuple | list) and len(bounds) == 2 and bounds[0] < bounds[1]
    ):
        raise ValueError(
            f"clip: expected (low, high) with low < high, or None for no clipping, got {bounds!r}"
        )

"""Samplers that select by other means than the best of all: softly, along the chain, before it.

As everywhere, the caller's noise is candidate 0, and with one candidate each is its inner sampler.
"""

from dataclasses import dataclass
from dataclasses import field as attribute

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from qsteer.checks import check_count, unwrap_numbers
from qsteer.flow import clip_actions, denoise, widened
from qsteer.randomness import uniform
from qsteer.samplers import Euler, best, candidates, check_inner, draw, fresh, needed, scores, take
from qsteer.trace import report_fallbacks, report_step
from qsteer.types import Field, Sampler, Value, clip_of


@dataclass(frozen=True)
class ExpectileOfN(Sampler):
    """One of n candidates, drawn by the expectile weights of their values (IDQL's implicit actor).

    With V the expectile of the n values, a candidate weighs ``|expectile - 1(Q < V)|``: at 0.5 all the same,
    towards 1 the best alone. There is no temperature: values in any unit give the same draw. Non-finite
    values are never drawn; a row without any finite value keeps candidate 0 and counts as a fallback.

    Cost: that of ``inner`` on n rows per observation, and 1 critic forward on n rows.

    Args:
        n: candidates per observation.
        expectile: from 0.5 to below 1.
        inner: makes each candidate.

    Raises:
        ValueError: fewer than one candidate, or an expectile out of its range.
    """

    n: int
    expectile: float = 0.9
    inner: Sampler = attribute(default_factory=Euler)

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        check_count(self, "n")
        check_inner(self, self.inner)
        if self.n < 1:
            raise ValueError(f"{type(self).__name__}: expected n of at least 1 candidate, got {self.n}")
        if not 0.5 <= self.expectile < 1:
            raise ValueError(
                f"expectile: expected 0.5 <= expectile < 1, got {self.expectile}; the best alone is BestOfN"
            )

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the drawn candidate."""
        if self.n == 1:
            return self.inner(field, value, noise)
        value, n = needed(value, self), self.n
        noise = rearrange(candidates(field, noise, n), "b n h a -> (b n) h a")
        a = self.inner(field.repeat(n), value.repeat(n), noise)
        weights = expectile_weights(scores(value, a, n), self.expectile)
        return take(a.unflatten(0, weights.shape), drawn(weights, 1)[:, 0])


@dataclass(frozen=True)
class FeynmanKac(Sampler):
    """Particles along a stochastic chain, weighed by their denoised action's value and resampled.

    At each time but 0 a particle weighs ``exp(strength Q(D(x, t)))``, over what it weighed when it was last
    resampled; particles are resampled (systematically) where their effective number is below a half. In the
    last step D is the finished action, of which one is drawn by the weights. So the weights telescope, and
    the action's law tends to the chain's own times ``exp(strength Q)`` as particles grow (Singhal et al.,
    arXiv 2501.06848, "difference" potential).

    Euler's chain would leave copies together. Here a step from t to s puts fresh noise in the place of a
    part of the noise that D implies, ``e = x - t v``:

        ``x_s = s D + (1 - s) (r e + sqrt(1 - r^2) eps)``,  ``r = t (1 - s) / (s (1 - t))``.

    As ``E[e | x_t] = -(1 - t) score``, that is the SDE ``dx = (v + g^2 score / 2) dt + g dW`` with
    ``g^2 = 2 (1 - t) / t``, whose marginals are the policy's: to first order in the step, as Euler's are.

    Cost: ``particles`` rows of each of the chain's velocity forwards; critic: a forward on as many rows in
    each step but the first.

    A row without any finite value does not resample there, and in the last step keeps particle 0 and counts
    as a fallback.

    Args:
        particles: per observation; 1: ``inner`` alone.
        strength: of the tilt, in one over the critic's unit.
        inner: steps and clip of the chain.

    Raises:
        ValueError: a number is out of its range.
        TypeError: ``inner`` is no :class:`~qsteer.Euler`.
    """

    particles: int = 8
    strength: float = 1.0
    inner: Euler = attribute(default_factory=Euler)

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        check_count(self, "particles")
        if self.particles < 1:
            raise ValueError(f"particles: expected at least 1, got {self.particles}")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength: expected a finite number of at least 0, got {self.strength}")
        if not isinstance(self.inner, Euler):
            raise TypeError(f"inner: expected an Euler, whose steps are made stochastic, got {self.inner!r}")

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return one particle's action."""
        if self.particles == 1:
            return self.inner(field, value, noise)
        value, n, bounds = needed(value, self), self.particles, clip_of(self.inner.clip, field)
        x = rearrange(candidates(field, noise, n), "b n h a -> (b n) h a")
        field = field.repeat(n).chain(self.inner.steps)
        times = [t for t, _ in field.clock.grid(self.inner.steps)]
        paid = widened(torch.zeros(len(noise), n, device=x.device))
        for t, s in zip(times, [*times[1:], 1.0], strict=True):
            report_step()
            v = field(x, t)
            a, e = denoise(x, v, t), x - t * v
            if t > 0 or s == 1:
                q = self.strength * widened(scores(value, clip_actions(a, bounds), n))
                lost = q.amax(1, keepdim=True) == -torch.inf
                weights = torch.where(lost, 1 / n, (q - paid).softmax(1))
                if s == 1:
                    break
                low = 1 / weights.square().sum(1, keepdim=True) < n / 2
                pick = torch.where(low, drawn(weights, n), torch.arange(n, device=x.device))
                paid = torch.where(low, q.gather(1, pick), paid)
                a, e = (take(each.unflatten(0, q.shape), pick).flatten(0, 1) for each in (a, e))
            r = t * (1 - s) / (s * (1 - t))
            x = s * a + (1 - s) * (r * e + (1 - r**2) ** 0.5 * fresh(field, e))
        report_step()
        report_fallbacks(lost)
        pick = torch.where(lost, 0, drawn(weights, 1))
        return take(clip_actions(a, bounds).unflatten(0, q.shape), pick[:, 0])


@dataclass(frozen=True)
class PruneSeeds(Sampler):
    """The best of those n candidates which a cheap look ranks highest.

    Every candidate's noise is integrated cheaply; the ``keep`` of highest value are made again by ``inner``,
    from the same noise, and the best of these is taken: :class:`~qsteer.BestOfN` wherever its winner is among
    them. A coarse chain is the look, and not the denoised action a few steps into ``inner``'s: it ends where
    the noise leads, and at t = 0 they are the same, ``Euler(1)``.

    Cost: ``look`` on n rows and ``inner`` on ``keep`` rows per observation, critic forwards on n and on
    ``keep`` rows: 104 rows for best-of-32's 320 by default.

    Args:
        n: candidates per observation.
        keep: how many are made by ``inner``.
        look: makes what they are ranked by.
        inner: makes each candidate.

    Raises:
        ValueError: fewer than one candidate, or more to keep than there are.
    """

    n: int
    keep: int = 4
    look: Sampler = attribute(default_factory=lambda: Euler(2))
    inner: Sampler = attribute(default_factory=Euler)

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        check_count(self, "n", "keep")
        for part in (self.look, self.inner):
            check_inner(self, part)
        if self.n < 1:
            raise ValueError(f"{type(self).__name__}: expected n of at least 1 candidate, got {self.n}")
        if not 1 <= self.keep <= self.n:
            raise ValueError(f"keep: expected 1 to {self.n}, got {self.keep}; it is how many of n are made")

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the best of the kept candidates."""
        if self.n == 1:
            return self.inner(field, value, noise)
        value, n, m = needed(value, self), self.n, self.keep
        pool = candidates(field, noise, n)
        looks = self.look(field.repeat(n), value.repeat(n), pool.flatten(0, 1))
        kept = scores(value, looks, n).argsort(dim=1, descending=True, stable=True)[:, :m]
        a = self.inner(field.repeat(m), value.repeat(m), take(pool, kept).flatten(0, 1))
        return best(a, scores(value, a, m))


def expectile_weights(q: Float[Tensor, "B n"], expectile: float) -> Float[Tensor, "B n"]:
    """Return ``|expectile - 1(q < V)|`` with V the expectile of each row; 0 where q is -inf.

    V is the largest of the means in which the k highest weigh ``expectile`` and the others ``1 - expectile``.
    A row that is all -inf has its weight on candidate 0, and is counted.
    """
    lost = q.amax(1, keepdim=True) == -torch.inf
    report_fallbacks(lost)
    first = torch.arange(q.shape[1], device=q.device) == 0
    q = widened(torch.where(lost & first, 0.0, q))
    q = q - q.amax(1, keepdim=True)
    ordered, finite = q.sort(dim=1, descending=True).values, torch.isfinite(q)
    sums = torch.where(torch.isfinite(ordered), ordered, 0.0).cumsum(1)
    above = torch.isfinite(ordered).cumsum(1)
    means = (expectile * sums + (1 - expectile) * (sums[:, -1:] - sums)) / (
        expectile * above + (1 - expectile) * (above[:, -1:] - above)
    )
    weights = (expectile - (q < means.amax(1, keepdim=True)).to(q.dtype)).abs()
    return torch.where(finite, weights, 0.0)


def drawn(weights: Float[Tensor, "B n"], m: int) -> Int[Tensor, "B m"]:
    """Return m candidates, each as often as its share of the weights, rounded up or down (systematic)."""
    edges = weights.cumsum(1)
    total = edges[:, -1:]
    points = (
        (torch.arange(m, device=edges.device) + draw(lambda: uniform((len(edges), 1), edges))) / m * total
    )
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(edges, torch.minimum(points, below), right=True)

"""Selection along the chain: particles that are weighed and resampled on their way to an action."""

from dataclasses import dataclass
from dataclasses import field as attribute

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from qsteer.checks import check_count, unwrap_numbers
from qsteer.flow import clip_actions, denoise, widened
from qsteer.randomness import uniform
from qsteer.samplers import Euler, candidates, check_free, draw, fresh, needed, scores, take
from qsteer.trace import report_fallbacks, report_step
from qsteer.types import Field, Sampler, Value, clip_of


@dataclass(frozen=True)
class FeynmanKac(Sampler):
    """Particles along a stochastic chain, weighed by their denoised action's value and resampled.

    At each time but 0 a particle weighs ``exp(strength Q(D(x, t)))``, over what it weighed when it was last
    resampled; particles are resampled (systematically) where their effective number is below a half. In the
    last step D is the finished action, of which one is drawn by the weights. So the weights telescope, and
    the action's law tends to the chain's own times ``exp(strength Q)`` as particles grow (Singhal et al.,
    arXiv 2501.06848, "difference" potential). No gradient is taken, of critic or policy.

    Euler's chain would leave copies together. Here a step from t to s puts fresh noise in the place of a
    part of the noise that D implies, ``e = x - t v``:

        ``x_s = s D + (1 - s) (r e + sqrt(1 - r^2) eps)``,  ``r = t (1 - s) / (s (1 - t))``.

    As ``E[e | x_t] = -(1 - t) score``, that is the SDE ``dx = (v + g^2 score / 2) dt + g dW`` with
    ``g^2 = 2 (1 - t) / t``, whose marginals are the policy's: to first order in the step, as Euler's are. On
    a policy that puts its prediction back on the path by itself (X-VLA) these steps replace its own.

    Cost: the chain's velocity forwards on ``particles`` rows per observation; critic: a forward on as many
    rows in each step but the first.

    A row without any finite value does not resample there, and in the last step keeps particle 0 and counts
    as a fallback.

    Args:
        particles: per observation; 1: ``inner`` alone.
        strength: of the tilt, in one over the critic's unit: about 3 over the spread of values over the
            policy's actions that :func:`qsteer.audit` prints; 0 is the control, a random particle.
        inner: steps and clip of the chain.

    Raises:
        ValueError: a number is out of its range; when acting: real-time chunking holds the chain.
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
        check_free(field, self, "its own steps", "take another sampler")
        value, n, bounds = needed(value, self), self.particles, clip_of(self.inner.clip, field)
        x = rearrange(candidates(field, noise, n), "b n h a -> (b n) h a")
        field = field.repeat(n).chain(self.inner.steps)
        times = [t for t, _ in field.clock.grid(self.inner.steps)]
        paid = widened(x.new_zeros(len(noise), n))  # what each has been resampled by
        for t, s in zip(times, [*times[1:], 1.0], strict=True):
            report_step()
            v = field(x, t)
            a, e = denoise(x, v, t), x - t * v
            if t > 0 or s == 1:
                q = widened(scores(value, clip_actions(a, bounds), n))
                q = torch.where(torch.isfinite(q), self.strength * q, q)
                weights = (q - paid).softmax(1).nan_to_num(1 / n)  # nan: no value is finite
                if s == 1:
                    break
                low = 1 / weights.square().sum(1, keepdim=True) < n / 2
                pick = torch.where(low, systematic(weights, n), torch.arange(n, device=x.device))
                paid = torch.where(low, q.gather(1, pick), paid)
                a, e = (take(each.unflatten(0, q.shape), pick).flatten(0, 1) for each in (a, e))
            r = t * (1 - s) / (s * (1 - t))
            x = s * a + (1 - s) * (r * e + (1 - r**2) ** 0.5 * fresh(field, e))
        report_step()
        lost = q.amax(1) == -torch.inf
        report_fallbacks(lost)
        pick = torch.where(lost, 0, systematic(weights, 1)[:, 0])
        return take(clip_actions(a, bounds).unflatten(0, q.shape), pick)


def systematic(weights: Float[Tensor, "B n"], m: int) -> Int[Tensor, "B m"]:
    """Return m candidates, each as often as its share of the weights, rounded up or down."""
    edges = weights.cumsum(1)
    total = edges[:, -1:]
    start = draw(lambda: uniform((len(edges), 1), edges))
    points = (torch.arange(m, device=edges.device) + start) / m * total
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(edges, torch.minimum(points, below), right=True)

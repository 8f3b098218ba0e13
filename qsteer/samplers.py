"""Samplers: how a field, steered or not, becomes an action.

The caller's noise is candidate 0 of every sampler, further candidates come from torch's global generator:
with one candidate a selecting sampler is its inner sampler, bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from qsteer.checks import check_clip, check_count, check_function, unwrap_numbers
from qsteer.flow import FunctionJump, ask, ask_members, clip_actions, finite_rows
from qsteer.maps.flow_maps import EulerMap, FlowMap
from qsteer.maps.losses import fmq_target, trust_radius
from qsteer.randomness import integers
from qsteer.rules.guidance import gradient
from qsteer.trace import report_fallbacks, report_step
from qsteer.types import Clip, Field, Jump, Rule, Sampler, Value, clip_of


@dataclass(frozen=True)
class Euler(Sampler):
    """Forward Euler from noise to action, on the host's own step grid.

    Cost: ``steps`` velocity forwards.

    Args:
        steps: number of steps; None: the field's own number (a host's configuration, 10 on a bare field).
        clip: bounds of the finished action; None: no clipping, as hosts do; ``"policy"``: the policy's own
            bounds (:attr:`qsteer.types.Field.bounds`).

    Raises:
        ValueError: fewer than one step, or bounds out of order.
    """

    steps: int | None = None
    clip: Clip = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        check_count(self, "steps")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}; pi0 uses 10, GR00T 4")
        check_clip(self.clip)

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Integrate the field from ``noise``."""
        field, x = field.chain(self.steps), noise
        for t, dt in field.clock.grid(self.steps):
            report_step()
            x = field.advance(x, field(x, t), t, dt)
        report_step()
        return clip_actions(x, clip_of(self.clip, field))


@dataclass(frozen=True)
class _OfN(Sampler):
    """What best-of-n and random-of-n share."""

    n: int
    inner: Sampler = attribute(default_factory=Euler)

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        check_count(self, "n")
        check_inner(self, self.inner)
        if self.n < 1:
            raise ValueError(f"{type(self).__name__}: expected n of at least 1 candidate, got {self.n}")


@dataclass(frozen=True)
class BestOfN(_OfN):
    """The best of n candidates by value. All run as one batch on one prefix.

    Non-finite values never win; a row without any finite value keeps candidate 0 and counts as a fallback.

    Cost: that of ``inner`` on n rows per observation, and 1 critic forward on n rows.

    Args:
        n: candidates per observation.
        inner: makes each candidate.

    Raises:
        ValueError: fewer than one candidate.
    """

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the candidate with the highest value."""
        if self.n == 1:
            return self.inner(field, value, noise)
        value, n = needed(value, self), self.n
        noise = rearrange(candidates(field, noise, n), "b n h a -> (b n) h a")
        a = self.inner(field.repeat(n), value.repeat(n), noise)
        return best(a, scores(value, a, n))


@dataclass(frozen=True)
class RandomOfN(_OfN):
    """Control arm of best-of-n: one of the same n candidates, at random.

    A gain it shares is no gain of the critic's. Only the drawn candidate is integrated.

    Cost: that of ``inner``.

    Args:
        n: candidates per observation.
        inner: makes the candidate.

    Raises:
        ValueError: fewer than one candidate.
    """

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return a random candidate."""
        if self.n == 1:
            return self.inner(field, value, noise)
        pool = candidates(field, noise, self.n)
        pick = draw(lambda: integers(self.n, len(noise), noise.device))
        return self.inner(field, value, take(pool, pick))


@dataclass(frozen=True)
class TrustRegion(Sampler):
    """FMQ's closed-form projection on a finished action: ``a + eta_eff * g / ||g||`` (FMQ eq. 11 to 13).

    ``a + eta g / ||g||`` maximises the linearised value in a ball of radius eta around the policy's action;
    beta > 0 shrinks the ball where the ensemble disagrees. The moved action is not clipped again.

    Cost: that of ``inner``, and 1 critic forward and backward (one more forward when beta > 0).

    Args:
        eta: radius, in the norm of the whole chunk (over the entries which the critic sees).
        beta: shrinkage by disagreement, see :func:`qsteer.maps.trust_radius`.
        inner: makes the action.
        typical: disagreement that counts as 1, for example its mean over the data; None: the batch's mean,
            under which one observation alone always shrinks to ``eta / (1 + beta)``.

    Raises:
        ValueError: a negative radius or shrinkage.
    """

    eta: float = 0.3
    beta: float = 0.0
    inner: Sampler = attribute(default_factory=Euler)
    typical: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        check_inner(self, self.inner)
        if not (0 <= self.eta < float("inf") and 0 <= self.beta < float("inf")):
            raise ValueError(f"eta, beta: expected finite numbers of at least 0, got {self.eta}, {self.beta}")

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the projected action; rows without a finite gradient keep the action."""
        value = needed(value, self)
        a = self.inner(field, value, noise)
        return project(a, value, self.eta, self.beta, self.typical)


@dataclass(frozen=True)
class BeamSearch(Sampler):
    """Q-guided beam search: renoise, complete in branches, keep the best, climb (FMQ, Algorithm 2).

    M particles; each of K rounds takes every particle back to ``t' = snr / (1 + snr)`` B times with fresh
    noise, completes the M B branches, keeps the M of highest value and moves each by eta along the critic's
    gradient. The best particle is returned. Without a round, the M particles are moved once: with one
    particle that is :class:`TrustRegion`, with eta = 0 it is :class:`BestOfN`.

    A rule bends the completions of a policy without a flow map; a flow map jumps as it was trained.

    Cost: ``M (1 + K B)`` rows through the flow map. Without one: M rows through ``inner`` and ``M K B``
    through ``ceil((1 - t') steps)`` of its Euler steps. Critic: K + 1 forwards on M B and M rows, max(K, 1)
    forwards and backwards on M rows.

    Args:
        particles: M.
        branches: B per particle and round.
        rounds: K.
        snr: signal-to-noise ratio of the renoised particles; 1.5 goes back to t' = 0.6.
        eta: norm of the move, over the whole chunk.
        flow_map: the jump (x, r, t) -> x_t on rows: a :class:`qsteer.maps.FlowMap`, or any function; None:
            the policy's own integration.
        inner: makes the first particles where there is no flow map.
        completion: steps and clip of every other completion, and clip of a flow map's jumps; None: those of
            ``inner`` if it is an :class:`Euler`.

    Raises:
        ValueError: a number is out of its range.
        TypeError: there is no flow map, ``inner`` is no :class:`Euler` and ``completion`` is not given; or
            the flow map is of another kind.
    """

    particles: int = 4
    branches: int = 4
    rounds: int = 1
    snr: float = 1.5
    eta: float = 0.3
    flow_map: Jump | FlowMap | Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    inner: Sampler = attribute(default_factory=Euler)
    completion: Euler | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        check_count(self, "particles", "branches", "rounds")
        check_inner(self, self.inner)
        if min(self.particles, self.branches, self.rounds + 1) < 1:
            raise ValueError(
                f"particles, branches, rounds: expected at least 1, 1, 0, got {self.particles}, "
                f"{self.branches}, {self.rounds}"
            )
        if not (0 < self.snr < float("inf") and 0 <= self.eta < float("inf")):
            raise ValueError(
                f"snr, eta: expected a positive number and one of at least 0, got {self.snr}, {self.eta}"
            )
        if self.completion is None and self.flow_map is None and not isinstance(self.inner, Euler):
            raise TypeError(
                f"completion: expected the steps and the clip of completions beside {self.inner}, got None; "
                "pass completion=Euler(...)"
            )
        if self.flow_map is not None and not isinstance(self.flow_map, Jump | FlowMap):
            check_function("flow_map", self.flow_map, "qsteer.maps.FlowMap", "qsteer.types.Jump")

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the best particle."""
        value, m, n = needed(value, self), self.particles, self.particles * self.branches
        t = self.snr / (1 + self.snr)
        jump, bounds = self._jump(field), clip_of(self._completion.clip, field)
        a = rearrange(candidates(field, noise, m), "b m h a -> (b m) h a")
        if self.flow_map is None:
            a = self.inner(field.repeat(m), value.repeat(m), a)
        else:
            a = clip_actions(jump.repeat(m)(a, 0.0, 1.0), bounds)
        for _ in range(self.rounds):
            a = a.repeat_interleave(self.branches, 0)
            a = clip_actions(jump.repeat(n)(t * a + (1 - t) * fresh(field, a), t, 1.0), bounds)
            kept = scores(value, a, n).topk(m, 1).indices
            a = project(
                take(rearrange(a, "(b n) h a -> b n h a", n=n), kept).flatten(0, 1), value.repeat(m), self.eta
            )
        if not self.rounds:
            a = project(a, value.repeat(m), self.eta)
        return best(a, scores(value, a, m))

    @property
    def _completion(self) -> Euler:
        if self.completion is not None:
            return self.completion
        return self.inner if isinstance(self.inner, Euler) else Euler()

    def _jump(self, field: Field) -> Jump:
        """Return the flow map for the observations; without one, the policy's own integration."""
        if self.flow_map is None:
            return EulerMap(field, self._completion.steps)
        check_free(field, self, "a flow map", "leave flow_map out")
        if isinstance(self.flow_map, Jump | FlowMap):
            return self.flow_map.on(field.base)
        return FunctionJump(self.flow_map)


@dataclass(frozen=True)
class KeepBest(Sampler):
    """Guard: the steered action, unless the same sampler on the unsteered field finds one of higher value.

    Both start from the caller's noise and see the same candidates. It catches pushes that fail by the
    critic's own measure, which are rare; it cannot catch exploitation of the critic, whose mark is a higher
    value.

    Cost: that of ``inner`` twice, steered and not, and 2 critic forwards.

    Args:
        inner: makes both actions.
    """

    inner: Sampler = attribute(default_factory=Euler)

    def __post_init__(self) -> None:
        """Check the argument."""
        check_inner(self, self.inner)

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the better of the two actions."""
        value = needed(value, self)
        draws = Draws()
        with draws.recorded():
            steered = self.inner(field, value, noise)
        with draws.replayed():
            base = self.inner(field.base, value, noise)
        q, q_base = ask(value, steered), ask(value, base)
        better = torch.isfinite(q) & ~(torch.isfinite(q_base) & (q_base > q))
        report_fallbacks(~torch.isfinite(q))
        return torch.where(better[:, None, None], steered, base)


def check_inner(sampler: Sampler, inner: Any) -> None:
    """Raise TypeError unless ``inner`` makes actions: a sampler, or a function like one."""
    if isinstance(inner, Rule | type) or not callable(inner):
        raise TypeError(
            f"{type(sampler).__name__}: expected inner to be a sampler such as Euler(), got {inner!r}; a "
            "rule goes in the rule's place: steer(policy, critic, rule, sampler=...)"
        )


def check_free(field: Field, sampler: Sampler, steps: str, remedy: str) -> None:
    """Raise ValueError if real-time chunking holds the field's chunk to the former one."""
    if field.base.held:
        raise ValueError(
            f"{type(sampler).__name__}: expected Euler's steps, which real-time chunking holds to the former "
            f"chunk, got {steps}, which it cannot; {remedy}"
        )


class Draws:
    """What samplers drew, to be given to them again: of two runs, each draw is made once."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what samplers draw in the block."""
        outer = _draws.get()
        token = _draws.set(lambda make: self._keep(make() if outer is None else outer(make)))
        try:
            yield
        finally:
            _draws.reset(token)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Give samplers in the block what was kept, in the same order."""
        rest = iter(self._kept)
        token = _draws.set(lambda make: next(rest))
        try:
            yield
        finally:
            _draws.reset(token)

    def _keep(self, drawn: Tensor) -> Tensor:
        self._kept.append(drawn)
        return drawn


_draws: ContextVar[Callable[[Callable[[], Tensor]], Tensor] | None] = ContextVar("qsteer_draws", default=None)
"""What stands between samplers and torch's generator."""


def draw(make: Callable[[], Tensor]) -> Tensor:
    """Return what ``make`` draws, or what it drew before, see :class:`Draws`."""
    given = _draws.get()
    return make() if given is None else given(make)


def fresh(field: Field, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
    """Return fresh noise for each row."""
    return draw(lambda: field.base.draws(a, 1)[:, 0])


def candidates(field: Field, noise: Float[Tensor, "B H A"], n: int) -> Float[Tensor, "B n H A"]:
    """Return the caller's noise and n - 1 fresh draws per observation."""
    return torch.cat([noise[:, None], draw(lambda: field.base.draws(noise, n - 1))], dim=1)


def take(a: Float[Tensor, "B n H A"], pick: Tensor) -> Tensor:
    """Return candidate ``pick[b]`` of each observation b, or several: ``pick[b, m]``."""
    row = torch.arange(len(a), device=a.device)
    return a[row if pick.ndim == 1 else row[:, None], pick]


def best(a: Float[Tensor, "Bn H A"], q: Float[Tensor, "B n"]) -> Float[Tensor, "B H A"]:
    """Return the candidate of the highest value; without a finite value, candidate 0."""
    lost = q.amax(1) == -torch.inf
    report_fallbacks(lost)
    return take(a.unflatten(0, q.shape), torch.where(lost, 0, q.argmax(1)))


def scores(value: Value, a: Float[Tensor, "Bn H A"], n: int) -> Float[Tensor, "B n"]:
    """Return the values of n candidates per observation; those that are not finite count as the lowest."""
    q = rearrange(ask(value.repeat(n), a), "(b n) -> b n", n=n)
    return torch.where(torch.isfinite(q), q, -torch.inf)


def project(
    a: Float[Tensor, "B H A"], value: Value, eta: float, beta: float = 0.0, typical: float | None = None
) -> Float[Tensor, "B H A"]:
    """Move finished actions by ``eta_eff g / ||g||``; rows without a finite gradient stay."""
    if eta == 0:
        return a
    with torch.enable_grad():
        x = a.detach().requires_grad_()
        q = ask(value, x)
        g = gradient(q, x)
    if value.mask is not None:
        g = torch.where(value.mask.bool(), g, 0.0)
    members = ask_members(value, a) if beta else torch.zeros_like(a[None, :, 0, 0])
    moved = fmq_target(a, g, trust_radius(eta, members, beta, typical), kappa=0.0)
    finite = finite_rows(moved) & torch.isfinite(q)
    report_fallbacks(~finite)
    return torch.where(finite[:, None, None], moved, a)


def needed(value: Value | None, sampler: Sampler) -> Value:
    """Return the value, or say that the sampler cannot do without."""
    if value is None:
        raise ValueError(
            f"{type(sampler).__name__}: expected a value to select by, got None; pass critic.bind(obs) or "
            "qsteer.value(fn)"
        )
    return value

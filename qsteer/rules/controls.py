"""Baselines, which are known to be worse, and control arms: what guidance gains without its estimate."""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as attribute
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import Chain, Time
from qsteer.flow import ask, clip_through, denoise
from qsteer.randomness import normal
from qsteer.rules.guidance import EDGE, Ascent, Estimate, Guidance, Steered, gradient
from qsteer.rules.strength import Strength
from qsteer.types import Field, Rule, Value


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

    def ascent(self, field: Field, value: Value, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Differentiate the value at x."""
        with torch.no_grad():
            v = field(x, t)
        x = x.requires_grad_()
        a = clip_through(x, self.bounds(field))
        q = ask(value, a)
        return Ascent(v, gradient(q, x), q, a)


@dataclass(frozen=True)
class ThroughTime(Guidance):
    """Baseline (BPTT): the gradient of the value of the finished action, through the rest of the Euler chain.

    Cost: at step i of K, K - i velocity forwards and backwards, 1 critic forward and backward.

    Args:
        alpha: norm of the guidance relative to the velocity's.
        steps: K of the whole chain; None: the sampler's.
    """

    alpha: Strength = 0.2
    steps: int | None = None

    @property
    def strength(self) -> Strength:
        """``alpha``."""
        return self.alpha

    def begin(self, field: Field, value: Value, chain: Chain) -> Estimate:
        """Return :meth:`ascent` along the sampler's own chain."""
        return partial(self.ascent, field, value, chain=chain)

    def ascent(
        self,
        field: Field,
        value: Value,
        x: Float[Tensor, "B H A"],
        t: Time,
        chain: Chain | None = None,
    ) -> Ascent:
        """Differentiate the value of the chain's end with respect to x."""
        if isinstance(t, Tensor) and t.unique().numel() > 1:
            raise ValueError(
                "ThroughTime: expected rows at one time, whose chain ends together, got several; ask for "
                "each time apart"
            )
        now = float(t[0]) if isinstance(t, Tensor) else t
        if self.steps is not None or chain is None:
            chain = Chain(0.0, 1 / (self.steps or field.clock.steps))
        rest = chain.rest(now, field.clock)
        if not rest or abs(rest[0][0] - now) > EDGE:
            raise ValueError(
                f"ThroughTime: expected the chain's own number of steps, got t = {now:.3f} off the "
                f"grid of steps={self.steps}; give ThroughTime(steps=...) the sampler's"
            )
        x = x.requires_grad_()
        v = field(x, t)
        a = field.advance(x, v, *rest[0])
        for s, dt in rest[1:]:
            a = field.advance(a, field(a, s), s, dt)
        a = clip_through(a, self.bounds(field))
        q = ask(value, a)
        return Ascent(v, gradient(q, x), q, a)


class RandomStream:
    """Normal numbers from generators of its own, one per device, all of one seed.

    A caller's noise of the same seed is other noise.
    """

    SALT = 0x5EED5EED

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def normal(self, like: Tensor) -> Tensor:
        """Return the stream's next numbers, as many as ``like`` has."""
        (generator,) = self.generators(like.device)
        return normal(like.shape, like, generator=generator)

    def chain(self, redraw: bool) -> Callable[[Tensor], Tensor]:
        """Return the directions of one chain: the same at each step, or drawn anew."""
        drawn: list[Tensor] = []

        def direction(like: Tensor) -> Tensor:
            if redraw or not drawn or drawn[-1].shape != like.shape:
                drawn[:] = [self.normal(like)]
            return drawn[-1]

        return direction

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """Return the generator of a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.SALT + self.seed)
        return [self._generators[device]]


@dataclass(frozen=True)
class RandomDirection(Guidance):
    """Control arm: a random direction of the same norm. A gain it shares is no gain of the critic's.

    Each row keeps one direction for its whole chain: as a critic that is systematically wrong would push.
    Pushes redrawn at each step cancel in part, and end nearer to the policy's own action.

    It controls rules in the matched norm, and guides the steps that Tweedie guides; :class:`Randomized`
    controls any. Directions come from a generator of the rule's own, so the caller's noise is the same as in
    every other arm.

    Cost: 1 velocity forward.

    Args:
        alpha: norm of the guidance relative to the velocity's.
        seed: seed of the directions.
        redraw: draw a new direction at each step.
    """

    alpha: float = 0.2
    seed: int = 0
    redraw: bool = False
    _directions: RandomStream = attribute(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        object.__setattr__(self, "_directions", RandomStream(self.seed))
        if self.auto is not None:
            raise ValueError(
                f"RandomDirection: expected a number as strength, got {self.alpha!r}: it asks no critic; for "
                "the control of an automatic strength use qsteer.Randomized(rule)"
            )

    @property
    def strength(self) -> float:
        """``alpha``."""
        return self.alpha

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """Return the generator of the directions."""
        return self._directions.generators(device)

    def begin(self, field: Field, value: Value, chain: Chain) -> Estimate:
        """Return :meth:`ascent` along one chain's directions."""
        return partial(self.ascent, field, value, direction=self._directions.chain(self.redraw))

    def ascent(
        self,
        field: Field,
        value: Value,
        x: Float[Tensor, "B H A"],
        t: Time,
        direction: Callable[[Tensor], Tensor] | None = None,
    ) -> Ascent:
        """Take the chain's direction; without a chain, draw one."""
        with torch.no_grad():
            v, g = field(x, t), (direction or self._directions.normal)(x)
        return Ascent(v, g, torch.zeros_like(x[:, 0, 0]), clip_through(denoise(x, v, t), self.bounds(field)))


@dataclass(frozen=True)
class Randomized(Rule):
    """Control arm of any guidance: it pushes as far, at the same steps, in a random direction.

    Each push has the norm that ``rule`` would have given it there, whatever its scaling: raw weights and
    automatic strengths too. Directions are as for :class:`RandomDirection`.

    Cost: that of ``rule``.

    Args:
        rule: the guidance to control for.
        seed: seed of the directions.
        redraw: draw a new direction at each step.

    Raises:
        TypeError: ``rule`` is no guidance.
    """

    rule: Guidance
    seed: int = 0
    redraw: bool = False
    _directions: RandomStream = attribute(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "_directions", RandomStream(self.seed))
        if not isinstance(self.rule, Guidance):
            raise TypeError(
                f"Randomized: expected a guidance rule such as Tweedie(), got {type(self.rule).__name__}"
            )

    def __call__(self, field: Field, value: Value) -> Field:
        """Return the field pushed at random."""
        steered = self.rule(field, value)
        if not isinstance(steered, Steered):
            return steered
        return steered.randomized(partial(self._directions.chain, self.redraw))

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """Return those of ``rule``, and that of the directions."""
        return self.rule.generators(device) + self._directions.generators(device)

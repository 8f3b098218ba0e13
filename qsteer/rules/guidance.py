"""What every guidance rule is made of: an estimate of the ascent, a strength, a window; a steered field."""

import os
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsteer.checks import check_clip, unwrap_numbers
from qsteer.clock import PAPER, Chain, Clock, Time
from qsteer.flow import (
    ask,
    ask_members,
    clip_actions,
    denoise,
    expand_time,
    factor,
    finite_rows,
    hypot,
    nonzero,
    norm,
    spread,
    times,
)
from qsteer.rules.strength import Auto, Scaling, Strength, improvements, scale
from qsteer.trace import Step, find_recorder, report_fallbacks, report_gated
from qsteer.types import Bounds, Clip, Field, Rule, Value, clip_of

EDGE = 1e-6
"""A host's float32 time may miss a window's edge by an ulp."""


class Ascent(NamedTuple):
    """What an estimate found at one step, one row per row of x."""

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

    def detach(self) -> "Ascent":
        """Return the same without graphs."""
        v, g, q, a, in_action = self
        in_action = None if in_action is None else in_action.detach()
        return Ascent(v.detach(), g.detach(), q.detach(), a.detach(), in_action)


type Estimate = Callable[[Tensor, Time], Ascent]
"""``(x, t) ->`` what was found there: :meth:`Guidance.ascent` for one chain."""


@dataclass(frozen=True)
class Guidance(Rule):
    """A rule of the form ``v <- v + strength * scale * g``; subclasses say what g is.

    A strength is a number, or ``"auto"``, which is ``Auto()``: chosen by the critic for each row and step.

    Args:
        scaling: ``match_norm``: g is rescaled to the velocity's norm (QPILOTS eq. 17); ``clip_norm``: the
            same, but never scaled up; ``raw``: g as it is; ``sigma``: g times
            ``sigma_t^2 / 2 = clamp(1/t - 1, 0, 25)``, the exactly steered ODE when g is the exact gradient of
            V_t. Norms are per row, over the entries which the critic sees.
        clip: bounds of the clean action at which the critic is asked, with a straight-through gradient;
            ``"policy"``: the policy's own (:attr:`qsteer.types.Field.bounds`); None: no clip.
        start: first guided time, inclusive.
        stop: last guided time, inclusive.
        every: guide the first step in the window and every ``every``-th from there, with the same strength:
            another method, at about 1/``every`` of the cost. Steps are those of the sampler.

    Raises:
        ValueError: an argument is out of its range.
    """

    _: KW_ONLY
    scaling: Scaling = "match_norm"
    clip: Clip = "policy"
    start: float = 0.0
    stop: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        unwrap_numbers(self)
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling: expected one of {', '.join(get_args(Scaling))}, got {self.scaling!r}")
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(
                f"start, stop: expected 0 <= start <= stop <= 1 in paper time (0 is noise), got "
                f"{self.start}, {self.stop}"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected an int of at least 1, got {self.every!r}; 1 guides every step")
        check_clip(self.clip)
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

    def bounds(self, field: Field) -> Bounds:
        """Return the bounds of the clean action at which the critic is asked."""
        return clip_of(self.clip, field)

    @property
    def at_noise(self) -> bool:
        """Whether t = 0 is guided too. There D(x, 0) is the mean action, whatever x is."""
        return False

    @abstractmethod
    def ascent(self, field: Field, value: Value, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Return the base velocity at (x, t) and the direction of ascent.

        Called with gradients enabled, on an x that requires none and that nothing else refers to.
        """

    def on(self, field: Field) -> "Guidance":
        """Return the rule for this field's observations; a rule that carries a learnt map binds it, once."""
        return self

    def repeat(self, k: int) -> "Guidance":
        """Return a rule that is bound, for ``k`` rows per observation."""
        return self

    def begin(self, field: Field, value: Value, chain: Chain) -> Estimate:
        """Return :meth:`ascent` for one Euler chain.

        A rule that remembers something of a chain, or looks ahead along it, overrides this.
        """
        return partial(self.ascent, field, value)

    def __call__(self, field: Field, value: Value) -> Field:
        """Return the steered field; of strength 0 it is ``field`` itself, bit for bit and at no cost."""
        return Steered(self.on(field.free), field, value) if self.strength else field

    def guides(
        self, t: Time, steps: int = PAPER.steps, chain: Chain | None = None
    ) -> bool | Bool[Tensor, "B"]:
        """Return whether ``t`` is guided, or which rows are; ``every`` counts the steps of the chain.

        Args:
            t: time.
            steps: of a chain from 0 to 1.
            chain: another chain; None: that of ``steps``.
        """
        inside = (t >= self.start - EDGE) & (t <= self.stop + EDGE)
        if not self.at_noise:
            inside = inside & (t > 0)
        if self.every == 1:
            return inside
        chain = chain or Chain(0.0, 1 / steps)
        first = chain.first(self.start - EDGE if self.at_noise else max(self.start - EDGE, EDGE))
        return inside & ((chain.index(t) - first) % self.every == 0)

    def scale(self, v_norm: Float[Tensor, "B"], g_norm: Float[Tensor, "B"], t: Time) -> Float[Tensor, "B"]:
        """Return the factor of the direction for each row; an automatic strength counts as 1."""
        strength = self.strength if isinstance(self.strength, float | int) else 1.0
        return scale(self.scaling, strength, v_norm, g_norm, t)


@dataclass(frozen=True)
class Steered(Field):
    """The field a guidance rule makes: at each guided time, the velocity bent in six steps.

    Attributes:
        rule: bound to the observations.
        field: the velocity that it bends.
        value: what it follows.
        steps: of a chain from 0 to 1; None: the clock's number.
        part: the chain that this field is for; None: that one.
        sign: 1 uphill, -1 downhill.
        limit: see :class:`~qsteer.Gated`; inf: nothing is gated.
        directions: makes one chain's random directions, see :class:`~qsteer.Randomized`; None: there are
            none.
    """

    rule: Guidance
    field: Field
    value: Value
    steps: int | None = None
    part: Chain | None = None
    sign: int = 1
    limit: float = float("inf")
    directions: Callable[[], Callable[[Tensor], Tensor]] | None = None

    def __call__(self, x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Return the guided velocity; rows where anything is not finite keep the base velocity."""
        t = t if isinstance(t, Tensor) else float(t)
        guided = self.rule.guides(t, self.clock.steps, self.part)
        if not (guided.any() if isinstance(guided, Tensor) else guided):
            return self.field(x, t)
        x = x.detach()
        found = self.ascend(x, t)
        norms = norm(self.seen(found.velocity)), norm(found.gradient)
        push = self.turn(self.push(found, norms, x, t))
        guided = self.keep_finite(guided, found, push)
        guided = self.keep_sure(guided, found, push, x, t)
        self.record(guided, found, push, norms, t)
        base = self.field.hold(found.velocity, x, t)
        return torch.where(guided[:, None, None], base + push, base)

    def ascend(self, x: Float[Tensor, "B H A"], t: Time) -> Ascent:
        """Step 1: return velocity and direction of ascent; entries which the critic does not see get none."""
        with torch.enable_grad():
            found = self.estimate(x.detach(), t).detach()
        return found._replace(gradient=self.seen(found.gradient))

    def push(
        self, found: Ascent, norms: tuple[Tensor, Tensor], x: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "B H A"]:
        """Step 2: return the direction, scaled; an automatic strength is chosen along it."""
        v_norm, g_norm = norms
        push = times(self.rule.scale(v_norm, g_norm, t), found.gradient)
        if (auto := self.rule.auto) is None:
            return push
        start, ray = denoise(x, found.velocity, t), factor(1 - t, x) * push
        if found.action_gradient is None:
            deviations = expand_time(hypot(1 - t, t), x).to(x.dtype) * v_norm
        else:
            unit = times(1 / nonzero(g_norm), found.gradient)
            slope = torch.where(unit == 0, 0.0, unit * found.action_gradient).flatten(1).sum(1).clamp(min=0)
            deviations = (expand_time(t, x).to(x.dtype) * slope / nonzero(g_norm)).sqrt() * v_norm
        return factor(auto.choose(self.value, start, ray, deviations, self.rule.bounds(self.field)), x) * push

    def turn(self, push: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Step 3: return the push uphill, downhill, or as far in a random direction."""
        if self.directions is None:
            return self.sign * push
        direction = self.seen(self.direction(push))
        return times(norm(push) / norm(direction), direction)

    def keep_finite(
        self, guided: bool | Tensor, found: Ascent, push: Float[Tensor, "B H A"]
    ) -> Bool[Tensor, "B"]:
        """Step 4: guide only rows where everything is finite; others fall back, and are counted."""
        finite = finite_rows(found.velocity + push) & torch.isfinite(found.value)
        report_fallbacks(~finite & guided)
        return finite & guided

    def keep_sure(
        self,
        guided: Bool[Tensor, "B"],
        found: Ascent,
        push: Float[Tensor, "B H A"],
        x: Float[Tensor, "B H A"],
        t: Time,
    ) -> Bool[Tensor, "B"]:
        """Step 5: guide only rows where the members agree on the gain, see :class:`~qsteer.Gated`."""
        if self.limit == float("inf"):
            return guided
        ends = torch.stack([denoise(x, w, t) for w in (found.velocity, found.velocity + push)])
        gain = improvements(self.value, clip_actions(ends, self.rule.bounds(self.field)))[:, 1]
        sure = spread(gain) <= self.limit * gain.mean(0).abs()
        report_gated(guided & ~sure)
        return guided & sure

    def record(
        self,
        guided: Bool[Tensor, "B"],
        found: Ascent,
        push: Float[Tensor, "B H A"],
        norms: tuple[Tensor, Tensor],
        t: Time,
    ) -> None:
        """Step 6: report the step, if a trace has asked for steps."""
        if (steps := find_recorder()) is None:
            return
        v_norm, g_norm = norms
        members = ask_members(self.value, found.action).detach()
        stats = norm(push) / v_norm, g_norm, members.mean(0), members.std(0, unbiased=False)
        nan = torch.full_like(found.value, torch.nan)
        steps.append(Step(t, *(torch.where(guided, s, nan) for s in stats)))

    def seen(self, x: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Return ``x`` with zeros on the entries which the critic does not see, in part where it is held."""
        mask = self.value.mask
        return x if mask is None else torch.where(mask.bool(), mask.to(x.dtype) * x, 0.0)

    @cached_property
    def estimate(self) -> Estimate:
        """The rule's estimate of the ascent, and whatever it remembers of this chain."""
        return self.rule.begin(self.field.free, self.value, self.part or Chain(0.0, 1 / self.clock.steps))

    @cached_property
    def direction(self) -> Callable[[Tensor], Tensor]:
        """This chain's random directions."""
        assert self.directions is not None
        return self.directions()

    def negated(self) -> "Steered":
        """Return the field steered in the opposite direction."""
        return replace(self, sign=-self.sign)

    def randomized(self, directions: Callable[[], Callable[[Tensor], Tensor]]) -> "Steered":
        """Return the field pushed as far in random directions."""
        return replace(self, directions=directions)

    def gated(self, limit: float) -> "Steered":
        """Return the field steered where the members agree, see :class:`~qsteer.Gated`."""
        return replace(self, limit=limit)

    def chain(self, steps: int | None, part: Chain | None = None) -> "Steered":
        """Return the steered field for one chain of ``steps`` steps; what a rule remembers begins anew.

        Warns once for each rule and number of steps if it guides none of them.
        """
        steps = self.steps if steps is None else steps
        chain = replace(self, field=self.field.chain(steps, part), steps=steps, part=part)
        if part is None and not any(self.rule.guides(t, chain.clock.steps) for t, _ in chain.clock.grid()):
            warnings.warn(
                f"{type(self.rule).__name__}: expected at least one guided step, got none of "
                f"{chain.clock.steps}: the policy acts unsteered; widen start, stop and every, or take more "
                "steps (t = 0 is left alone, except by QGF)",
                RuntimeWarning,
                skip_file_prefixes=(os.path.dirname(os.path.dirname(__file__)),),
            )
        return chain

    def advance(
        self, x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time, dt: Time
    ) -> Float[Tensor, "B H A"]:
        """Return the state after a step of the policy's kind by the velocity ``v``."""
        return self.field.advance(x, v, t, dt)

    def repeat(self, k: int) -> "Steered":
        """Return the steered field for ``k`` rows per observation; nothing is encoded again."""
        return replace(self, rule=self.rule.repeat(k), field=self.field.repeat(k), value=self.value.repeat(k))

    @property
    def base(self) -> Field:
        """The field before any rule."""
        return self.field.base

    @property
    def clock(self) -> Clock:  # type: ignore[override]
        """The field's clock, with the steps of the chain."""
        clock = self.field.clock
        return clock if self.steps is None else replace(clock, steps=self.steps)

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]
        """The field's bounds."""
        return self.field.bounds

    @property
    def features(self) -> Any:
        """The field's features."""
        return self.field.features

    @property
    def dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """What the field computes in."""
        return self.field.dtype


def gradient(q: Float[Tensor, "B"], x: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
    """Return the gradient of each row's value with respect to its row of x, and to nothing else."""
    found = torch.autograd.grad(q.sum(), x, allow_unused=True)[0] if q.requires_grad else None
    if found is None:
        raise ValueError(
            "value: expected a score that is differentiable in the action, got one without a gradient; "
            "compute it in torch without detach() or no_grad(), or "
            "select with qsteer.BestOfN, which needs no gradient"
        )
    return found


def at_denoised(
    value: Value, x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time, bounds: Bounds
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B H A"], Float[Tensor, "B H A"]]:
    """Return the value of the denoised action, that action, and the value's gradient in it."""
    a = clip_actions(denoise(x, v, t), bounds).detach().requires_grad_()
    q = ask(value, a)
    return q, a, gradient(q, a)

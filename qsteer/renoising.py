"""Policies that predict the clean action and put it back on the path from the noise where their chain began.

Let ``a(x, t)`` be the prediction and ``e`` the chain's noise. Such a loop goes from t to s by
``(1 - s) e + s a(x, t)``. Euler's method on the velocity ``(a - x) / (1 - t)`` goes to
``(1 - s) e' + s a(x, t)``, where ``e' = (x - t a) / (1 - t)`` is the noise that this prediction implies. They
agree in the first step, in the last, and where the prediction stays as it was: the loop is no Euler chain of
a field of x and t, for it knows e. So the velocity is what rules bend, D(x, t) = a(x, t) is where they ask
the critic, and a step renoises the bent prediction ``a + (1 - t) push``.

Pushes do not add up along such a chain: one step's reaches the next through what the policy predicts there,
and only the last one's, of weight 1 / K, reaches the action itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import Clock, Time
from qsteer.flow import denoise
from qsteer.types import Value


class Prediction(NamedTuple):
    """What a policy predicted."""

    t: float
    x: Float[Tensor, "B H A"]
    velocity: Float[Tensor, "B H A"]
    action: Float[Tensor, "B H A"]


class Renoising:
    """What one chain remembers: where it began, and what was predicted where it is.

    Args:
        clock: of the policy.
        steps: of the chain; None: the clock's number.
    """

    def __init__(self, clock: Clock, steps: int | None) -> None:
        times = [t for t, _ in clock.grid(steps)]
        self._following = dict(zip(times, [*times[1:], 1.0], strict=True))
        self._noise: Tensor | None = None
        self._predicted: Prediction | None = None

    def remember(self, x: Tensor, t: Time, velocity: Tensor, action: Tensor) -> None:
        """Keep the first prediction at each time."""
        if isinstance(t, float | int) and (self._predicted is None or self._predicted.t != t):
            self._predicted = Prediction(t, x.detach(), velocity.detach(), action.detach())

    def step(
        self, x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "B H A"] | None:
        """Return the state at the chain's next time; None: the chain did not begin at noise, or t is not its.

        Entries whose velocity is what was predicted end, without gradients, bit for bit where the host's do.
        """
        if isinstance(t, Tensor) or t not in self._following:
            return None
        if t == 0:
            self._noise = x
        if self._noise is None:
            return None
        action, made = denoise(x, v, t), self._predicted
        if made is not None and made.t == t and made.x.shape == x.shape and not torch.is_grad_enabled():
            action = torch.where((v == made.velocity) & (x == made.x), made.action, action)
        if (following := self._following[t]) == 1:
            return action
        left = action.new_full((), 1 - following)  # rounded as the host's own time
        return self._noise * left + action * (1 - left)


@dataclass(frozen=True)
class DecodedValue(Value):
    """The value of what is executed, where that is a function of the policy's chunk.

    Attributes:
        value: of what is executed.
        decode: ``chunk -> what is executed``, differentiable.
    """

    value: Value
    decode: Callable[[Tensor], Tensor]

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        """The value's mask."""
        return self.value.mask

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the value of each chunk."""
        return self.value(self.decode(a))

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return what each ensemble member says."""
        return self.value.members(self.decode(a))

    def repeat(self, k: int) -> "DecodedValue":
        """Return the value for ``k`` rows per observation."""
        return replace(self, value=self.value.repeat(k))

"""The contracts everything else is written in.

A policy is a velocity field. A rule turns a field and a value into a steered field. A sampler turns a field
into an action. Times are paper times everywhere above :mod:`qsteer.clock`: ``t = 0`` is noise, ``t = 1`` is
the action.

Shapes: ``B`` rows (observations, or candidates of observations), ``H`` steps of an action chunk, ``A`` action
dimensions, ``J`` members of a critic ensemble.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import PAPER, Chain, Clock, Time
from qsteer.randomness import normal

type Bounds = tuple[float, float] | None
"""Lowest and highest entry of a clean action in model space; None: it has no bounds."""
type Clip = Bounds | Literal["policy"]
"""Bounds to clip to; ``"policy"``: those of the field, see :func:`clip_of`."""
type Observation = Tensor | Mapping[str, Tensor]


class Field(ABC):
    """The frozen policy's velocity for fixed observations; it points from noise to action.

    Make one of a function with :func:`qsteer.field`. A subclass writes :meth:`__call__` and :meth:`repeat`;
    everything else has a default.

    Attributes:
        clock: the step grid on which a sampler integrates, and the host's time.
        bounds: of the policy's clean actions in model space, ``(low, high)``; None: they have none, as under
            a normalisation by mean and standard deviation.
        features: what the policy made of its observations, for learnt maps and critics: a tensor (B, F), or
            tokens (B, L, F) and their mask (B, L); None: nothing.
        dtype: the coarsest floating-point type the velocity is computed in; None: that of x.
        held: whether a part of its chunks is settled by a former one, see :mod:`qsteer.chunking`.
    """

    clock: Clock = PAPER
    bounds: Bounds = (-1.0, 1.0)
    features: Any = None
    dtype: torch.dtype | None = None
    held: bool = False

    @abstractmethod
    def __call__(self, x: Float[Tensor, "B H A"], t: Time, /) -> Float[Tensor, "B H A"]:
        """Return the velocity dx/dt at ``x`` and time ``t``.

        Args:
            x: noisy action chunks.
            t: the time of all rows, a float in [0, 1], or one time per row, a tensor (B,).
        """

    @abstractmethod
    def repeat(self, k: int, /) -> "Field":
        """Return the field for ``k`` rows per observation: ``b*k .. b*k+k-1`` belong to observation ``b``."""

    @property
    def base(self) -> "Field":
        """The field before any rule: of an unsteered field, itself."""
        return self

    @property
    def free(self) -> "Field":
        """The policy's own velocity; of a field that is held to a former chunk, what it is without that."""
        return self

    def hold(
        self, v: Float[Tensor, "B H A"], x: Float[Tensor, "B H A"], t: Time, /
    ) -> Float[Tensor, "B H A"]:
        """Return the velocity at (x, t), given that of :attr:`free` there; without gradients.

        Of a field that is held to a former chunk (:mod:`qsteer.chunking`) they differ.
        """
        return v

    def draws(self, noise: Float[Tensor, "B H A"], n: int, /) -> Float[Tensor, "B n H A"]:
        """Return where n further candidates of each row begin: as ``noise`` does, standard normal."""
        shape = len(noise), n, *noise.shape[1:]
        return normal(shape, noise)

    def advance(
        self, x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time, dt: Time, /
    ) -> Float[Tensor, "B H A"]:
        """Return the state after a step from (x, t) by the velocity ``v``, steered or not: ``x + dt v``.

        A policy whose own loop steps otherwise (:mod:`qsteer.renoising`) does so in a whole :meth:`chain`. A
        field around another one that hands on ``chain`` hands this on too.
        """
        return x + (dt.to(x.dtype)[:, None, None] if isinstance(dt, Tensor) else dt) * v

    def judged(self, value: "Value", /) -> "Value":
        """Return the value of what is executed when the field's chunk is the value's argument."""
        return value

    def chain(self, steps: int | None, part: Chain | None = None, /) -> "Field":
        """Return the field for one Euler chain of ``steps`` steps from 0 to 1; None: the clock's number.

        A chain that begins later, or has another stride, is described by ``part``. Samplers call it before
        the first step. A steered field counts steps, and forgets what its rule remembers of an earlier chain,
        as does the field that it bends; one that remembers nothing is itself.
        """
        return self

    def truncated(self, layers: int, /) -> "Field":
        """Return the same velocity, whose gradient runs through the denoiser's last ``layers`` layers only.

        Raises:
            ValueError: the field does not know its layers, or has fewer.
        """
        raise ValueError(
            f"layers={layers}: expected the velocity of a policy whose layers are known, got "
            f"{type(self).__name__}; name them in the policy's Host record, or leave layers out"
        )


def clip_of(clip: Clip, field: Field) -> Bounds:
    """Return the bounds which ``clip`` means on a field."""
    return field.bounds if clip == "policy" else clip


class Value(ABC):
    """A critic bound to fixed observations, its ensemble reduced to one (pessimistic) number per row.

    Make one of a function with :func:`qsteer.value`. A subclass writes :meth:`__call__` and :meth:`repeat`,
    and :meth:`members` if it is an ensemble.

    Attributes:
        mask: (H, A), 0 on action entries which the critic does not see (padding, steps that are not
            executed) and which receive no guidance; between 0 and 1: a share of it; None: it sees all.
    """

    mask: Tensor | None = None

    @abstractmethod
    def __call__(self, a: Float[Tensor, "B H A"], /) -> Float[Tensor, "B"]:
        """Return the value of each clean action chunk."""

    @abstractmethod
    def repeat(self, k: int, /) -> "Value":
        """Return the value for ``k`` rows per observation, in the order of :meth:`Field.repeat`."""

    def members(self, a: Float[Tensor, "B H A"], /) -> Float[Tensor, "J B"]:
        """Return what each ensemble member says of each action chunk; by default, an ensemble of one."""
        return self(a)[None]


class PosteriorSampler(ABC):
    """Samples of the endpoint posterior ``p(x1 | x_t = x)``, one per noise, differentiable in x.

    Rules also take a plain function ``(eps: (N, B, H, A), x, t: (B,)) -> x1: (N, B, H, A)``.
    """

    @abstractmethod
    def __call__(
        self, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time, /
    ) -> Float[Tensor, "N B H A"]:
        """Return N samples per row."""

    def on(self, field: Field, /) -> "PosteriorSampler":
        """Return the sampler for a policy's velocity and the observations which it is closed over."""
        return self

    def repeat(self, k: int, /) -> "PosteriorSampler":
        """Return the sampler for ``k`` rows per observation; nothing is encoded again."""
        return self

    def draw(
        self, field: Field, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time, /
    ) -> tuple[Float[Tensor, "B H A"], Float[Tensor, "N B H A"]]:
        """Return the policy's velocity v(x, t) and N samples per row.

        A sampler that asks the policy at (x, t) itself shares that one evaluation.
        """
        with torch.no_grad():
            v = field(x, t)
        return v, self(eps, x, t)


class Jump(ABC):
    """A two-time jump of the flow: ``(x at time r, r, t) -> x at time t``.

    :class:`~qsteer.BeamSearch` also takes a plain function of ``(x: (R, H, A), r: (R,), t: (R,))``.
    """

    @abstractmethod
    def __call__(self, x: Float[Tensor, "B H A"], r: Time, t: Time, /) -> Float[Tensor, "B H A"]:
        """Return the states at time t."""

    def on(self, field: Field, /) -> "Jump":
        """Return the jump for a policy's velocity and the observations which it is closed over."""
        return self

    def repeat(self, k: int, /) -> "Jump":
        """Return the jump for ``k`` rows per observation; nothing is encoded again."""
        return self


class Rule(ABC):
    """Turns a field and a value into a steered field. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, field: Field, value: Value, /) -> Field:
        """Return ``field`` steered towards higher ``value``."""

    def generators(self, device: torch.device, /) -> list[torch.Generator]:
        """Return the random generators on a device which the rule keeps for itself."""
        return []


class Sampler(ABC):
    """Turns a field into an action. Subclasses are frozen dataclasses.

    A sampler that compares several candidates makes them itself.
    """

    @abstractmethod
    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"], /
    ) -> Float[Tensor, "B H A"]:
        """Return one action chunk per row of ``noise``."""

    def generators(self, device: torch.device, /) -> list[torch.Generator]:
        """Return the random generators on a device which the sampler, or one inside it, keeps for itself."""
        inside = [part for part in vars(self).values() if isinstance(part, Rule | Sampler)]
        return [generator for part in inside for generator in part.generators(device)]


@runtime_checkable
class Bindable(Protocol):
    """What ``steer`` accepts as a critic: anything that can be bound to the host's observation batch.

    Two optional attributes are read when present: ``config``, whose ``horizon`` and ``action_dim`` say what
    of a chunk the critic sees and whose ``features`` how many of the policy's own, and ``acting()``, a
    context manager around a whole action, for critics that change between actions
    (:class:`qsteer.critics.LiveCritic`).
    """

    def bind(self, obs: Any, /) -> Value:
        """Encode the observation once and return the value closed over it."""
        ...

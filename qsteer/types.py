"""The protocols everything else is written in.

A policy is a velocity field. A rule turns a field and a value into a steered field. A sampler turns a field
into an action. Times are paper times everywhere above :mod:`qsteer.clock`: ``t = 0`` is noise, ``t = 1`` is
the action.

Shapes: ``B`` rows (observations, or candidates of observations), ``H`` steps of an action chunk, ``A`` action
dimensions, ``J`` members of a critic ensemble.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

type Bounds = tuple[float, float] | None
type Observation = Tensor | Mapping[str, Tensor]


@runtime_checkable
class Field(Protocol):
    """The frozen policy's velocity for fixed observations; it points from noise to action.

    Optional attributes are read when present: ``clock`` (a :class:`qsteer.clock.Clock`, the host's own step
    grid), ``base`` (on a steered field: the field as it was before any rule), ``features`` (what the policy
    made of its observations, for learnt maps and critics: a tensor (B, F), or tokens (B, L, F) and their mask
    (B, L)) and ``dtype`` (the coarsest it computes in, if that is not the dtype of x). Two optional methods
    are used: ``truncated(layers)`` returns the same velocity, whose gradient runs through the denoiser's last
    layers only, and ``chain(steps)``, on a steered field, the field for one chain of so many steps.
    """

    def __call__(self, x: Float[Tensor, "B H A"], t: Float[Tensor, "B"], /) -> Float[Tensor, "B H A"]:
        """Return the velocity dx/dt at ``x`` and time ``t``."""
        ...

    def repeat(self, k: int, /) -> "Field":
        """Return the field for ``k`` rows per observation: ``b*k .. b*k+k-1`` belong to observation ``b``."""
        ...


@runtime_checkable
class Value(Protocol):
    """A critic bound to fixed observations, its ensemble reduced to one (pessimistic) number per row.

    One optional attribute is read when present: ``mask``, a tensor (H, A) that is 0 on action entries which
    the critic
    never sees (padding, steps that are not executed). Masked entries receive no guidance.
    """

    def __call__(self, a: Float[Tensor, "B H A"], /) -> Float[Tensor, "B"]:
        """Return the value of each clean action chunk."""
        ...

    def repeat(self, k: int, /) -> "Value":
        """Return the value for ``k`` rows per observation, in the order of :meth:`Field.repeat`."""
        ...

    def members(self, a: Float[Tensor, "B H A"], /) -> Float[Tensor, "J B"]:
        """Return what each ensemble member says of each action chunk."""
        ...


@runtime_checkable
class PosteriorSampler(Protocol):
    """Samples of the endpoint posterior ``p(x1 | x_t = x)``, one per noise, differentiable in x.

    Two optional methods are used when present: ``on(field)`` returns the sampler for the policy and the
    observations at hand, and ``given(v, eps, x, t)`` the same samples where the policy's ``v = v(x, t)`` is
    known.
    """

    def __call__(
        self, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Float[Tensor, "B"], /
    ) -> Float[Tensor, "N B H A"]:
        """Return N samples per row."""
        ...


@runtime_checkable
class Jump(Protocol):
    """A two-time jump of the flow: ``(x at time r, r, t) -> x at time t``.

    Two optional methods are used when present: ``on(field)`` returns the jump for the policy and the
    observations at hand, and ``repeat(k)`` the jump for k rows per observation.
    """

    def __call__(
        self, x: Float[Tensor, "B H A"], r: Float[Tensor, "B"], t: Float[Tensor, "B"], /
    ) -> Float[Tensor, "B H A"]:
        """Return the states at time t."""
        ...


class Rule(ABC):
    """Turns a field and a value into a steered field. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, field: Field, value: Value, /) -> Field:
        """Return ``field`` steered towards higher ``value``."""


class Sampler(ABC):
    """Turns a field into an action. Subclasses are frozen dataclasses.

    Several candidates are the sampler's own affair.
    """

    @abstractmethod
    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"], /
    ) -> Float[Tensor, "B H A"]:
        """Return one action chunk per row of ``noise``."""


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

"""The linear path's identities, and fields and values made of plain functions.

On the path ``x_t = (1 - t) x0 + t x1`` with noise ``x0 ~ N(0, I)`` the velocity
``v(x, t) = E[x1 - x0 | x_t = x]`` determines everything else: the denoised action, the score, the noise that
was there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils import _pytree as pytree

from qsteer.checks import check_bounds, check_output
from qsteer.clock import PAPER, Clock, Time
from qsteer.types import Bounds, Field, Jump, PosteriorSampler, Value


def expand_time(t: Time, x: Float[Tensor, "B H A"], dtype: torch.dtype | None = None) -> Float[Tensor, "B"]:
    """Return one time per row of ``x``; of a float ``t``, in ``dtype`` or that of x."""
    if isinstance(t, Tensor):
        return t
    return torch.full((len(x),), t, dtype=dtype or x.dtype, device=x.device)


def repeat_time(t: Time, k: int) -> float | Float[Tensor, "R"]:
    """Return the times of ``k`` rows per observation."""
    return t.repeat_interleave(k, 0) if isinstance(t, Tensor) else t


def clamp_time(t: Time, low: float = 0.0, high: float = float("inf")) -> Time:
    """Return a time, or each row's, clamped."""
    return t.clamp(low, high) if isinstance(t, Tensor) else min(max(t, low), high)


def hypot(a: Time, b: Time) -> Time:
    """Return ``sqrt(a^2 + b^2)`` of two times, or of each row's."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.hypot(a, b)
    return math.hypot(a, b)


def factor(t: Time, x: Float[Tensor, "B H A"]) -> float | Float[Tensor, "B 1 1"]:
    """Return a number, or one per row, as a factor for chunks, in their dtype."""
    return t.to(x.dtype)[:, None, None] if isinstance(t, Tensor) else t


def interpolate(x0: Float[Tensor, "B H A"], x1: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
    """Return ``x_t = (1 - t) x0 + t x1``, the linear path from noise ``x0`` to action ``x1``."""
    t = factor(t, x0)
    return (1 - t) * x0 + t * x1


def denoise(x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
    """Return the denoised action ``D(x, t) = x + (1 - t) v = E[x1 | x_t = x]`` (Tweedie; QPILOTS eq. 14)."""
    return x + factor(1 - t, x) * v


def score(x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
    """Return ``grad log p_t(x) = (t v - x) / (1 - t)``; infinite at t = 1."""
    return (factor(t, x) * v - x) / factor(1 - t, x)


def clip_through(a: Tensor, bounds: Bounds) -> Tensor:
    """Clip the value but not the gradient (straight-through, QPILOTS eq. 15); ``None`` does not clip."""
    return a if bounds is None else a + (a.clamp(*bounds) - a).detach()


def clip_actions(a: Tensor, bounds: Bounds) -> Tensor:
    """Clip actions; ``None`` does not clip."""
    return a if bounds is None else a.clamp(*bounds)


def norm(x: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
    """Return the norm of each row, in single precision or better; squares stay within range."""
    return widened(x).flatten(1).norm(dim=1).to(torch.promote_types(x.dtype, torch.float32))


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in the widest number format of its device."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def spread(x: Shaped[Tensor, "J *B"]) -> Shaped[Tensor, "*B"]:
    """Return the population standard deviation over the first axis, of values of any size."""
    return widened(x).std(0, correction=0).to(torch.promote_types(x.dtype, torch.float32))


def nonzero(x: Tensor) -> Tensor:
    """Return ``x`` as a divisor: 1 where it is 0."""
    return torch.where(x == 0, 1.0, x)


def times(s: Float[Tensor, "B"], x: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
    """Return each row times its number, multiplied in the wider of the two formats."""
    return (s[:, None, None] * x).to(x.dtype)


@dataclass(frozen=True)
class FunctionField(Field):
    """A :class:`~qsteer.types.Field` made of a function; see :func:`field`."""

    fn: Callable[..., Tensor]
    context: Any = None
    clock: Clock = PAPER
    bounds: Bounds = (-1.0, 1.0)
    _repeats: dict[int, "FunctionField"] = attribute(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def features(self) -> Any:
        """The context: what the velocity knows of the observations."""
        return self.context

    def __call__(self, x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Return the velocity at ``x`` and ``t``; the function is given one time per row."""
        t = expand_time(t, x)
        v = self.fn(x, t) if self.context is None else self.fn(x, t, self.context)
        check_output(
            "velocity",
            v,
            x.shape,
            "one velocity per action entry. If the function closes over one observation per row, hand the "
            "observations over as qsteer.field(fn, context=obs): they are repeated with the candidates",
        )
        return v

    def repeat(self, k: int) -> "FunctionField":
        """Return the field for ``k`` rows per observation; made once, however often it is asked for."""
        if k not in self._repeats:
            self._repeats[k] = replace(self, context=repeat_rows(self.context, k))
        return self._repeats[k]


@dataclass(frozen=True)
class FunctionValue(Value):
    """A :class:`~qsteer.types.Value` made of a function; see :func:`value`."""

    fn: Callable[..., Tensor]
    context: Any = None
    mask: Shaped[Tensor, "H A"] | None = None

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the score of each row."""
        q = self.fn(a) if self.context is None else self.fn(a, self.context)
        check_output(
            "value",
            q,
            a.shape[:1],
            "one score per row: reduce over the action (.flatten(1).sum(1)) or squeeze the last axis",
        )
        return q

    def repeat(self, k: int) -> "FunctionValue":
        """Return the value for ``k`` rows per observation."""
        return replace(self, context=repeat_rows(self.context, k))


@dataclass(frozen=True)
class FunctionPosterior(PosteriorSampler):
    """A :class:`~qsteer.types.PosteriorSampler` made of a function ``(eps, x, t) -> x1``."""

    fn: Callable[..., Tensor]

    def __call__(
        self, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "N B H A"]:
        """Return N samples per row; the function is given one time per row."""
        return self.fn(eps, x, expand_time(t, x))


@dataclass(frozen=True)
class FunctionJump(Jump):
    """A :class:`~qsteer.types.Jump` made of a function ``(x, r, t) -> x_t``."""

    fn: Callable[..., Tensor]

    def __call__(self, x: Float[Tensor, "B H A"], r: Time, t: Time) -> Float[Tensor, "B H A"]:
        """Return the states at time t; the function is given times per row."""
        return self.fn(x, expand_time(r, x), expand_time(t, x))


def field(
    fn: Callable[..., Tensor],
    context: Any = None,
    *,
    clock: Clock = PAPER,
    bounds: Bounds = (-1.0, 1.0),
) -> Field:
    """Make a field of a velocity function.

    Args:
        fn: ``(x: (B, H, A), t: (B,)) -> v: (B, H, A)`` in paper time (t = 0 noise), or ``(x, t, context)``
            when a context is given. It must accept any number of rows.
        context: what the function knows of the observations: a tensor, or nested dicts, lists and tuples of
            tensors, each with one leading row per observation. Samplers with several candidates repeat it.
        clock: the step grid; only hosts need another than the default.
        bounds: lowest and highest entry of a clean action, at which rules ask the critic; None: there are
            none, as for actions normalised by mean and standard deviation.

    Raises:
        TypeError: ``fn`` is not callable.
        ValueError: ``bounds`` are not ``(low, high)``.
    """
    if not callable(fn):
        raise TypeError(
            f"field: expected a function (x, t) -> velocity, got {type(fn).__name__}; wrap it in a lambda"
        )
    check_bounds(bounds)
    return FunctionField(fn, normal(context), clock, bounds)


def value(fn: Callable[..., Tensor], context: Any = None, *, mask: Tensor | None = None) -> Value:
    """Make a value of any differentiable score.

    Args:
        fn: ``a: (B, H, A) -> (B,)``, or ``(a, context)`` when a context is given; higher is better.
        context: as for :func:`field`.
        mask: (H, A), 0 on action entries that the score does not see.

    Raises:
        TypeError: ``fn`` is not callable.
    """
    if not callable(fn):
        raise TypeError(
            f"value: expected a function action -> score, got {type(fn).__name__}; wrap it in a lambda"
        )
    return FunctionValue(fn, normal(context), mask)


def read_features(field: Field) -> Any:
    """Return the features of the observations which a field is closed over.

    Raises:
        ValueError: it has none, or something that is neither a tensor nor tokens and mask.
    """
    features = field.features
    if not isinstance(features, Tensor) and not (isinstance(features, tuple | list) and len(features) == 2):
        got = "without" if features is None else f"with {type(features).__name__}"
        raise ValueError(
            "field: expected features of the observation for a learnt map, (B, F) or tokens (B, L, F) and "
            f"their mask, got {type(field).__name__} {got}; "
            "hand observations over as qsteer.field(fn, context=features), or set Host.features"
        )
    return features


def ask(value: Value, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
    """Return the value of each action.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not one number per row, which would broadcast to something else.
    """
    q = value(a)
    check_output("value", q, a.shape[:1], "one score per row; reduce over the action, squeeze the last axis")
    return q


def ask_members(value: Value, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
    """Return the value of each action by each member; errors as for :func:`ask`."""
    q = value.members(a)
    expected = (len(q) if isinstance(q, Tensor) and q.ndim else 1, len(a))
    check_output("value.members", q, expected, "one row per member, one score per action")
    return q


def repeat_rows(tree: Any, k: int) -> Any:
    """Repeat each leading row of every tensor in a nested structure ``k`` times, row by row."""
    return pytree.tree_map_only(Tensor, lambda x: x.repeat_interleave(k, dim=0), tree)


def normal(tree: Any) -> Any:
    """Copy the tensors of a nested structure that were made in inference mode, which autograd refuses."""
    with torch.inference_mode(False):
        return pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, tree)


def finite_rows(x: Tensor) -> Tensor:
    """Return, for each leading row, whether all its entries are finite."""
    return torch.isfinite(x).flatten(1).all(1) if x.ndim > 1 else torch.isfinite(x)

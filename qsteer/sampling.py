"""The bare entry: steer a velocity field without any host."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.compiling.hidden import known
from qsteer.compiling.kept import KEPT, Kept, Mode, check_mode
from qsteer.compiling.runs import Kind
from qsteer.flow import norm
from qsteer.samplers import Euler, KeepBest
from qsteer.trace import Trace, displacement_wanted, record_action, report_displacement
from qsteer.types import Bindable, Field, Rule, Sampler, Value


def sample(
    field: Field,
    value: Value | None,
    noise: Float[Tensor, "B H A"],
    *,
    rule: Rule | Callable[[Field, Value], Field] | None = None,
    sampler: Sampler | Callable[[Field, Value | None, Tensor], Tensor] = Euler(),  # noqa: B008 (frozen)
    trace: Trace | None = None,
    compile: "Mode | FastSampling | None" = None,
) -> Float[Tensor, "B H A"]:
    """Sample one action chunk per row of noise.

    Args:
        field: the policy's velocity, see :func:`qsteer.field`.
        value: the critic's value, see :func:`qsteer.value`; None when neither rule nor sampler asks for it.
        noise: standard normal, (B, H, A).
        rule: how the value bends the field; None: not at all.
        sampler: how the field becomes an action.
        trace: records what the rule did.
        compile: ``"inductor"``, ``"static"`` or ``"graph"`` (CUDA), see :func:`qsteer.steer`: how the whole
            chain is made fast. Field and value must be frozen dataclasses, such as ``qsteer.field(fn,
            context=obs)`` and ``critic.bind(obs)``, whose tensors are all that depends on the observation.
            What is compiled is kept for the next call with the same functions, networks, rule and sampler;
            a :class:`FastSampling` of your own says how many kinds, and whether to wait for the compiler.

    Returns:
        The actions (B, H, A), detached; differentiate through :class:`qsteer.ThroughTime` instead.

    Raises:
        TypeError: field, rule or sampler is of another kind; with ``compile``, a tensor enters the action
            that is no input.
        ValueError: noise is not three-dimensional, a rule has no value to follow, or ``compile`` is unknown.

    Example:
        >>> import torch, qsteer
        >>> field = qsteer.field(lambda x, t: -x)
        >>> value = qsteer.value(lambda a: a.flatten(1).sum(1))
        >>> qsteer.sample(field, value, torch.randn(1, 5, 2), rule=qsteer.Tweedie(alpha=0.2)).shape
        torch.Size([1, 5, 2])
    """
    if not isinstance(field, Field):
        raise TypeError(
            f"field: expected a Field, got {type(field).__name__}; make one of a function, qsteer.field(fn), "
            "or subclass qsteer.Field"
        )
    if value is not None and not isinstance(value, Value):
        raise TypeError(
            f"value: expected a Value, got {type(value).__name__}; bind the critic to its observation, "
            "critic.bind(obs), make a value of a function, qsteer.value(fn), or subclass qsteer.Value"
        )
    if isinstance(rule, Sampler) or isinstance(sampler, Rule):
        raise TypeError(
            f"rule, sampler: expected a rule and a sampler, got {type(rule).__name__} and "
            f"{type(sampler).__name__}; swap them"
        )
    for name, part, example in (("rule", rule, "qsteer.Tweedie()"), ("sampler", sampler, "qsteer.Euler()")):
        if isinstance(part, type) or not (callable(part) or (part is None and name == "rule")):
            raise TypeError(f"{name}: expected an object such as {example}, got {part!r}; pass an instance")
    if trace is not None and not isinstance(trace, Trace):
        raise TypeError(
            f"trace: expected a qsteer.Trace to record into, got {trace!r}; pass trace=qsteer.Trace()"
        )
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise: expected a floating-point tensor, got {kind}; use torch.randn(B, H, A)")
    if noise.ndim != 3:
        raise ValueError(
            f"noise: expected shape (B, H, A), got {tuple(noise.shape)}; add a batch axis: noise[None]"
        )
    if rule is not None and value is None:
        raise ValueError("value: expected a value for the rule to follow, got None; pass critic.bind(obs)")
    noise = noise.clone() if noise.is_inference() else noise
    if compile is not None:
        if not isinstance(compile, FastSampling):
            check_mode(compile)
            compile = fast_sampling(compile)
        with outside_inference_mode():
            return compile(field, value, noise, rule, sampler, trace)
    with outside_inference_mode(), record_action(trace):
        return steered_action(field, value, noise, rule, sampler)


class FastSampling:
    """What :func:`sample` keeps ready with ``compile``: its actions on buffers of their own.

    Args:
        mode: see :func:`sample`.
        most: how many kinds of action (shapes, networks, functions, rule, sampler) are kept.
        wait: wait for the compiler (``"inductor"``) when a kind is new, so that rounding does not depend on
            when it is done.

    Raises:
        ValueError: the mode is unknown.
    """

    def __init__(self, mode: Mode, *, most: int = KEPT, wait: bool = False) -> None:
        check_mode(mode)
        self.kept = Kept(mode, most, wait)

    def __call__(
        self,
        field: Field,
        value: Value | None,
        noise: Float[Tensor, "B H A"],
        rule: Any,
        sampler: Any,
        trace: Trace | None,
    ) -> Float[Tensor, "B H A"]:
        """Sample actions; arguments and errors as of :func:`sample`."""
        for name, given in (("field", field), ("value", value)):
            if given is not None and not is_dataclass(given):
                raise TypeError(
                    f"{name}: expected a frozen dataclass for compile, whose tensors are all that depends on "
                    f"the observation, got {type(given).__name__}; use qsteer.{name}(fn, context=obs), or "
                    "leave compile out"
                )
        if self.kept.mode == "graph" and not noise.is_cuda:
            raise ValueError(
                f"compile: expected noise on a CUDA device for 'graph', got {noise.device}; use 'inductor', "
                "or leave compile out"
            )
        trace = Trace(steps=False) if trace is None else trace
        inputs = field, value, noise

        def act(inputs: tuple[Field, Value | None, Tensor]) -> Tensor:
            return steered_action(*inputs, rule=rule, sampler=sampler)

        def make() -> Kind:
            weights = known(inputs, rule, sampler)
            return Kind(
                act, inputs, rule if isinstance(rule, Rule) else None, trace.wanted, weights, noise.device
            )

        return self.kept(inputs, (rule, sampler, id(rule), id(sampler)), noise.device, make, trace)

    @property
    def states(self) -> list[str]:
        """What has become of each kind of action, in words."""
        return [run.state for run in self.kept.runs]


@cache
def fast_sampling(mode: Mode) -> FastSampling:
    """Return what is kept for all calls of :func:`sample` with a mode."""
    return FastSampling(mode, most=4 * KEPT)


def steered_action(
    field: Field,
    value: Value | None,
    noise: Float[Tensor, "B H A"],
    rule: Rule | Callable[[Field, Value], Field] | None,
    sampler: Sampler | Callable[[Field, Value | None, Tensor], Tensor],
) -> Float[Tensor, "B H A"]:
    """Return what the sampler makes of the field that the rule bends."""
    if not len(noise):
        return noise
    value = None if value is None else field.judged(value)
    steered = field if rule is None or value is None else rule(field, value)
    if steered.base is not field.base and any(isinstance(each, KeepBest) for each in nested(sampler)):
        raise TypeError(
            f"KeepBest: expected a rule whose field says what it bends, got {type(steered).__name__}, whose "
            "base is not the policy's field; give it a property base that returns field.base"
        )
    action = sampler(steered, value, noise).detach()
    if displacement_wanted():
        twin = chain_of(sampler)(field, None, noise)
        report_displacement(rms(action - twin, None if value is None else value.mask))
    return action


def chain_of(sampler: Any) -> Euler:
    """Return the innermost Euler chain of a sampler; if it has none, the host's own."""
    return next((each for each in nested(sampler) if isinstance(each, Euler)), Euler())


def nested(sampler: Any) -> Iterator[Any]:
    """Yield a sampler, and what lies inside it."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "inner", None)


def rms(x: Float[Tensor, "B H A"], mask: Tensor | None) -> Float[Tensor, "B"]:
    """Return each row's root mean square over the entries of a mask."""
    if mask is None:
        return norm(x) / x.shape[1:].numel() ** 0.5
    seen = mask.bool()
    return norm(torch.where(seen, x, 0.0)) / seen.sum() ** 0.5


def acting(critic: Bindable) -> AbstractContextManager[None]:
    """Return what to enter around a whole action: the critic's own ``acting()``, if it has one."""
    own = getattr(critic, "acting", None)
    return nullcontext() if own is None else own()


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode``, whose tensors cannot be differentiated, for plain ``no_grad``."""
    with torch.inference_mode(False), torch.no_grad():
        yield

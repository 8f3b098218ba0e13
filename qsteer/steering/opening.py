"""Opening an action: a policy's own code up to its first Euler step, and what it has encoded by then.

:class:`Interception` puts three bound methods on the policy *instance* and nothing anywhere else:

* the *batch* method remembers the observation for the critic and runs the class's own;
* the *entry* runs the class's own until it asks for its first step, whose arguments (noise, key-value cache,
  masks) are all that is needed: the prefix is computed once, by the host's code on its random stream;
* the *step* interrupts the entry there, and is the class's own at any other time.

:class:`~qsteer.hosts.Host` says where a policy keeps these three.
"""

import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial, wraps
from types import MethodType
from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.adapters import unwrapped
from qsteer.critics.encoders import FEATURES, pooled
from qsteer.flow import normal
from qsteer.hosts import LOCAL, DrawnField, Host, HostField, bounds_of, local_function, places_of
from qsteer.randomness import is_seeded
from qsteer.sampling import acting, outside_inference_mode
from qsteer.steering.checks import (
    check_critic,
    check_kind,
    check_methods,
    check_num_steps,
    check_rtc,
    chunks,
    read_inputs,
    read_sizes,
)
from qsteer.types import Bindable, Field, Value


class Opened(NamedTuple):
    """An action before its first step."""

    field: Field
    """The policy's velocity for the observations of the batch."""
    value: Value | None
    """The critic's value for them; None: no critic was given."""
    noise: Float[Tensor, "B H A"]
    """The host's own draw."""


class Call(NamedTuple):
    """A call of a host's batch method."""

    by: "Interception"
    act: Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor]
    batch: Any
    entered: list[bool]
    """Not empty once the entry has been called."""
    encoding: bool = False
    """Whether the entry's own code runs, to be interrupted at its first step."""


_call: ContextVar[Call | None] = ContextVar("qsteer_call", default=None)
"""The call that runs in this thread: it takes the batch from the batch method to the entry, and tells the
step to interrupt. Several threads may use one steered policy."""


class _Interruption(BaseException):
    """Carries something out of the host's code; no Exception, for a host may catch those."""

    def __init__(self, content: Any) -> None:
        super().__init__()
        self.content = content


def uncompiled[**P, R](method: Callable[P, R]) -> Callable[P, R]:
    """Let a method run as it is where somebody compiles it; the compiler is imported by whoever does."""
    reason = "a steered action interrupts the host's loop; compile the policy's parts, or steer(compile=...)"

    @cache
    def disabled() -> Callable[P, R]:
        return torch.compiler.disable(method, reason=reason)

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        return disabled()(*args, **kwargs)

    return run


signature_of = lru_cache(64)(inspect.signature)
"""The signature of a function, read once."""


def named(method: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a method by their names, in order.

    Raises:
        TypeError: they do not fit.
    """
    found = signature_of(method.__func__).bind(method.__self__, *args, **kwargs).arguments
    found.pop(next(iter(found)))
    return found


def flattened(method: MethodType, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return named arguments with those among them that the method takes as ``**kwargs``."""
    kinds = signature_of(method.__func__).parameters.values()
    rest = next((p.name for p in kinds if p.kind is p.VAR_KEYWORD), None)
    return {name: given for name, given in arguments.items() if name != rest} | arguments.get(rest or "", {})


class Interception(ABC):
    """Stands in for a policy's batch, entry and step methods until :meth:`_restore`.

    Attributes:
        policy: whose methods they are.
        host: where it keeps them.
    """

    def __init__(self, policy: Any, host: Host, wrappers: tuple[Any, ...] = ()) -> None:
        self.policy, self.host = policy, host
        self._replaced: list[tuple[Any, str, Any]] = []
        for path, method in ((host.entry, self._entry), (host.step, self._step), (host.batch, self._batch)):
            if path is None or (path == host.entry == host.batch and method != self._batch):
                continue  # no velocity; one method that is given the batch and integrates
            for owner, name in places_of(policy, host, path, wrappers):
                self._replaced.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, method)

    @abstractmethod
    def _act(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "B H A"]:
        """Return what the host's entry is to return, for its batch and the entry's arguments."""

    def _restore(self) -> None:
        """Give the policy its own methods back."""
        for owner, name, former in self._replaced:
            delattr(owner, name)
            if former is not None:
                setattr(owner, name, former)
        self._replaced = []

    def _encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Field, Float[Tensor, "B H A"]]:
        """Encode the observation by the host's own entry, given its arguments; return velocity and noise."""
        entry = self.host.own(self.policy, self.host.entry)
        arguments = named(entry, args, kwargs)
        if self.host.step is None:
            noise = entry(*args, **kwargs)
            anew = {name: given for name, given in flattened(entry, arguments).items() if name != "noise"}
            return DrawnField(partial(entry, **anew), bounds_of(self.host, self.policy)), noise
        step = self.host.own(self.policy, self.host.step)
        steps = arguments.get(self.host.num_steps)
        if steps is None:
            steps = self.host.steps
            steps = self.host.read(self.policy, steps) if isinstance(steps, str) else steps
            check_num_steps(str(self.host.steps), steps)
        else:
            check_num_steps(self.host.num_steps, steps)
        token = _call.set(Call(self, self._act, None, [], encoding=True))
        try:
            entry(*args, **kwargs)
        except _Interruption as first_step:
            context = first_step.content
        else:
            raise RuntimeError(
                f"{self.host.entry}: expected it to call {self.host.step}, got an action without a call; "
                "correct the Host record"
            )
        finally:
            _call.reset(token)
        noise = context.pop(self.host.x)
        time = context.pop(self.host.t, None)
        clock = replace(self.host.clock, steps=steps)
        if self.host.context is not None:
            context = self.host.context(arguments, context)
        field = HostField(self.host, step, context, self.policy, clock)
        field = field.with_given(noise, time)
        if is_seeded() and arguments.get("noise") is None:
            noise = field.draws(noise, 1)[:, 0]
        if self.host.hold is not None and chunks(self.policy, self.host):
            return self.host.hold(self.policy, field, flattened(entry, arguments), noise), noise
        return field, noise

    def _open(self, batch: Any) -> tuple[Field, Float[Tensor, "B H A"], Any]:
        """Run the policy up to its first step; return its velocity, its noise and the batch it was given."""

        def stop(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
            with outside_inference_mode():
                args, kwargs, batch = normal((args, kwargs, batch))
                raise _Interruption((*self._encode(args, kwargs), batch))

        try:
            if self.host.observe is None:
                self._run(stop, batch)
            else:
                self._run(stop, **batch)
        except _Interruption as opened:
            return opened.content
        raise RuntimeError(
            f"{self.host.entry}: expected an interruption to pass through the host's code, got it caught "
            "there; let BaseException pass"
        )

    @uncompiled
    def _run(self, act: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the class's own batch method, with ``act`` in the entry's place."""
        if not self._replaced:  # somebody has kept it, for example compiled
            return self.host.read(self.policy, self.host.batch)(*args, **kwargs)
        own = self.host.own(self.policy, self.host.batch)
        arguments = named(own, args, kwargs)
        observe = self.host.observe
        batch = next(iter(arguments.values())) if observe is None else observe(arguments)
        call = Call(self, act, batch, [])
        token = _call.set(call)
        try:
            if self.host.batch == self.host.entry:
                return self._entry(*args, **kwargs)
            result = own(*args, **kwargs)
        finally:
            _call.reset(token)
        if not call.entered:
            raise RuntimeError(
                f"{self.host.batch}: expected it to call {self.host.entry}, got a result without a call, "
                "which nothing has steered; correct the Host record, or let the policy look the method "
                "up when it acts"
            )
        return result

    def _batch(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the host's batch method: remember the batch while the class's own runs."""
        return self._run(self._act, *args, **kwargs)

    @uncompiled
    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the host's step: interrupt the entry that waits for it, else run the class's own."""
        assert self.host.step is not None
        method, call = self.host.own(self.policy, self.host.step), _call.get()
        if call is None or call.by is not self or not call.encoding:
            return method(*args, **kwargs)
        local = self.host.local
        inside = {} if local is None else {LOCAL: local_function(local)}
        raise _Interruption(named(method, args, kwargs) | inside)

    @uncompiled
    def _entry(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the host's entry."""
        check_kind(self.policy, self.host)
        check_rtc(self.policy, self.host)
        call = _call.get()
        if call is None or call.by is not self:
            raise RuntimeError(
                f"{self.host.entry}: expected a call by {self.host.batch}, which has the critic's batch, "
                f"got a direct one; call policy.{self.host.batch}(batch), looked up or compiled after "
                "steering, or remove the handle first"
            )
        call.entered.append(True)
        action = call.act(call.batch, args, kwargs)
        if self.host.decode is not None:
            action = self.host.decode(self.policy, action)
        return action if self.host.result is None else self.host.result(action)


class _Opener(Interception):
    """Stands on a policy while one action is opened."""

    def _act(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """Refuse."""
        raise RuntimeError(
            "policy: expected no call while an action of it is opened, got one from another thread; steer a "
            "policy that several threads use"
        )


_opening = threading.Lock()
"""Actions of policies that are not steered are opened one at a time: meanwhile their methods are replaced."""


def open_action(
    policy: Any,
    batch: Any,
    critic: Bindable | None = None,
    *,
    critic_inputs: Callable[[Any], Any] | None = None,
) -> Opened:
    """Run a pretrained policy up to its first Euler step, and return what an action is made of.

    It is what :func:`qsteer.steer` does before rule and sampler: ``qsteer.sample(opened.field, opened.value,
    opened.noise, rule=...)`` is the host's padded chunk in model space. The policy is left as it was, steered
    or not: of one that is not, the parameters require gradients as before, and graphs keep what those take.
    The value of a :class:`~qsteer.LiveCritic` changes with the next action: use it inside ``acting()``.

    Cost: the host's prefix and one draw of noise, from the host's random stream; no velocity.

    Args:
        policy: as for :func:`qsteer.steer`.
        batch: what the policy's ``predict_action_chunk`` takes; of openpi's models, a dict of the arguments
            of ``sample_actions``.
        critic: as for :func:`qsteer.steer`; None: there is no value.
        critic_inputs: ``batch -> obs``, when the critic needs something else than the host's batch.

    Raises:
        TypeError: an argument is of the wrong kind, or no Host record describes the policy.
        ValueError: the critic is on another device, or sees more than the policy executes.
        RuntimeError: real-time chunking is on, or the policy does not run as its Host record says.

    Example:
        >>> from qsteer.adapters import PlainPolicy
        >>> policy = PlainPolicy(lambda x, t, obs: obs[:, None, None] - x, horizon=5, action_dim=2)
        >>> field, value, noise = open_action(policy, torch.zeros(3))
        >>> field(noise, 0.5).shape, value
        (torch.Size([3, 5, 2]), None)
    """
    policy, host, _ = unwrapped(policy)
    check_kind(policy, host)
    if host.step is None:
        raise TypeError(
            f"policy: expected one with a velocity field, got {host.serves}, whose record names none; steer "
            "it by selection, qsteer.steer(policy, critic, qsteer.BestOfN(8))"
        )
    if critic is not None:
        check_critic(critic, policy, host, own_inputs=critic_inputs is not None)
    with _opening:
        if (present := interception_of(policy, host)) is not None:
            field, noise, batch = present._open(batch)
        else:
            check_methods(policy, host)
            opener = _Opener(policy, host)
            try:
                field, noise, batch = opener._open(batch)
            finally:
                opener._restore()
    if critic is None:
        return Opened(field, None, noise)
    with acting(critic), outside_inference_mode():
        value = bind_critic(critic, batch, critic_inputs, field)
        sizes = read_sizes(critic, policy, host)
        return Opened(field, Executed.of(value, noise, *sizes, host.begins(policy)), noise)


def interception_of(policy: Any, host: Host) -> Interception | None:
    """Return what stands on a policy's methods."""
    owner, name = host.site(policy, host.batch)
    owner_of_method = getattr(vars(owner).get(name), "__self__", None)
    return owner_of_method if isinstance(owner_of_method, Interception) else None


def bind_critic(
    critic: Bindable, batch: Any, critic_inputs: Callable[[Any], Any] | None, field: Field | None
) -> Value:
    """Bind a critic to an observation, and to what the field knows of it.

    Args:
        critic: what is bound.
        batch: the host's.
        critic_inputs: translates it; None: the critic is given the batch itself.
        field: the policy's velocity, for critics that see the policy's features; None: it is not known yet.

    Raises:
        KeyError: the observation lacks what the critic sees.
        TypeError: what the critic makes of it is no value.
    """
    obs = batch if critic_inputs is None else critic_inputs(batch)
    inputs = read_inputs(critic)
    if field is not None and inputs.features:
        named = obs if isinstance(obs, Mapping) else {inputs.observation_key: obs}
        obs = {**named, FEATURES: pooled(field.features)}
    try:
        value = critic.bind(obs)
    except KeyError as error:
        keys = list(obs) if isinstance(obs, Mapping) else type(obs).__name__
        error.add_note(
            f"the critic was given {keys}; translate the host's batch with steer(critic_inputs=...)"
        )
        raise
    if not isinstance(value, Value):
        raise TypeError(
            f"critic.bind: expected a Value, got {type(value).__name__}; return qsteer.value(fn, "
            "context=obs), or a subclass of qsteer.Value"
        )
    return value


@dataclass(frozen=True)
class Executed(Value):
    """A critic's value on a host's chunk: of ``steps`` steps from ``first`` on, and ``dim`` dimensions."""

    value: Value
    steps: int
    dim: int
    mask: Float[Tensor, "H A"]
    first: int = 0

    @classmethod
    def of(
        cls, value: Value, chunk: Float[Tensor, "B H A"], steps: int, dim: int, first: int = 0
    ) -> "Executed":
        """Return the value for chunks like ``chunk``; a mask of the value's own is kept."""
        if first + steps > chunk.shape[1]:
            raise ValueError(
                f"executed: expected at most the {chunk.shape[1] - first} steps of the policy's chunk, got "
                f"{steps}"
            )
        mask = chunk.new_zeros(chunk.shape[1:])
        mask[first : first + steps, :dim] = 1.0 if value.mask is None else value.mask
        return cls(value, steps, dim, mask, first)

    def seen(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B h d"]:
        """Return the part of ``a`` which the critic sees."""
        return a[:, self.first : self.first + self.steps, : self.dim]

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the value of what the critic sees."""
        return self.value(self.seen(a))

    def repeat(self, k: int) -> "Executed":
        """Return the value for ``k`` rows per observation."""
        return replace(self, value=self.value.repeat(k))

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return what each ensemble member says."""
        return self.value.members(self.seen(a))

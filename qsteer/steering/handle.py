"""Steer a pretrained policy in place.

:func:`steer` puts three bound methods on the policy *instance* and nothing anywhere else:

* the *batch* method remembers the observation for the critic and runs the class's own;
* the *entry* runs the class's own until it asks for its first step, whose arguments (noise, key-value cache,
  masks) are all that steering needs: the prefix is computed once, by the host's code on its random stream;
* the *step* interrupts the entry there, and is the class's own at any other time.

The arguments become a :class:`~qsteer.types.Field`, rule and sampler make the action of it, and the host goes
on to its own post-processing. :class:`Host` says where a policy keeps these three.
"""

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass, replace
from types import EllipsisType
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.critics.encoders import FEATURES, pooled
from qsteer.flow import normal
from qsteer.hosts import Host, HostField, parameters_of
from qsteer.samplers import Euler
from qsteer.sampling import acting, outside_inference_mode, sample
from qsteer.steering.compiled import Compiled, Mode
from qsteer.trace import Trace
from qsteer.types import Bindable, Rule, Sampler, Value

_observed: ContextVar["tuple[Handle, Any] | None"] = ContextVar("qsteer_observed", default=None)
_interrupting: ContextVar["Handle | None"] = ContextVar("qsteer_interrupting", default=None)


@dataclass(frozen=True)
class Executed:
    """A critic's value on a host's padded chunk: it sees the first ``steps`` steps and ``dim`` dimensions."""

    value: Value
    steps: int
    dim: int
    mask: Float[Tensor, "H A"]

    @classmethod
    def of(cls, value: Value, chunk: Float[Tensor, "B H A"], steps: int, dim: int) -> "Executed":
        """Return the value for chunks like ``chunk``; a mask of the value's own is kept."""
        mask = torch.zeros_like(chunk[0])
        own = getattr(value, "mask", None)
        mask[:steps, :dim] = 1.0 if own is None else own
        return cls(value, steps, dim, mask)

    def seen(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B h d"]:
        """Return the part of ``a`` which the critic sees."""
        return a[:, : self.steps, : self.dim]

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the value of what the critic sees."""
        return self.value(self.seen(a))

    def repeat(self, k: int) -> "Executed":
        """Return the value for ``k`` rows per observation."""
        return replace(self, value=self.value.repeat(k))

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return what each ensemble member says."""
        return self.value.members(self.seen(a))


class _FirstStep(BaseException):
    """Carries the first step's arguments out of the host's loop; no Exception, for a host may catch those."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class Handle:
    """What :func:`steer` installed; :meth:`swap` changes it, :meth:`remove` or leaving ``with`` removes it.

    Attributes:
        policy: the steered policy.
        host: where it keeps its loop.
        critic: what is bound to each observation.
        rule: bends the velocity; None: nothing does.
        sampler: makes the action.
        critic_inputs: turns the host's batch into what the critic is bound to; None: nothing does.
        trace: what the rule did, and how often anything fell back to the base policy since ``steer``.
    """

    def __init__(
        self,
        policy: Any,
        host: Host,
        critic: Bindable,
        rule: Rule | None,
        sampler: Sampler,
        critic_inputs: Callable[[Any], Any] | None,
        trace: Trace,
        compiled: Compiled | None,
    ) -> None:
        self.policy, self.host, self.critic, self.rule, self.sampler = policy, host, critic, rule, sampler
        self.critic_inputs, self.trace, self._compiled = critic_inputs, trace, compiled
        self._frozen = [parameter for parameter in parameters_of(policy) if parameter.requires_grad]
        self._replaced: list[tuple[Any, str, Any]] = []
        for path, method in ((host.entry, self._entry), (host.step, self._step), (host.batch, self._batch)):
            owner, name = host.site(policy, path)
            self._replaced.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, method)
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def __repr__(self) -> str:
        state = "" if self._replaced else ", removed"
        return f"Handle({self.host.serves}, {self.rule}, {self.sampler}{state})"

    def __enter__(self) -> "Handle":
        self._check_live()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the policy exactly; removing twice does nothing."""
        for owner, name, former in self._replaced:
            delattr(owner, name)
            if former is not None:
                setattr(owner, name, former)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._replaced, self._frozen = [], []

    def swap(
        self,
        *,
        rule: Rule | EllipsisType | None = ...,
        sampler: Sampler | EllipsisType | None = ...,
        critic: Bindable | EllipsisType = ...,
    ) -> None:
        """Change the method from the next action on; what is not named stays.

        Args:
            rule: the new rule; None: no rule.
            sampler: the new sampler; None: the host's own Euler chain.
            critic: the new critic.

        Raises:
            TypeError, ValueError: as for :func:`steer`; nothing is changed then.
            RuntimeError: the handle was removed.
        """
        self._check_live()
        new_rule = self.rule if rule is ... else checked_rule(rule)
        new_sampler = self.sampler if sampler is ... else checked_sampler(sampler)
        if critic is not ...:
            check_critic(critic, self.policy, self.host)
            self.critic = critic
        self.rule, self.sampler = new_rule, new_sampler

    def _batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the host's batch method: remember the batch while the class's own runs."""
        token = _observed.set((self, batch))
        try:
            return self.host.own(self.policy, self.host.batch)(batch, *args, **kwargs)
        finally:
            _observed.reset(token)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the host's step: interrupt the entry that waits for it, else run the class's own."""
        step = self.host.own(self.policy, self.host.step)
        if _interrupting.get() is not self:
            return step(*args, **kwargs)
        raise _FirstStep(dict(inspect.signature(step).bind(*args, **kwargs).arguments))

    def _entry(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B H A"]:
        """Stand in for the host's entry: the class's own up to its first step, then rule and sampler."""
        check_rtc(self.policy, self.host)
        observer, batch = _observed.get() or (None, None)
        if observer is not self:
            raise RuntimeError(
                f"{self.host.entry}: expected a call by {self.host.batch}, which has the critic's batch, "
                f"got a direct one; call policy.{self.host.batch}(batch), or remove the handle first"
            )
        critic = self.critic
        with acting(critic), outside_inference_mode():
            args, kwargs, batch = normal((args, kwargs, batch))
            field, value, noise = self._encoded(critic, batch, args, kwargs)
            if self._compiled is None:
                return sample(field, value, noise, rule=self.rule, sampler=self.sampler, trace=self.trace)
            return self._compiled(field, value, noise, self.rule, self.sampler, self.trace)

    def _encoded(
        self, critic: Bindable, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[HostField, Executed, Float[Tensor, "B H A"]]:
        """Encode the observation for policy and critic; before a graph, each on a stream of its own."""
        seen = seen_by(critic, self.policy, self.host)
        if self._compiled is None or self._compiled.mode != "graph" or sees_features(critic):
            field, noise = self._field(args, kwargs)
            value = self._bind(critic, batch, field)
        else:
            # What the second stream allocates is free for it again only after the first has used it.
            first, second = self._compiled.streams
            second.wait_stream(first)
            with torch.cuda.stream(second):
                value = self._bind(critic, batch)
            field, noise = self._field(args, kwargs)
            first.wait_stream(second)
        return field, Executed.of(value, noise, *seen), noise

    def _field(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[HostField, Float[Tensor, "B H A"]]:
        """Encode the observation by the host's own code; return its velocity and its noise."""
        entry, step = (self.host.own(self.policy, path) for path in (self.host.entry, self.host.step))
        token = _interrupting.set(self)
        try:
            entry(*args, **kwargs)
        except _FirstStep as first:
            context = first.arguments
        else:
            raise RuntimeError(
                f"{self.host.entry}: expected it to call {self.host.step}, got an action without a call; "
                "correct the Host record"
            )
        finally:
            _interrupting.reset(token)
        noise = context.pop(self.host.x)
        del context[self.host.t]
        override = inspect.signature(entry).bind(*args, **kwargs).arguments.get(self.host.num_steps)
        steps = self.host.read(self.policy, self.host.steps) if override is None else override
        clock = replace(self.host.clock, steps=steps)
        return HostField(self.host, step, context, clock, self.policy), noise

    def _bind(self, critic: Bindable, batch: Any, field: HostField | None = None) -> Value:
        """Bind the critic to the observation, and to what the field knows of it."""
        obs = batch if self.critic_inputs is None else self.critic_inputs(batch)
        if field is not None and sees_features(critic):
            key = cast(Any, critic).config.observation_key
            inputs = obs if isinstance(obs, Mapping) else {key: obs}
            obs = {**inputs, FEATURES: pooled(field.features)}
        try:
            value = critic.bind(obs)
        except KeyError as error:
            keys = list(obs) if isinstance(obs, Mapping) else type(obs).__name__
            error.add_note(
                f"the critic was given {keys}; translate the host's batch with steer(critic_inputs=...)"
            )
            raise
        if self._compiled is not None and not is_dataclass(value):
            raise TypeError(
                "critic.bind: expected a frozen dataclass, whose tensors are all that depends on the "
                f"observation, for the fast path, got {type(value).__name__}; return "
                "qsteer.value(fn, context=obs), or leave compile out"
            )
        if not isinstance(value, Value):
            raise TypeError(
                f"critic.bind: expected a Value, got {type(value).__name__}; return an object with __call__, "
                "repeat and members, such as qsteer.value(fn, context=obs)"
            )
        return value

    def _check_live(self) -> None:
        if not self._replaced:
            raise RuntimeError(
                "handle: expected one in place, got one that was removed; call qsteer.steer again"
            )


def steer(
    policy: Any,
    critic: Bindable,
    rule_or_sampler: Rule | Sampler | None = None,
    *,
    sampler: Sampler | None = None,
    critic_inputs: Callable[[Any], Any] | None = None,
    trace: bool = False,
    compile: Mode | None = None,
) -> Handle:
    """Steer a pretrained policy in place: it keeps its identity and type, and follows the critic from now on.

    The critic sees the host's model space, without padding, up to the steps that are executed. While steered,
    the policy's parameters are frozen and a compiled entry runs uncompiled.

    Cost per action: the host's prefix once, then what rule and sampler say; nothing else is evaluated.

    Args:
        policy: lerobot's pi0, pi0.5 or SmolVLA, a :class:`qsteer.adapters.PlainPolicy`, or any policy that
            says by an attribute ``__qsteer_host__`` (a :class:`Host`) where it keeps its loop.
        critic: a :class:`qsteer.Critic`, a :class:`qsteer.critics.LiveCritic` that goes on learning, or any
            object with ``bind(obs) -> Value``. If its configuration says ``features``, it is given those of
            the policy.
        rule_or_sampler: what bends the velocity, or the sampler when there is no rule to name; None: no rule.
        sampler: makes the action; None: :class:`qsteer.Euler`, the host's own chain. Without a rule either,
            that is the unsteered policy, bit for bit.
        critic_inputs: ``batch -> obs``, when the critic needs something else than the host's batch.
        trace: record each guided step in ``handle.trace``, not only fallbacks.
        compile: ``"graph"`` (CUDA) replays the whole action behind the prefix, critic and gradients included,
            as one CUDA graph, and the critic encodes its observation beside the prefix on a second stream
            (unless it sees the policy's features); ``"static"`` runs the same code eagerly on any device:
            keys and values are not copied at each step, what depends on the time alone is tabulated,
            candidates share one prefix.
            The policy's weights must not change meanwhile; the critic's may, in place. A new kind of action
            (shapes, rule, sampler, critic) is captured and checked when it first comes. All that depends on
            the observation must be in tensors of the value that ``critic.bind`` returns, a frozen dataclass
            such as ``qsteer.value(fn, context=obs)``, with the same ``fn`` each time. None: the host's own
            step, bit for bit.

    Returns:
        The handle that changes the method or takes it away; also a context manager.

    Raises:
        TypeError: an argument is of the wrong kind, nobody knows where the policy keeps its loop, or its step
            cannot be prepared for ``compile``.
        ValueError: the critic is on another device, or sees more than the policy executes; ``compile`` is
            unknown, or "graph" without CUDA.
        MismatchError: (the first action of a kind) the fast path is not what the host does.
        RuntimeError: the policy is steered already, or has real-time chunking enabled.

    Example:
        >>> policy = PI05Policy.from_pretrained("lerobot/pi05_libero_finetuned")  # doctest: +SKIP
        >>> with qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.2)):  # doctest: +SKIP
        ...     action = policy.select_action(batch)
    """
    from qsteer.adapters import host_of

    host = host_of(policy)
    if isinstance(rule_or_sampler, Sampler):
        if sampler is not None:
            raise TypeError(
                f"sampler: expected one, got {rule_or_sampler} and {sampler}; nest them, for example "
                "BestOfN(8, inner=TrustRegion())"
            )
        rule_or_sampler, sampler = None, rule_or_sampler
    rule, sampler = checked_rule(rule_or_sampler), checked_sampler(sampler)
    check_untouched(policy, host)
    check_rtc(policy, host)
    check_critic(critic, policy, host)
    compiled = checked_compile(compile, policy, host)
    return Handle(policy, host, critic, rule, sampler, critic_inputs, Trace(steps=trace), compiled)


def unsteer(policy: Any) -> None:
    """Remove what :func:`steer` installed on ``policy``; a policy that is not steered is left as it is."""
    from qsteer.adapters import host_of

    if (handle := handle_of(policy, host_of(policy))) is not None:
        handle.remove()


def handle_of(policy: Any, host: Host) -> Handle | None:
    """Return the handle that steers ``policy``."""
    owner, name = host.site(policy, host.batch)
    handle = getattr(vars(owner).get(name), "__self__", None)
    return handle if isinstance(handle, Handle) else None


def checked_rule(rule: Any) -> Rule | None:
    """Return ``rule`` if it is one or None."""
    if rule is None or isinstance(rule, Rule):
        return rule
    if isinstance(rule, Sampler):
        raise TypeError(f"rule: expected a rule, got the sampler {rule}; pass sampler={rule}")
    raise TypeError(f"rule: expected a Rule such as qsteer.Tweedie(alpha=0.2) or a Sampler, got {rule!r}")


def checked_sampler(sampler: Any) -> Sampler:
    """Return ``sampler`` if it is one, Euler for None."""
    if sampler is None:
        return Euler()
    if isinstance(sampler, Rule):
        raise TypeError(f"sampler: expected a sampler, got the rule {sampler}; pass it in the rule's place")
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler: expected a Sampler such as qsteer.BestOfN(8), got {sampler!r}")
    return sampler


def checked_compile(mode: Mode | None, policy: Any, host: Host) -> Compiled | None:
    """Return the fast path of this mode, None for None."""
    if mode is None:
        return None
    if mode not in get_args(Mode):
        raise ValueError(f"compile: expected one of {', '.join(get_args(Mode))} or None, got {mode!r}")
    if host.prepare is None:
        raise TypeError(
            "compile: expected a policy whose step can be prepared (PI0Policy, PI05Policy, PlainPolicy), got "
            f"{type(policy).__name__}; leave compile out, or give its Host a prepare"
        )
    devices = {parameter.device for parameter in parameters_of(policy)}
    if mode == "graph" and [device.type for device in devices] != ["cuda"]:
        got = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(
            f"compile: expected a policy on one CUDA device for 'graph', got {got}; use compile='static' or "
            "none"
        )
    return Compiled(mode, host.prepare(policy), next(iter(devices), None))


def check_untouched(policy: Any, host: Host) -> None:
    """Raise unless the instance has the classes' own methods, compiled or not."""
    if (handle := handle_of(policy, host)) is not None:
        raise RuntimeError(
            f"policy: expected one that is not steered, got {handle} on it; change that with its swap(...), "
            "or call qsteer.unsteer(policy) first"
        )
    for path in (host.entry, host.step, host.batch):
        host.read(policy, path)
        owner, name = host.site(policy, path)
        present = vars(owner).get(name)
        if present is not None and not hasattr(present, "_torchdynamo_orig_callable"):
            raise TypeError(
                f"{path}: expected the class's own method, got {present!r} on the instance; remove what "
                "put it there first"
            )


def check_rtc(policy: Any, host: Host) -> None:
    """Raise if real-time chunking is on, which would guide the same velocity towards the previous chunk."""
    if host.rtc is not None and host.read(policy, host.rtc)():
        raise RuntimeError(
            "policy: expected real-time chunking to be off, got it enabled; both guide the same velocity and "
            "one of them would be lost: set policy.config.rtc_config.enabled = False, or remove the steering"
        )


def check_critic(critic: Any, policy: Any, host: Host) -> None:
    """Raise unless the critic can be bound, sits where the policy sits, and sees what the policy executes."""
    if isinstance(critic, type) or not isinstance(critic, Bindable):
        raise TypeError(
            f"critic: expected an object with bind(obs) -> Value, got {critic!r}; use a qsteer.Critic, or "
            "write a class whose bind returns qsteer.value(fn, context=obs)"
        )
    mine, its = parameters_of(policy), parameters_of(critic)
    if any(parameter.is_inference() for parameter in (*mine, *its)):
        raise TypeError(
            "policy, critic: expected ordinary parameters, got some made under torch.inference_mode, through "
            "which no gradient flows; load both outside of it"
        )
    if mine and its and mine[0].device != its[0].device:
        raise ValueError(
            f"critic: expected it on the policy's device, {mine[0].device}, got {its[0].device}; move either"
        )
    seen_by(critic, policy, host)


def sees_features(critic: Any) -> bool:
    """Return whether the critic sees what the policy makes of its observations."""
    return bool(getattr(getattr(critic, "config", None), "features", 0))


def seen_by(critic: Bindable, policy: Any, host: Host) -> tuple[int, int]:
    """Return how many steps and dimensions the critic sees: those executed, unless its horizon is less."""
    executed, dim = host.read(policy, host.executed), host.read(policy, host.action_shape)[-1]
    config = getattr(critic, "config", None)
    steps, width = getattr(config, "horizon", executed), getattr(config, "action_dim", dim)
    if steps > executed or width != dim:
        raise ValueError(
            f"critic: expected one that sees at most the {executed} executed steps and all {dim} dimensions, "
            f"got {steps} steps and {width} dimensions; train one for this policy's {host.executed}"
        )
    return steps, dim

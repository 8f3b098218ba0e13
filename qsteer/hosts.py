"""Where pretrained policies keep their denoising loops, and the velocity fields made of them.

A :class:`Host` is data: dotted names read from a policy, a clock, and how the arguments of its denoising step
are repeated. A :class:`HostField` is the policy's own step, closed over one encoded observation.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from functools import cached_property, partial
from operator import attrgetter
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qsteer.chunking import HeldValue
from qsteer.clock import Chain, Clock, Time
from qsteer.contract import Contract
from qsteer.flow import clamp_time, expand_time, factor, repeat_rows
from qsteer.renoising import DecodedValue, Renoising
from qsteer.types import Bounds, Field, Value

LOCAL = "local"
"""Where a context has the function that a Host's ``local`` names."""

LAST = 1e-6
"""The shortest time to the action over which a predicted action makes a velocity."""


def repeat_context(context: Any, k: int) -> Any:
    """Repeat every row of a step's arguments ``k`` times; one time is the arguments themselves."""
    return context if k == 1 else repeat_rows(context, k)


@dataclass(frozen=True)
class Host:
    """Where a family of policies keeps its denoising loop: data, its paths dotted names read from the policy.

    Args:
        serves: name of the policy class; subclasses are served too.
        entry: method that encodes the observation and integrates.
        step: method that evaluates the velocity once; the entry must call it as an attribute. None: the
            policy has no velocity, and its entry is asked for whole chunks, see :class:`DrawnField`.
        batch: method that receives the observation batch and calls the entry, or is the entry.
        clock: the host's time and sign.
        steps: its configured number of Euler steps, or that number.
        executed: how many steps of a chunk are executed; the critic sees no others.
        first: the step of a chunk at which execution begins; None: the first.
        action_shape: shape of one action without padding, whose last entry is the number of dimensions, or
            that number.
        x: the step's argument that is the noisy chunk (B, H, A).
        t: the step's argument that is the host time (B,).
        num_steps: the entry's argument that overrides ``steps``, if it has one.
        observe: what a critic is bound to, of the batch method's arguments by name; None: the first of them.
        padded: ``action_shape`` counts padding, and the critic must say how many dimensions it sees.
        velocity: ``(policy, context, x, t) -> velocity`` in the host's own convention, where its loop has no
            method for it: of its own modules, which ``step`` is one of. None: ``step`` returns it.
        local: name of a function inside the entry that evaluates the velocity, which ``context`` is given at
            :data:`LOCAL`, for ``velocity``; None: there is none, or it is not needed.
        renoises: ``velocity`` returns the clean action, which the loop puts back on the path from the noise
            where it began: a step is that, and not Euler's, see :mod:`qsteer.renoising`.
        decode: ``(policy, chunk) -> what is executed``, where they differ, differentiable and out of place:
            the critic sees that, and the entry returns it. None: the chunk.
        noise: ``like -> noise`` of further candidates, where it is not standard normal.
        context: ``(arguments of the entry, other arguments of the step) -> context``, for ``velocity``.
        result: what the entry returns for an action; None: the action.
        refuses: ``policy -> what was got``, of a policy of the class that the record does not describe; None
            if it does.
        marks: attributes by which a policy is told from others whose class has the same name.
        chunk: number of steps of a chunk; None: it is not known before an action.
        queue: actions that wait to be executed, a deque or a dict with one at ``action``; None: it has none.
        rtc: method that says whether real-time chunking is on; None: the host has none.
        hold: ``(policy, field, arguments of the entry, noise) -> Field``: the velocity as the host's
            real-time chunking holds it to its former chunk. None: chunking and steering are refused together.
        repeat: ``(context, k)``: the step's other arguments for k rows per observation, rows as in
            :meth:`qsteer.types.Field.repeat`. With k = 1, a context which the step may change as it likes.
        features: what the step's other arguments say of the observations, for learnt maps and critics: a
            tensor (B, F), or tokens (B, L, F) and their mask (B, L); None: nothing.
        layers: the denoiser's list of layers, each of which adds its branches to a residual stream; None:
            it has none, or they are not known.
        reads: the modules of a layer by which its branches read the stream, and nothing else does: the norms
            before attention and feed-forward. Their first argument is the stream.
        prepare: ``policy -> (HostField -> Field)``: the same velocity with all that stays the same between
            steps computed once, for ``steer(compile=...)``; a frozen dataclass whose tensors are all that
            depends on the observations. None: there is none.
        whole: ``policy -> tree`` of what its actions are made with (networks, functions, numbers), if its own
            code up to the first step may be compiled with the rest: it depends on its arguments and these
            alone. None: what comes after is compiled.
        bounds: of the clean actions in model space, ``(low, high)``, or ``policy -> (low, high)``; None:
            they have none. Rules ask the critic within them.
        contract: ``policy -> Contract``: what the policy's observations and actions are, beyond its sizes;
            None: it is not known. Read with :func:`qsteer.adapters.contract_of`.
    """

    serves: str
    entry: str
    step: str | None
    batch: str
    clock: Clock
    steps: str | int
    executed: str
    action_shape: str
    x: str = "x_t"
    t: str = "timestep"
    num_steps: str = "num_steps"
    observe: Callable[[dict[str, Any]], Any] | None = None
    padded: bool = False
    first: Callable[[Any], int] | None = None
    velocity: Callable[[Any, dict[str, Any], Tensor, Tensor], Tensor] | None = None
    local: str | None = None
    renoises: bool = False
    decode: Callable[[Any, Tensor], Tensor] | None = None
    noise: Callable[[Tensor], Tensor] | None = None
    context: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    result: Callable[[Tensor], Any] | None = None
    refuses: Callable[[Any], str | None] | None = None
    marks: tuple[str, ...] = ()
    chunk: str | None = None
    queue: str | None = None
    rtc: str | None = None
    hold: Callable[[Any, "HostField", dict[str, Any], Tensor], Field] | None = None
    repeat: Callable[[Any, int], Any] = repeat_context
    features: Callable[[dict[str, Any]], Any] | None = None
    layers: str | None = None
    reads: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    prepare: Callable[[Any], Callable[["HostField"], Field]] | None = None
    whole: Callable[[Any], Any] | None = None
    bounds: Callable[[Any], Bounds] | Bounds = None
    contract: Callable[[Any], Contract] | None = None

    def read(self, policy: Any, path: str) -> Any:
        """Return what ``path`` names on the policy.

        Raises:
            AttributeError: there is nothing of that name.
        """
        try:
            return attrgetter(path)(policy)
        except AttributeError as error:
            raise AttributeError(
                f"host {self.serves}: expected {path!r} on the policy, got {type(policy).__name__} without "
                f"({error}); its code may have changed: correct the Host record"
            ) from None

    def action_dim(self, policy: Any) -> int:
        """Return the number of an action's dimensions."""
        shape = self.read(policy, self.action_shape)
        return shape if isinstance(shape, int) else shape[-1]

    def begins(self, policy: Any) -> int:
        """Return the step of a chunk at which execution begins."""
        return 0 if self.first is None else self.first(policy)

    def site(self, policy: Any, path: str) -> tuple[Any, str]:
        """Return the object that has the method at ``path``, and the method's name."""
        owner, _, name = path.rpartition(".")
        return (self.read(policy, owner) if owner else policy), name

    def empty_queue(self, policy: Any) -> None:
        """Drop the actions that wait to be executed: the next one is sampled."""
        if self.queue is not None:
            queue = self.read(policy, self.queue)
            (queue["action"] if isinstance(queue, Mapping) else queue).clear()

    def own(self, policy: Any, path: str) -> MethodType:
        """Return the method at ``path`` as the class has it, whatever the instance carries."""
        self.read(policy, path)
        owner, name = self.site(policy, path)
        return MethodType(getattr(type(owner), name), owner)


@contextmanager
def cut(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let no gradient pass into ``modules``, in the block and in this thread; values are untouched.

    Their first argument is detached by hooks, which are gone after the block.

    Raises:
        RuntimeError: some of them were not called in the block.
    """
    mine, met = get_ident(), set()

    def detach(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if get_ident() != mine:
            return None  # another thread's call
        met.add(module)
        return (args[0].detach(), *args[1:])

    hooks = [module.register_forward_pre_hook(detach) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if len(met) < len(set(modules)):
        raise RuntimeError(
            f"gradient: expected the step to call all {len(set(modules))} modules of its early layers, got "
            f"{len(met)}; correct the layers and reads of the Host record"
        )


@dataclass(frozen=True)
class HostField(Field):
    """A host's velocity for the observations it has just encoded."""

    host: Host
    step: MethodType
    context: dict[str, Any]
    policy: Any
    clock: Clock
    bypassed: tuple[nn.Module, ...] = ()
    fixed: Bool[Tensor, "B H"] | None = None
    """Steps that a policy trained with real-time chunking is given, at the action's time; None: none."""
    given: Float[Tensor, "B H A"] | None = None
    """What they are."""
    memory: Renoising | None = attribute(default=None, repr=False, compare=False)
    """Of a chain whose host renoises."""
    _repeats: dict[int, "HostField"] = attribute(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def features(self) -> Any:
        """What the host made of its observations; None: its record does not say."""
        return None if self.host.features is None else self.host.features(self.context)

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]
        """What the host's record says of its actions."""
        return bounds_of(self.host, self.policy)

    @property
    def held(self) -> bool:  # type: ignore[override]
        """Whether the policy is given steps of its chunk."""
        return self.fixed is not None

    @cached_property
    def dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """The coarsest dtype of the step's parameters; None: it has none."""
        found = {p.dtype for p in parameters_of(self.step.__self__) if p.is_floating_point()}
        return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    def __call__(self, x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Run the host's step, on a context that it may change."""
        context, given = self.host.repeat(self.context, 1), x
        time = expand_time(self.clock.to_host(t), x, torch.float32)
        if self.fixed is not None and self.given is not None:
            x = torch.where(self.fixed[..., None], self.given, x)
            time = torch.where(self.fixed, self.clock.action, time[:, None])
        with cut(self.bypassed):
            if self.host.velocity is not None:
                v = self.host.velocity(self.policy, context, x, time)
            else:
                v = self.step(**context, **{self.host.x: x, self.host.t: time})
        if self.host.renoises:
            action, v = v, (v - x) / factor(clamp_time(1 - t, LAST), x)
            if self.memory is not None:
                self.memory.remember(x, t, v, action)
        v = self.clock.velocity(v)
        if self.fixed is None:
            return v
        return torch.where(self.fixed[..., None], (x - given).detach() / factor(1 - t, x), v)

    def draws(self, noise: Float[Tensor, "B H A"], n: int) -> Float[Tensor, "B n H A"]:
        """Return where n further candidates of each row begin, by the host's kind of noise."""
        if self.host.noise is None:
            return super().draws(noise, n)
        return self.host.noise(noise.repeat_interleave(n, 0)).unflatten(0, (-1, n))

    def chain(self, steps: int | None, part: Chain | None = None) -> "HostField":
        """Return the field for one chain, which remembers its noise if the host renoises."""
        if not self.host.renoises:
            return self
        return replace(self, memory=Renoising(self.clock, steps) if part is None else None)

    def advance(
        self, x: Float[Tensor, "B H A"], v: Float[Tensor, "B H A"], t: Time, dt: Time
    ) -> Float[Tensor, "B H A"]:
        """Return the state after a step by the velocity ``v``: the host's own step in a chain of its own."""
        renoised = None if self.memory is None else self.memory.step(x, v, t)
        return super().advance(x, v, t, dt) if renoised is None else renoised

    def with_given(self, noise: Float[Tensor, "B H A"], time: Tensor | None) -> "HostField":
        """Return the field of a chain that begins at ``noise``, and at these host times, (B,) or (B, H).

        Where there is one for each step of the chunk, those at the action's time are given.

        Raises:
            ValueError: they are others in other rows.
        """
        if time is None or time.ndim < 2:
            return self
        fixed = time == self.clock.action
        if not torch.equal(fixed, fixed[:1].expand_as(fixed)):
            raise ValueError(
                f"{self.host.step}: expected the same steps of a chunk to be given in all rows, got "
                f"{fixed.sum(1).tolist()} of them; ask for chunks of one delay at a time"
            )
        return replace(self, fixed=fixed, given=noise)

    def judged(self, value: Value) -> Value:
        """Return the value of what is executed of a chunk whose fixed steps are what they are."""
        if self.host.decode is not None:
            value = DecodedValue(value, partial(self.host.decode, self.policy))
        if self.fixed is None or self.given is None:
            return value
        return HeldValue(value, self.given, self.fixed[0, :, None].to(self.given.dtype))

    def truncated(self, layers: int) -> "HostField":
        """Return the same velocity, whose gradient runs through the last ``layers`` of the denoiser's layers.

        The branches of the layers before are constants to it, which leaves the residual stream: their own
        derivative is the identity, and they cost no backward. With all layers it is the whole gradient.

        Raises:
            ValueError: the host's record names no layers, or there are fewer.
        """
        if self.host.layers is None:
            raise ValueError(
                f"host {self.host.serves}: expected a record that names the denoiser's layers, got "
                "layers=None; set it if they add to a residual stream, or leave Tweedie's layers out"
            )
        every = self.host.read(self.policy, self.host.layers)
        if not 1 <= layers <= len(every):
            raise ValueError(
                f"layers: expected 1 to {len(every)}, which {self.host.serves} has, got {layers}"
            )
        early = every[: len(every) - layers]
        return replace(
            self, bypassed=tuple(self.host.read(layer, name) for layer in early for name in self.host.reads)
        )

    def repeat(self, k: int) -> "HostField":
        """Return the field for ``k`` rows per observation; nothing is encoded again, and repeated once."""
        if k not in self._repeats:
            fixed, given = repeat_rows((self.fixed, self.given), k)
            self._repeats[k] = replace(
                self, context=self.host.repeat(self.context, k), fixed=fixed, given=given, memory=None
            )
        return self._repeats[k]


@dataclass(frozen=True)
class DrawnField(Field):
    """A policy without a velocity: its own chunk stands in the noise's place, and no step moves it.

    Selection and finished moves work on it (:class:`~qsteer.BestOfN`, :class:`~qsteer.RandomOfN`,
    :class:`~qsteer.TrustRegion`); further candidates are further calls of the policy.

    Attributes:
        again: ``() -> (B, H, A)``: what the policy draws anew for the same observations.
        bounds: of its actions.
    """

    again: Callable[[], Tensor]
    bounds: Bounds = None
    clock: Clock = Clock(steps=1)  # noqa: RUF009 (frozen)

    def __call__(self, x: Float[Tensor, "B H A"], t: Time) -> Float[Tensor, "B H A"]:
        """Return zeros: the chunk is finished."""
        return torch.zeros_like(x)

    def repeat(self, k: int) -> "DrawnField":
        """Return the field: it is the same for all rows."""
        return self

    def draws(self, noise: Float[Tensor, "B H A"], n: int) -> Float[Tensor, "B n H A"]:
        """Return n more chunks of the policy for each row; warns if they are all the same."""
        drawn = torch.stack([self.again() for _ in range(n)], 1)
        rows = len(noise) // len(drawn)
        if rows > 1:  # candidates of candidates
            more = [torch.stack([self.again() for _ in range(n)], 1) for _ in range(rows - 1)]
            drawn = torch.stack([drawn, *more], 1).flatten(0, 1)
        if n and torch.allclose(drawn, noise[:, None].expand_as(drawn), atol=1e-6):  # up to rounding
            warnings.warn(
                f"policy: expected one that samples, got the same chunk {n + 1} times: there is nothing to "
                "select from; give it a temperature, or take a policy that draws its actions",
                RuntimeWarning,
                skip_file_prefixes=(os.path.dirname(__file__),),
            )
        return drawn


def is_bound(function: Any) -> bool:
    """Return whether it is a bound method."""
    return isinstance(function, MethodType)


def places_of(policy: Any, host: Host, path: str, wrappers: tuple[Any, ...] = ()) -> list[tuple[Any, str]]:
    """Return where an instance is asked for a method: its owner, and what was bound when it was constructed.

    A policy or what is around it may keep a bound method, compiled or not (``self._sample_actions =
    model.sample_actions``, as openpi's ``Policy`` does).
    """
    owner, name = host.site(policy, path)
    own = getattr(type(owner), name)
    kept = [
        (holder, attribute)
        for holder in {id(each): each for each in (policy, owner, *wrappers)}.values()
        for attribute, kept in vars(holder).items()
        if isinstance(held := inspect.unwrap(kept, stop=is_bound), MethodType)
        and held.__self__ is owner
        and held.__func__ is own
    ]
    return [(owner, name), *(place for place in kept if place[0] is not owner or place[1] != name)]


def local_function(name: str) -> Callable[..., Tensor]:
    """Return a function of that name inside one of the functions that are running in this thread.

    Raises:
        RuntimeError: there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if callable(found := frame.f_locals.get(name)):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        f"local: expected a function {name!r} in the host's loop, got none; correct its record"
    )


def bounds_of(host: Host, policy: Any) -> Bounds:
    """Return what a policy's record says of the bounds of its actions."""
    return host.bounds(policy) if callable(host.bounds) else host.bounds


def parameters_of(module: Any) -> list[nn.Parameter]:
    """Return the parameters of a module, or of what has them like one; anything else has none."""
    parameters = getattr(module, "parameters", None)
    return list(parameters()) if callable(parameters) else []

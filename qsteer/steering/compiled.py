"""The fast path: whole actions on buffers that stay where they are, replayed as one CUDA graph.

An action is a function of tensors: the prefix, the critic's encoding of the observation, the noise. Given
buffers for these, the same rule and sampler run the same kernels on the same addresses for every action, so
that on CUDA they can be captured once and replayed as one graph, ten Euler steps, critic, backward passes and
all. :class:`Compiled` keeps one :class:`~qsteer.compiling.runs.Run` for each kind of action it meets.

Without a graph (``"static"``) the same code runs eagerly, on any device: the reference for the graph.
"""

from collections.abc import Callable, Hashable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.compiling.hidden import FAR, known, leaves_of
from qsteer.compiling.kept import Kept, Mode, check_mode
from qsteer.compiling.kinds import behind, state_of, tensors_in
from qsteer.compiling.runs import Kind, MismatchError, Run, check_alike
from qsteer.hosts import Host, parameters_of
from qsteer.sampling import steered_action
from qsteer.trace import Trace
from qsteer.types import Field, Rule, Sampler, Value


class Compiled:
    """Samples actions like :func:`qsteer.sample`, on static buffers.

    Fields and values must be frozen dataclasses, whose tensors are copied into the buffers and whose other
    parts (networks, numbers) make the kind of action; a kind that is new is captured anew.

    Args:
        mode: see :class:`~qsteer.compiling.kept.Kept`.
        make_prepare: returns what makes of a field the same with all that does not change between steps
            computed once; called anew when the weights have changed.
        policy: whose fields they are.
        device: where the policy is; for a graph, on CUDA.
    """

    def __init__(
        self,
        mode: Mode,
        make_prepare: Callable[[], Callable[[Any], Field]],
        policy: Any = None,
        device: torch.device | None = None,
    ) -> None:
        self.kept = Kept(mode)
        self.make_prepare, self.policy, self.device = make_prepare, policy, device
        self._prepare: Callable[[Any], Field] | None = None
        self._state: Hashable = None  # a policy that is being copied has none yet
        self._beside: dict[Any, torch.cuda.Stream] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        """Return one that has captured nothing: what was captured runs on this one's networks."""
        make, policy = deepcopy((self.make_prepare, self.policy), memo)
        return Compiled(self.kept.mode, make, policy, self.device)

    @property
    def mode(self) -> Mode:
        """How actions are made."""
        return self.kept.mode

    @property
    def runs(self) -> list[Run]:
        """The kinds of action that are kept, least recently used first."""
        return self.kept.runs

    @property
    def streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The stream in use, and its own for what may be computed beside the policy's prefix."""
        current = torch.cuda.current_stream(self.device)
        if current not in self._beside:
            self._beside[current] = torch.cuda.Stream(self.device)
        return current, self._beside[current]

    def __call__(
        self,
        field: Field,
        value: Value,
        noise: Float[Tensor, "B H A"],
        rule: Rule | None,
        sampler: Sampler,
        trace: Trace,
    ) -> Float[Tensor, "B H A"]:
        """Sample actions; arguments as of :func:`qsteer.sample`.

        When a kind of action is new, the prepared field is compared with ``field``, and all tensors that
        enter the action are looked at.

        Raises:
            MismatchError: the two fields differ, or a graph does not do what was captured.
            RuntimeError: the action is part of another one of this policy.
            TypeError: a tensor enters the action that is none of its inputs, nor a network's.
        """
        prepared = self.prepare()(field)
        inputs = prepared, value, noise

        def act(inputs: tuple[Field, Value, Tensor]) -> Tensor:
            return steered_action(*inputs, rule=rule, sampler=sampler)

        def make() -> Kind:
            check_field(prepared, field, noise)
            made = [part for part in behind(self._prepare, FAR) if isinstance(part, Tensor)]
            networks = known(self.policy, leaves_of(self.policy), self._prepare, inputs, rule, sampler)
            return Kind(act, inputs, rule, trace.wanted, made + networks, noise.device)

        return self.kept(inputs, (rule, sampler, id(rule), id(sampler)), noise.device, make, trace)

    def prepare(self) -> Callable[[Any], Field]:
        """Return what prepares a field; made anew if the policy has changed since."""
        with self.kept.alone():
            if self._prepare is None or state_of(self.policy) != self._state:
                self._prepare = self.make_prepare()
                self._state = state_of(self.policy)
                self.kept.clear()
            return self._prepare

    def whole(
        self, act: Callable[[Any], Tensor], inputs: Any, method: Any, rule: Rule | None, trace: Trace
    ) -> Float[Tensor, "B H A"]:
        """Make an action together with all that comes before its first step.

        Args:
            act: makes it of the inputs.
            inputs: a tree, what the policy was given; with a tensor.
            method: a tree of what it is made with: networks, functions, rule and sampler, numbers.
            rule: of the method.
            trace: is told what was done.

        Raises:
            MismatchError, RuntimeError, TypeError: as for a call.
        """
        device = tensors_in(inputs)[0].device

        def make() -> Kind:
            weights = known(self.policy, leaves_of(self.policy), method)
            return Kind(act, inputs, rule, trace.wanted, weights, device)

        return self.kept(inputs, method, device, make, trace)


def check_field(field: Field, host_field: Field, noise: Float[Tensor, "B H A"]) -> None:
    """Raise unless a prepared field is the host's own step, gradient included, at one time of its grid."""
    if field is host_field:
        return
    if field.bounds != host_field.bounds:
        raise MismatchError(
            f"compile: expected the prepared field's bounds to be the host's {host_field.bounds}, got "
            f"{field.bounds}; forward them in what Host.prepare makes"
        )
    draw = torch.Generator(noise.device).manual_seed(0)
    x, direction = (torch.randn(noise.shape, generator=draw, device=noise.device).to(noise) for _ in range(2))
    times = [t for t, _ in host_field.clock.grid()]
    t = times[len(times) // 3]
    found = []
    for each in (field, host_field):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = each(x, t)
            found.append((v.detach(), torch.autograd.grad(v, x, direction)[0]))
    for name, prepared, own in zip(("velocity", "velocity's gradient"), *found, strict=True):
        check_alike(f"the prepared {name}", prepared, own, tensors_in(field))


def checked_compile(mode: Mode | None, policy: Any, host: Host) -> Compiled | None:
    """Return the fast path of this mode, None for None."""
    if mode is None:
        return None
    check_mode(mode)
    if host.prepare is None:
        raise TypeError(
            "compile: expected a policy whose step can be prepared (PI0Policy, PI05Policy, SmolVLAPolicy, "
            f"PlainPolicy), got {type(policy).__name__}; leave compile out, or give its Host a prepare"
        )
    devices = {parameter.device for parameter in parameters_of(policy)}
    if mode == "graph" and [device.type for device in devices] != ["cuda"]:
        got = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(
            f"compile: expected a policy on one CUDA device for 'graph', got {got}; use compile='static' or "
            "none"
        )
    make = partial(host.prepare, policy)
    compiled = Compiled(mode, make, policy, next(iter(devices), None))
    compiled.prepare()  # a policy that cannot be prepared is refused here
    return compiled

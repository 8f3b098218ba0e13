"""What :func:`qsteer.steer` and :func:`qsteer.open_action` refuse."""

import os
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from qsteer.adapters import contract_of
from qsteer.contract import Contract, check_contract
from qsteer.hosts import Host, parameters_of
from qsteer.samplers import BestOfN, Euler, KeepBest, RandomOfN, TrustRegion
from qsteer.sampling import nested
from qsteer.types import Bindable, Rule, Sampler

WITHOUT_VELOCITY = (Euler, BestOfN, RandomOfN, TrustRegion, KeepBest)
"""Samplers that select among finished chunks, or move them."""


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


def check_methods(policy: Any, host: Host) -> None:
    """Raise unless the instance has the classes' own methods, compiled or not."""
    for path in (host.entry, host.step or host.entry, host.batch):
        host.read(policy, path)
        owner, name = host.site(policy, path)
        present = vars(owner).get(name)
        if present is not None and not hasattr(present, "_torchdynamo_orig_callable"):
            raise TypeError(
                f"{path}: expected the class's own method, got {present!r} on the instance; remove what "
                "put it there first"
            )


def check_velocity(host: Host, rule: Rule | None, sampler: Sampler) -> None:
    """Raise unless a policy without a velocity is given a method that needs none."""
    others = [each for each in nested(sampler) if not isinstance(each, WITHOUT_VELOCITY)]
    if host.step is None and (rule is not None or others):
        raise TypeError(
            f"policy: expected one with a velocity field for {rule or others[0]}, got {host.serves}, whose "
            "record names none; leave the rule out, and select among its chunks: sampler=BestOfN(8), "
            "RandomOfN(8), or TrustRegion(0.3), which moves the finished chunk"
        )


def check_kind(policy: Any, host: Host) -> None:
    """Raise unless the record describes this policy, not only its class."""
    if host.refuses is not None and (got := host.refuses(policy)) is not None:
        raise TypeError(
            f"policy: expected a {host.serves} that integrates a velocity by Euler's method, got {got}"
        )


def check_rtc(policy: Any, host: Host) -> None:
    """Raise if real-time chunking is on, and nothing is known of how the host guides by it."""
    if chunks(policy, host) and host.hold is None:
        raise RuntimeError(
            "policy: expected real-time chunking to be off, got it enabled; both guide the same velocity and "
            "one of them would be lost: set policy.config.rtc_config.enabled = False, remove the steering, "
            "or give its Host a hold"
        )


def chunks(policy: Any, host: Host) -> bool:
    """Return whether real-time chunking is on."""
    return host.rtc is not None and bool(host.read(policy, host.rtc)())


def warn_of_dropout(policy: Any) -> None:
    """Warn of a policy that drops units out: each velocity is another network's."""
    modules = policy.modules() if isinstance(policy, nn.Module) else ()
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules):
        warnings.warn(
            "policy: expected one in eval mode, got dropout in training mode, which makes the Jacobian and "
            "every finite difference random; call policy.eval()",
            RuntimeWarning,
            skip_file_prefixes=(os.path.dirname(os.path.dirname(__file__)),),
        )


def check_executed(executed: Any, policy: Any, host: Host) -> None:
    """Raise unless a chunk has as many steps; None passes."""
    if executed is None:
        return
    if not isinstance(executed, int) or isinstance(executed, bool):
        raise TypeError(f"executed: expected a whole number of steps, got {executed!r}; pass an int")
    chunk = None if host.chunk is None else host.read(policy, host.chunk)
    if executed < 1 or (chunk is not None and executed > chunk):
        most = "" if chunk is None else f" to {chunk}, the steps of the policy's chunk"
        raise ValueError(f"executed: expected 1{most or ' or more'}, got {executed}")


def check_num_steps(name: str, steps: Any) -> None:
    """Raise unless it is a number of Euler steps."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"{name}: expected a whole number of Euler steps, got {steps!r}; pass an int")
    if steps < 1:
        raise ValueError(f"{name}: expected at least 1 Euler step, got {steps}")


def check_critic(
    critic: Any, policy: Any, host: Host, executed: int | None = None, own_inputs: bool = False
) -> None:
    """Raise unless the critic can be bound, sits where the policy sits, and was trained for such a policy.

    With ``own_inputs`` the critic's observations do not come from the policy's batch.
    """
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
    read_sizes(critic, policy, host, executed)
    theirs = contract_of(policy)
    if executed is not None:
        theirs = replace(theirs, horizon=executed)
    if own_inputs:
        theirs = replace(theirs, observations=None, observation_normalisation=None)
        theirs = replace(theirs, observation_mean=None, observation_std=None)
    check_contract(read_contract(critic), theirs)


def read_contract(critic: Bindable) -> Contract | None:
    """Return the contract in a critic's configuration, if there is one."""
    found = getattr(getattr(critic, "config", None), "contract", None)
    return found if isinstance(found, Contract) else None


class CriticInputs(NamedTuple):
    """What a critic's configuration says that it sees; None: nothing is said."""

    horizon: int | None = None
    action_dim: int | None = None
    features: int = 0
    observation_key: str = "observation.state"


def read_inputs(critic: Bindable) -> CriticInputs:
    """Return what a critic's configuration says; it may lack any of the names, or be missing."""
    config, silent = getattr(critic, "config", None), CriticInputs()
    return CriticInputs(*(getattr(config, name, getattr(silent, name)) for name in silent._fields))


def read_sizes(critic: Bindable, policy: Any, host: Host, executed: int | None = None) -> tuple[int, int]:
    """Return how many steps and dimensions the critic sees: those executed, unless its horizon is less.

    Args:
        critic: what sees.
        policy: what acts.
        host: where it keeps its loop.
        executed: number of steps executed, all of which the critic is to see; None: the policy's own number,
            of which it may see less.

    Raises:
        ValueError: the critic sees other ones.
    """
    limit = host.read(policy, host.executed) if executed is None else executed
    dim = host.action_dim(policy)
    inputs = read_inputs(critic)
    if host.padded:
        if inputs.action_dim is None or not 1 <= inputs.action_dim <= dim:
            raise ValueError(
                f"critic: expected one whose config.action_dim says how many of {host.serves}'s {dim} padded "
                f"dimensions are the robot's, got {inputs.action_dim}; set it to the robot's"
            )
        dim = inputs.action_dim
    steps = limit if inputs.horizon is None else inputs.horizon
    width = dim if inputs.action_dim is None else inputs.action_dim
    if steps > limit or width != dim:
        raise ValueError(
            f"critic: expected one that sees at most the {limit} executed steps and all {dim} dimensions, "
            f"got {steps} steps and {width} dimensions; train one for this policy's "
            + (host.executed if executed is None else f"executed={executed}")
        )
    if executed is not None and steps < executed:
        raise ValueError(
            f"critic: expected one that sees all {executed} executed steps, got a horizon of {steps}, with "
            "which the steps after it are not steered; train one of that horizon, or leave executed out to "
            "accept it"
        )
    return steps, dim

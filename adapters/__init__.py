"""Hosts: where policies keep their denoising loops. Data, one file per family; no host is imported.

A policy of your own needs no entry here: give its class, or the object, an attribute ``__qsteer_host__``, a
:class:`Host`, which :func:`qsteer.steer` reads. A velocity function becomes a policy by :class:`PlainPolicy`.
"""

from inspect import getattr_static
from typing import Any

from qsteer.adapters import dit, drawing, eo1, evo1, groot, lerobot, molmoact2, openpi, vla_jepa, wall_x, xvla
from qsteer.adapters.plain import PlainPolicy
from qsteer.contract import Contract
from qsteer.hosts import Host

FAMILIES = lerobot, groot, dit, vla_jepa, evo1, eo1, xvla, molmoact2, wall_x, openpi, drawing
HOSTS = tuple(host for family in FAMILIES for host in family.HOSTS)

__all__ = ["HOSTS", "Host", "PlainPolicy", "contract_of", "host_of", "unwrapped"]


def unwrapped(policy: Any) -> tuple[Any, Host, tuple[Any, ...]]:
    """Return the policy inside its wrappers, where it keeps its loop, and the wrappers, outermost first.

    Wrappers are those of ``torch.compile``, ``DistributedDataParallel`` and PEFT, and openpi's ``Policy``. A
    policy's host is what it says itself, else goes by the names of its classes.

    Raises:
        TypeError: no record describes it.
    """
    inner: Any = policy
    around: list[Any] = []
    while inner is not None:
        if (host := record_of(inner)) is not None:
            return inner, host, tuple(around)
        around.append(inner)
        inner = inside(inner)
    if isinstance(host := getattr(policy, "__qsteer_host__", None), Host):
        return policy, host, ()  # which it hands on from somewhere
    names = " around ".join(type(each).__name__ for each in around)
    known = ", ".join(host.serves for host in HOSTS)
    raise TypeError(
        f"policy: expected one of {known} or a subclass, got {names}; wrap its velocity in "
        "qsteer.adapters.PlainPolicy, or set policy.__qsteer_host__ = qsteer.adapters.Host(...)"
    )


def host_of(policy: Any) -> Host:
    """Return where ``policy`` keeps its loop; see :func:`unwrapped`."""
    return unwrapped(policy)[1]


def contract_of(policy: Any) -> Contract:
    """Return what a policy's observations and actions are, as far as its Host record can say.

    Raises:
        TypeError: no record describes it.
    """
    policy, host, _ = unwrapped(policy)
    dim = None if host.padded else host.action_dim(policy)
    sizes = Contract(horizon=host.read(policy, host.executed), action_dim=dim)
    return sizes if host.contract is None else sizes | host.contract(policy)


def record_of(policy: Any) -> Host | None:
    """Return the record of a policy itself, not of what its ``__getattr__`` hands on."""
    if isinstance(getattr_static(policy, "__qsteer_host__", None), Host | property):
        return policy.__qsteer_host__
    names = [cls.__name__ for cls in type(policy).__mro__]
    return next(
        (
            host
            for name in names
            for host in HOSTS
            if host.serves == name and all(hasattr(policy, mark) for mark in host.marks)
        ),
        None,
    )


def inside(wrapper: Any) -> Any:
    """Return what a wrapper is around; None: it is no known wrapper."""
    if hasattr(type(wrapper), "get_base_model"):
        return wrapper.get_base_model()
    if "_sample_actions" in (kept := getattr(wrapper, "__dict__", {})):
        return kept.get("_model")  # openpi's Policy
    parts = getattr(wrapper, "_modules", {})
    return parts.get("_orig_mod", parts.get("module"))

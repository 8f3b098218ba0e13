"""Hosts: where policies keep their denoising loops. Data, one file per family; no host is imported.

A policy of your own needs no entry here: give its class, or the object, an attribute ``__qsteer_host__``, a
:class:`Host`, which :func:`qsteer.steer` reads. A velocity function becomes a policy by :class:`PlainPolicy`.
"""

from inspect import getattr_static
from typing import Any

from qsteer.adapters.lerobot import HOSTS
from qsteer.adapters.plain import PlainPolicy
from qsteer.contract import Contract
from qsteer.hosts import Host

__all__ = ["HOSTS", "Host", "PlainPolicy", "contract_of", "host_of", "unwrapped"]


def unwrapped(policy: Any) -> tuple[Any, Host, tuple[str, ...]]:
    """Return the policy inside its wrappers, where it keeps its loop, and the names of the wrappers.

    Wrappers are those of ``torch.compile``, ``DistributedDataParallel`` and PEFT, outermost first. A policy's
    host is what it says itself, else goes by the names of its classes.

    Raises:
        TypeError: no record describes it.
    """
    inner: Any = policy
    around: list[str] = []
    while inner is not None:
        if (host := record_of(inner)) is not None:
            return inner, host, tuple(around)
        around.append(type(inner).__name__)
        inner = inside(inner)
    if isinstance(host := getattr(policy, "__qsteer_host__", None), Host):
        return policy, host, ()  # which it hands on from somewhere
    known = ", ".join(host.serves for host in HOSTS)
    raise TypeError(
        f"policy: expected one of {known} or a subclass, got {' around '.join(around)}; wrap its velocity in "
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
    shape = host.read(policy, host.action_shape)
    sizes = Contract(horizon=host.read(policy, host.executed), action_dim=shape[-1])
    return sizes if host.contract is None else sizes | host.contract(policy)


def record_of(policy: Any) -> Host | None:
    """Return the record of a policy itself, not of what its ``__getattr__`` hands on."""
    if isinstance(getattr_static(policy, "__qsteer_host__", None), Host | property):
        return policy.__qsteer_host__
    names = [cls.__name__ for cls in type(policy).__mro__]
    return next((host for name in names for host in HOSTS if host.serves == name), None)


def inside(wrapper: Any) -> Any:
    """Return what a wrapper is around; None: it is no known wrapper."""
    if hasattr(type(wrapper), "get_base_model"):
        return wrapper.get_base_model()
    parts = getattr(wrapper, "_modules", {})
    return parts.get("_orig_mod", parts.get("module"))

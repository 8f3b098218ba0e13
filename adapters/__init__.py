"""Hosts: where policies keep their denoising loops. Data, one file per family; no host is imported.

A policy of your own needs no entry here: give its class, or the object, an attribute ``__qsteer_host__``, a
:class:`Host`, which :func:`qsteer.steer` reads. A velocity function becomes a policy by :class:`PlainPolicy`.
"""

from typing import Any

from qsteer.adapters.lerobot import HOSTS
from qsteer.adapters.plain import PlainPolicy
from qsteer.contract import Contract
from qsteer.hosts import Host

__all__ = ["HOSTS", "Host", "PlainPolicy", "contract_of", "host_of"]


def host_of(policy: Any) -> Host:
    """Return where ``policy`` keeps its loop: what it says itself, else by the names of its classes.

    Raises:
        TypeError: no record describes it.
    """
    host = getattr(policy, "__qsteer_host__", None)
    if isinstance(host, Host):
        return host
    for cls in type(policy).__mro__:
        for host in HOSTS:
            if host.serves == cls.__name__:
                return host
    known = ", ".join(host.serves for host in HOSTS)
    raise TypeError(
        f"policy: expected one of {known} or a subclass, got {type(policy).__name__}; wrap its velocity in "
        "qsteer.adapters.PlainPolicy, or set policy.__qsteer_host__ = qsteer.adapters.Host(...)"
    )


def contract_of(policy: Any) -> Contract:
    """Return what a policy's observations and actions are, as far as its Host record can say.

    Raises:
        TypeError: no record describes it.
    """
    host = host_of(policy)
    shape = host.read(policy, host.action_shape)
    sizes = Contract(horizon=host.read(policy, host.executed), action_dim=shape[-1])
    return sizes if host.contract is None else sizes | host.contract(policy)

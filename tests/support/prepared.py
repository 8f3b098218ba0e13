"""A host's field and the prepared one, and what is compared of them."""

from typing import Any

import hosts
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters import host_of
from qsteer.adapters.experts import ExpertField
from qsteer.hosts import HostField


def prepare(policy: nn.Module) -> Any:
    """What prepares the fields of a policy."""
    return host_of(policy).prepare(policy)


def fields(policy: nn.Module, rows: int = 2, **changed: Tensor) -> tuple[HostField, ExpertField]:
    """The host's field, and the prepared one, for random observations."""
    own = qsteer.open_action(policy, hosts.observe(policy, rows) | changed).field
    return own, prepare(policy)(own)


def pulled(field: qsteer.Field, x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
    """The velocity, and its vector-Jacobian product in a fixed direction."""
    x = x.clone().requires_grad_()
    v = field(x, t)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return v.detach(), torch.autograd.grad(v, x, direction)[0]

"""Gradients through the last layers of a steered host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hosts
import torch
from hosts import chunk
from torch import Tensor, nn

from qsteer.flow import denoise
from qsteer.hosts import HostField
from qsteer.steering.handle import steer


@contextmanager
def bound(policy: nn.Module, rows: int = 2) -> Iterator[tuple[HostField, Any, Tensor, Tensor]]:
    """The field and value of a steered host, noise, and a time."""
    seen: list = []
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        chunk(policy, rows)
        field, value, x = seen[0]
        yield field, value, x, 0.5


def layers_of(field: HostField) -> nn.ModuleList:
    return field.host.read(field.policy, field.host.layers)


def gradient_of(field: Any, value: Any, x: Tensor, t: Tensor) -> Tensor:
    """Of the value of the denoised action; what a rule computes, written again."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(value(denoise(x, field(x, t), t)).sum(), x)[0]


def hooks(policy: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in policy.modules())

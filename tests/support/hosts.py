"""The hosts that tests run on: lerobot's, tiny and random, and a plain one; and a critic of known optimum."""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy, host_of
from qsteer.clock import MIRRORED
from qsteer.testing import heads, vlas
from qsteer.testing import hosts as random_hosts
from qsteer.types import Field, Sampler, Value

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
torch.set_num_threads(1)

LEROBOT = ("pi0", "pi05", "smolvla")
HOSTS = (*LEROBOT, "plain")
VLAS = ("eo1", "xvla", "molmoact2", "wall_x")
HEADS = ("multi_task_dit", "vla_jepa", "groot", *VLAS)
"""Whose noise is their own, and which no fast path knows."""
ALL_HEADS = (*HEADS, "evo1")
"""With Evo1, whose attention rounds differently when its parameters are frozen: adapters/test_heads.py."""
STRONG = qsteer.Tweedie(alpha=0.3, clip=None)
"""A rule whose effect is seen."""


class Velocity(nn.Module):
    """Noise minus action, as the pi family has it; depends on all it is given, and not linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(15 + 1 + 4, 32), nn.Tanh(), nn.Linear(32, 15))

    def forward(self, x: Tensor, t: Tensor, obs: dict[str, Tensor]) -> Tensor:
        inputs = torch.cat(
            [x.flatten(1), t[:, None].to(x.dtype), obs["observation.state"].to(x.dtype)], dim=1
        )
        return self.net(inputs).view_as(x)


class Plain(PlainPolicy):
    """5 steps of 3 dimensions, 4 executed."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(Velocity(), horizon=5, action_dim=3, executed=4, clock=MIRRORED)


def build(name: str, seed: int = 0) -> nn.Module:
    """A new host; other seeds, other weights."""
    if name in ALL_HEADS:
        pytest.importorskip("diffusers")
        if name == "wall_x":
            for package in ("torchdiffeq", "peft", "qwen_vl_utils"):
                pytest.importorskip(package)
        return getattr(vlas if name in VLAS else heads, name)(seed=seed)
    return Plain(seed) if name == "plain" else getattr(random_hosts, name)(seed=seed)


@cache
def shared(name: str) -> nn.Module:
    """One host per process, for tests that leave it as they found it."""
    return build(name)


def observe(policy: nn.Module, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """A random batch."""
    if isinstance(policy, PlainPolicy):
        return {"observation.state": torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))}
    if is_head(policy):
        return (vlas if policy.name in VLAS else heads).observe(policy, rows, seed)
    return random_hosts.batch(policy, rows, seed)


def draw(policy: nn.Module, rows: int = 1, seed: int = 0) -> Tensor:
    """Noise of the padded shape."""
    shape = policy.action_shape if isinstance(policy, PlainPolicy) else (6, 5)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def is_head(policy: nn.Module) -> bool:
    """Whether a policy draws its own noise."""
    return getattr(policy, "name", None) in ALL_HEADS


def chunk(policy: nn.Module, rows: int = 2, seed: int = 0) -> Tensor:
    """An action of the policy's own entry, for observations and noise of a seed."""
    batch = observe(policy, rows, seed)
    if not is_head(policy):
        return plan(policy, batch, draw(policy, rows, seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return plan(policy, batch)


def plan(policy: nn.Module, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
    """A chunk of the policy, whose noise is its own where it is None."""
    if not is_head(policy):
        return policy.predict_action_chunk(batch, noise=noise)
    for name, queue in getattr(policy, "_queues", {}).items():
        queue.clear()
        if name in batch:  # a history, which select_action would have filled
            queue.extend([batch[name]] * queue.maxlen)
    return policy.predict_action_chunk(dict(batch))


def loop(policy: nn.Module) -> nn.Module:
    """What has the entry and the step."""
    host = host_of(policy)
    return host.own(policy, host.entry).__self__


def set_steps(policy: nn.Module, steps: int) -> None:
    """Configure the host's number of Euler steps."""
    host = host_of(policy)
    if isinstance(host.steps, int):
        return  # lerobot sets it nowhere
    setattr(*host.site(policy, host.steps), steps)


class Target(nn.Module):
    """``Q(s, a) = -||W (a - tanh(s))||^2`` on four steps of three dimensions; W has gradients of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))

    def bind(self, obs: dict[str, Tensor]) -> Value:
        return qsteer.value(self.score, obs["observation.state"])

    def score(self, a: Tensor, state: Tensor) -> Tensor:
        assert a.shape[1:] == (4, 3), "unpadded, executed steps only"
        target = torch.tanh(state)[:, None, :3]
        return -(self.weight * (a - target)).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Spy(Sampler):
    """Keeps what a sampler is given."""

    seen: list[tuple[Field, Value | None, Tensor]]

    def __call__(self, field: Field, value: Value | None, noise: Tensor) -> Tensor:
        self.seen.append((field, value, noise))
        return qsteer.Euler()(field, value, noise)

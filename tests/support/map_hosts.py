"""The hosts of three steps that posterior samples and learnt maps are tested on, and maps that fit them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import hosts
import torch
from torch import Tensor, nn

from qsteer.hosts import Host
from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.steering.handle import steer, unsteer

H, A, STEPS, N = 6, 5, 3, 4
STRONG = {"alpha": 0.4, "samples": N, "clip": None}


class Plain(hosts.Plain):
    """Says which part of its observation a learnt map reads."""

    @property
    def __qsteer_host__(self) -> Host:
        return replace(super().__qsteer_host__, features=lambda context: context["obs"]["observation.state"])


def build(name: str) -> nn.Module:
    return Plain(0) if name == "plain" else hosts.build(name)


@cache
def shared(name: str) -> nn.Module:
    """One host per process, for tests that leave it as they found it."""
    return build(name)


def chunk(policy: nn.Module, rows: int = 2, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return policy.predict_action_chunk(
        hosts.observe(policy, rows, seed), noise=hosts.draw(policy, rows, seed)
    )


def opened(
    policy: nn.Module, batch: dict[str, Tensor] | None = None, rows: int = 2
) -> tuple[Any, Any, Tensor]:
    """Field, value and noise of one action."""
    seen: list = []
    batch = hosts.observe(policy, rows) if batch is None else batch
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        policy.predict_action_chunk(batch, noise=hosts.draw(policy, len(batch["observation.state"])))
    return seen[0]


SIZES = {"pi0": (9 + 1, 12), "pi05": (9, 12), "smolvla": (10, 24), "plain": (4,)}
"""Tokens (4 of the image, 5 of the prompt, 1 of the state) and their features."""


def scramble(network: nn.Module) -> nn.Module:
    """Draw all weights: as initialised, zero gates would hide the observation."""
    torch.manual_seed(7)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    return network.eval()


def config(name: str, kind: type[MapConfig] = MetaMapConfig, **arguments: Any) -> Any:
    small = {"width": 16, "depth": 2, "heads": 2, "hidden": (32, 32), "harmonics": 4}
    return kind(
        *shared(name).action_shape if name == "plain" else (H, A),
        features=SIZES[name][-1],
        network="mlp" if name == "plain" else "transformer",
        **small | arguments,
    )


def meta_map(name: str, residual: bool = True) -> MetaFlowMap:
    return scramble(MetaFlowMap(config(name, residual=residual)))


def flow_map(name: str) -> FlowMap:
    return scramble(FlowMap(config(name, MapConfig)))


def lend(name: str) -> Iterator[nn.Module]:
    """The shared host of three steps, and not steered afterwards: the body of a fixture."""
    policy = shared(name)
    hosts.set_steps(policy, STEPS)
    yield policy
    unsteer(policy)

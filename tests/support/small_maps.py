"""Small learnt maps of chunks of 2 x 2, of both networks, and features for them."""

from typing import Any

import torch
from fields import noise
from torch import Tensor
from torch.utils import _pytree as pytree

from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig

NETWORKS = ["mlp", "transformer"]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()


def features(network: str) -> object:
    """Of three observations."""
    return noise(3, 4, seed=8) if network == "mlp" else (noise(3, 4, 4, seed=8), MASK)


def single(tree: Any) -> Any:
    """Floating-point tensors of a nested structure in single precision, others as they are."""
    return pytree.tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, tree)


def small(network: str, kind: type = FlowMap, config: type = MapConfig, **more: object) -> torch.nn.Module:
    """A small network in double precision with no parameter at zero."""
    shape = {"horizon": 2, "action_dim": 2, "features": 4, "hidden": (16, 16), "harmonics": 2}
    torch.manual_seed(0)
    out = kind(config(**shape, network=network, width=16, depth=2, heads=2, **more)).double()
    for p in out.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return out


def untrained(network: str) -> tuple[MetaFlowMap, Any]:
    """A residual map as it starts, and features of three observations."""
    torch.manual_seed(0)
    shape = {"horizon": 2, "action_dim": 2, "features": 4, "hidden": (16, 16), "harmonics": 2}
    meta = MetaFlowMap(MetaMapConfig(**shape, network=network, width=16, depth=2, heads=2)).double()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    return meta, (noise(3, 4, seed=8) if network == "mlp" else (noise(3, 3, 4, seed=8), mask))

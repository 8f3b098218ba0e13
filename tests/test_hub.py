"""Maps are saved, described and loaded again, whole or not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host_batches import SMALL, A, H
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qsteer
from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig


def maps() -> Iterator[tuple[str, MetaFlowMap | FlowMap]]:
    small = SMALL | {"hidden": (16, 8)}
    for network in "mlp", "transformer":
        for residual in True, False:
            config = MetaMapConfig(H, A, 7, network, **small, residual=residual)
            yield f"meta-{network}-{residual}", MetaFlowMap(config)
        yield f"flow-{network}", FlowMap(MapConfig(H, A, 7, network, **small))


MAPS = dict(maps())


def answer(model: MetaFlowMap | FlowMap) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    features: Any = torch.randn(2, 7, generator=draw)
    if model.config.network == "transformer":
        features = torch.randn(2, 3, 7, generator=draw), torch.ones(2, 3, dtype=torch.bool)
    x, t = torch.randn(2, H, A, generator=draw), torch.rand(2, generator=draw)
    if isinstance(model, FlowMap):
        return model.bind(features)(x, t / 2, t)
    return model.bind(features, qsteer.field(lambda x, t: -x))(torch.stack([x, 2 * x]), x, t)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_comes_back_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    model = MAPS[name]
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and type(again.config) is type(model.config)
    assert torch.equal(answer(again), answer(model))
    card = (tmp_path / "README.md").read_text()
    assert f"qsteer.maps.{type(model).__name__}.from_pretrained" in card and f"`(B, {H}, {A})`" in card
    assert "library_name: qsteer" in card and "{{" not in card and "{%" not in card
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("net.last.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"net\.last\.bias"):
        type(model).from_pretrained(tmp_path)

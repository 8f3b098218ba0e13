"""The prepared step of SmolVLA: its kinds of attention, its precisions, and what is refused."""

from functools import partial
from typing import Any

import hosts
import pytest
import torch
from prepared import fields, pulled
from torch import nn

import qsteer
from qsteer.steering.handle import steer

CROSS = {"attention_mode": "cross_attn", "self_attn_every_n_layers": -1}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "self-attention only": ({"attention_mode": "self_attn"}, {}),
    "cross-attention only": (CROSS, {}),
    "self-attention every third layer": ({"self_attn_every_n_layers": 3}, {}),
    "half as many layers": (CROSS | {"num_expert_layers": 2}, {}),
    "as wide as the VLM": ({"expert_width_multiplier": 1.0}, {}),
    "a longer prefix": ({"prefix_length": 16}, {}),
    "two keys, four queries": ({}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
}
"""Options of lerobot's configuration, and of the VLM's."""


def build(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], text: dict[str, Any]) -> nn.Module:
    """A tiny SmolVLA with other options."""
    import transformers
    from lerobot.policies.smolvla import configuration_smolvla

    vlm = transformers.SmolVLMConfig

    def changed(text_config: dict[str, Any], **sizes: Any) -> Any:
        return vlm(text_config=text_config | text, **sizes)

    monkeypatch.setattr(
        configuration_smolvla, "SmolVLAConfig", partial(configuration_smolvla.SmolVLAConfig, **config)
    )
    monkeypatch.setattr(transformers, "SmolVLMConfig", changed)
    return hosts.build("smolvla").requires_grad_(False)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("config", "text"), VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_attention_is_the_hosts(
    config: dict[str, Any], text: dict[str, Any], each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build(monkeypatch, config, text)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    own, prepared = fields(policy, **{"observation.language.attention_mask": mask})
    blocks, cross = prepared.expert.blocks, policy.config.attention_mode == "cross_attn"
    every = policy.config.self_attn_every_n_layers
    assert [b.across for b in blocks] == [cross and (every < 1 or i % every > 0) for i in range(len(blocks))]
    assert len(blocks) == config.get("num_expert_layers", 4)
    assert prepared.present.sum(1).diff() == -3, "the rows are padded unequally"
    draw = torch.Generator().manual_seed(1)
    for t in (0.0, 0.7, torch.rand(2 * each, generator=draw, dtype=torch.float64)):
        x = torch.randn(2 * each, 6, 5, generator=draw)
        expected, got = pulled(own.repeat(each), x, t), pulled(prepared.repeat(each), x, t)
        for ours, its in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5 * float(its.abs().max()))
        assert (expected[0][:each] - expected[0][each:]).abs().max() > 1e-2


@pytest.mark.parametrize("coarse", ["vlm", "lm_expert"])
def test_vlm_and_expert_may_have_precisions_of_their_own(coarse: str) -> None:
    policy = hosts.build("smolvla").requires_grad_(False)
    getattr(policy.model.vlm_with_expert, coarse).bfloat16()
    own, prepared = fields(policy)
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    tolerance = 1e-5 if coarse == "vlm" else 3e-2  # what the expert computes in
    for ours, its in zip(pulled(prepared, x, 0.3), pulled(own, x, 0.3), strict=True):
        assert (ours - its).norm() < tolerance * its.norm()


def test_the_prefix_is_projected_once_for_an_action() -> None:
    policy, calls = hosts.build("smolvla"), []
    for layer in policy.model.vlm_with_expert.lm_expert.layers[1::2]:
        layer.self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    with steer(policy, hosts.Target(), qsteer.Tweedie(), sampler=qsteer.BestOfN(2), compile="static"):
        policy.predict_action_chunk(hosts.observe(policy))
        calls.clear()
        policy.predict_action_chunk(hosts.observe(policy))
    assert len(calls) == 2, "once in each of the two layers"


def test_what_is_not_as_it_is_prepared_is_refused() -> None:
    policy = hosts.build("smolvla")
    policy.config.use_cache = False
    with pytest.raises(TypeError, match=r"expected a SmolVLA that keeps .*, got use_cache=False.*leave comp"):
        steer(policy, hosts.Target(), compile="static")
    policy.config.use_cache = True
    gate = policy.model.vlm_with_expert.lm_expert.layers[1].mlp.gate_proj
    gate.bias = nn.Parameter(torch.ones(gate.out_features))
    with pytest.raises(TypeError, match=r"expert has no biases, got layers.1.mlp.gate_proj.bias; leave comp"):
        steer(policy, hosts.Target(), compile="static")
    gate.bias = None
    steer(policy, hosts.Target(), compile="static").remove()

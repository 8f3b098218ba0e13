"""More of lerobot's policies with random weights: those whose language model is the denoiser, or beside it.

EO1 and X-VLA are lerobot's whole policies around transformers' Qwen2.5-VL and Florence-2, shrunk; their
prompts are made-up tokens. So is MolmoAct2 around its own Molmo, given a text.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qsteer.testing.heads import CAMERA, _features
from qsteer.testing.lerobot import STATE, _build_random, _name_extra, replaced

WORDS, STATE_TOKEN, ACTION_TOKEN, IMAGE, VISION, VISION_END = 40, 50, 51, 52, 53, 54
"""Tokens: the first that is no word, and those with a meaning."""
QWEN: dict[str, Any] = {
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [0],
    },
    "image_token_id": IMAGE,
    "vision_start_token_id": VISION,
    "vision_end_token_id": VISION_END,
}
"""A small Qwen2.5-VL."""
GRID = (1, 4, 4)
"""Patches of a picture, of which four make a token."""
FLORENCE = {
    "vision_config": {
        "depths": (1, 1),
        "patch_size": (3, 3),
        "patch_stride": (2, 2),
        "patch_padding": (1, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (8, 16),
        "num_heads": (1, 2),
        "num_groups": (1, 2),
        "window_size": 2,
        "projection_dim": 16,
    },
    "text_config": {
        "vocab_size": 64,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_layers": 1,
        "decoder_ffn_dim": 16,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}
"""A small Florence-2."""


def eo1(seed: int = 0, steps: int = 10) -> nn.Module:
    """Return a random EO1: 4 of 6 steps, 3 dimensions of 5.

    Args:
        seed: of the weights.
        steps: Euler steps.

    Raises:
        ModuleNotFoundError: lerobot's extra is not installed.
    """
    with _name_extra():
        from lerobot.policies.eo1 import modeling_eo1 as modelling
        from lerobot.policies.eo1.configuration_eo1 import EO1Config
        from transformers import Qwen2_5_VLForConditionalGeneration
    config = EO1Config(
        **_features(images=True),
        vlm_config=QWEN,
        chunk_size=6,
        n_action_steps=4,
        max_action_dim=5,
        max_state_dim=6,
        num_denoise_steps=steps,
        dtype="float32",
        device="cpu",
    )
    small = SimpleNamespace(
        from_pretrained=lambda *_, **__: Qwen2_5_VLForConditionalGeneration._from_config(
            config.vlm_backbone_config, dtype=torch.float32
        )
    )
    with replaced(modelling, Qwen2_5_VLForConditionalGeneration=small):
        return _build_random(lambda: modelling.EO1Policy(config), seed, "cpu")


def xvla(seed: int = 0, steps: int = 10, *, space: str = "auto", action: int = 3) -> nn.Module:
    """Return a random X-VLA; arguments and errors as of :func:`eo1`.

    Args:
        seed: of the weights.
        steps: of its loop.
        space: its action space; ``auto`` has no gripper, and 5 dimensions with padding.
        action: dimensions of an action.
    """
    with _name_extra():
        from lerobot.policies.xvla import modeling_xvla as modelling
        from lerobot.policies.xvla.configuration_xvla import XVLAConfig
    config = XVLAConfig(
        **_features(images=True, action=action),
        florence_config=FLORENCE,
        chunk_size=6,
        n_action_steps=4,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_domains=2,
        len_soft_prompts=2,
        dim_time=8,
        max_len_seq=32,
        action_mode=space,
        max_action_dim=5,
        max_state_dim=20,
        num_denoising_steps=steps,
        resize_imgs_with_padding=None,
        freeze_vision_encoder=True,
        device="cpu",
    )
    policy = _build_random(lambda: modelling.XVLAPolicy(config), seed, "cpu")
    for name, parameter in policy.named_parameters():
        if name.endswith("fc.weight"):  # a matrix for each robot, as one row
            parameter.data *= 16 / 4
    return policy


def molmoact2(seed: int = 0, steps: int = 10) -> nn.Module:
    """Return a random MolmoAct2 for continuous actions, which has 32 dimensions with padding.

    Arguments and errors as of :func:`eo1`.
    """
    with _name_extra():
        from lerobot.policies.molmoact2 import modeling_molmoact2 as modelling
        from lerobot.policies.molmoact2.configuration_molmoact2 import MolmoAct2Config
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    backbone = modelling.HFMolmoAct2Config(
        text_config=sizes
        | {"vocab_size": 60, "additional_vocab_size": 4, "num_hidden_layers": 2, "intermediate_size": 16},
        vit_config=sizes
        | {"intermediate_size": 16, "num_hidden_layers": 2, "image_default_input_size": (8, 8)}
        | {"image_patch_size": 4, "image_num_pos": 4},
        adapter_config=sizes | {"vit_layers": (-1, -2), "intermediate_size": 16, "text_hidden_size": 16},
        action_expert_config={
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "ffn_multiple_of": 8,
            "timestep_embed_dim": 8,
        },
        max_action_horizon=6,
        flow_matching_num_steps=steps,
        image_patch_id=IMAGE,
    )
    config = MolmoAct2Config(
        **_features(images=True),
        chunk_size=6,
        n_action_steps=4,
        inference_action_mode="continuous",
        model_dtype="float32",
        freeze_embedding=False,
        device="cpu",
    )
    own = modelling.MolmoAct2ForConditionalGeneration
    with replaced(
        modelling,
        _resolve_checkpoint_location=lambda *_, **__: "",
        _strict_load_safetensors_weights=lambda *_: None,
        HFMolmoAct2Config=SimpleNamespace(from_pretrained=lambda *_, **__: backbone),
        MolmoAct2ForConditionalGeneration=SimpleNamespace(from_pretrained=lambda *_, **__: own(backbone)),
    ):
        return _build_random(lambda: modelling.MolmoAct2Policy(config), seed, "cpu")


def wall_x(seed: int = 0) -> nn.Module:
    """Return a random Wall-X in lerobot's mixed precision; its prompts are made-up tokens without pictures.

    Args:
        seed: of the weights.

    Raises:
        ModuleNotFoundError: lerobot's extra ``wallx`` is not installed.
    """
    with _name_extra():
        from lerobot.policies.wall_x import modeling_wall_x as modelling
        from lerobot.policies.wall_x.configuration_wall_x import WallXConfig
    config = WallXConfig(
        **_features(images=True), chunk_size=6, n_action_steps=4, max_action_dim=5, max_state_dim=6
    )
    config.device = "cpu"
    expert = {"hidden_size": 16, "intermediate_size": 16, "hidden_act": "silu"}
    experts = {"num_experts": 2, "experts": [expert] * 2, "dim_inputs": (16, 16), "mlp_moe": True}
    small = modelling.Qwen2_5_VLConfig(
        **QWEN | {"text_config": QWEN["text_config"] | experts | {"dof_config": {"arm": 5}}}
    )
    small.agent_pos_config = {"arm": 6}
    tokens = {"<|action|>": ACTION_TOKEN, "<|propri|>": STATE_TOKEN}
    processor = SimpleNamespace(tokenizer=SimpleNamespace(convert_tokens_to_ids=tokens.__getitem__))
    own = modelling.Qwen2_5_VLMoEForAction

    class Policy(modelling.WallXPolicy):
        def preprocess_inputs(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
            """Return what its processor makes of an instruction and a state, for tokens that are there."""
            rows, ids = len(batch[STATE]), batch["input_ids"]
            state = nn.functional.pad(batch[STATE], (0, 2))[:, None]
            return {
                "input_ids": ids,
                "attention_mask": batch["attention_mask"],
                "moe_token_types": ids == ACTION_TOKEN,
                "proprioception": state,
                "agent_pos_mask": (torch.arange(6) < 4).to(state).expand(rows, 1, -1),
                "dof_mask": (torch.arange(5) < 3).to(state).expand(rows, 6, -1),
            }

    with replaced(
        modelling,
        require_package=lambda *_, **__: None,
        Qwen2_5_VLMoEForAction=SimpleNamespace(from_pretrained=lambda **_: own(small, processor=processor)),
    ):
        return _build_random(lambda: Policy(config), seed, "cpu")


def observe(policy: Any, rows: int = 1, seed: int = 0) -> dict[str, Any]:
    """Return random observations as the policy's ``select_action`` takes them."""
    draw = torch.Generator().manual_seed(seed)
    seen = {STATE: torch.randn(rows, 4, generator=draw)}
    if policy.name == "eo1":
        return seen | _prompts(rows, draw)
    if policy.name == "wall_x":
        prompts = _prompts(rows, draw)
        words = prompts["input_ids"].where(prompts["input_ids"] != IMAGE, 1)
        return seen | {"input_ids": words, "attention_mask": prompts["attention_mask"]}
    tokens = torch.randint(1, WORDS, (rows, 4), generator=draw)
    if policy.name == "molmoact2":
        padding = (torch.arange(32) >= 3).expand(rows, -1)
        return seen | {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "action_dim_is_pad": padding,
        }
    return seen | {
        CAMERA: torch.randn(rows, 3, 8, 8, generator=draw),
        "observation.language.tokens": tokens,
    }


def _prompts(rows: int, draw: torch.Generator) -> dict[str, Any]:
    """Return what EO1's processor makes of a picture and an instruction; every second row is shorter."""
    words = torch.randint(1, WORDS, (rows, 4), generator=draw)

    def all_rows(*tokens: int) -> Tensor:
        return torch.tensor(tokens).expand(rows, -1)

    picture = all_rows(VISION, *[IMAGE] * 4, VISION_END)
    ids = torch.cat([words[:, :2], picture, all_rows(STATE_TOKEN), words[:, 2:]], 1)
    ids = torch.cat([ids, all_rows(*[ACTION_TOKEN] * 6, VISION_END)], 1)
    present = torch.ones_like(ids)
    present[1::2, 0] = 0
    return {
        "input_ids": ids,
        "attention_mask": present,
        "pixel_values": torch.randn(rows * 16, 3 * 2 * 2 * 2, generator=draw),
        "image_grid_thw": torch.tensor([GRID] * rows),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "state_token_id": STATE_TOKEN,
        "action_token_id": ACTION_TOKEN,
    }

"""More of lerobot's policies with random weights: those whose language model is the denoiser, or beside it.

EO1 is lerobot's whole policy around transformers' Qwen2.5-VL, shrunk; its prompts are made-up tokens.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qsteer.testing.heads import _features
from qsteer.testing.lerobot import STATE, _build_random, _name_extra, _replace

WORDS, STATE_TOKEN, ACTION_TOKEN, IMAGE, VISION, VISION_END = 40, 50, 51, 52, 53, 54
"""Tokens: the first that is no word, and those with a meaning."""
QWEN = {
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
    with _replace(modelling, Qwen2_5_VLForConditionalGeneration=small):
        return _build_random(lambda: modelling.EO1Policy(config), seed, "cpu")


def observe(policy: Any, rows: int = 1, seed: int = 0) -> dict[str, Any]:
    """Return random observations as the policy's ``select_action`` takes them."""
    draw = torch.Generator().manual_seed(seed)
    return {STATE: torch.randn(rows, 4, generator=draw)} | _prompts(rows, draw)


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

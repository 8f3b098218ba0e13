"""lerobot's own policies and action heads with random weights, on stand-ins for what they would download.

Multi-task DiT is lerobot's whole policy on a stand-in for CLIP's text encoder; VLA-JEPA is its policy and
action head on a stand-in for Qwen3-VL, which makes tokens of images and instruction.
"""

from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from qsteer.testing.lerobot import STATE, _build_random, _name_extra, _replace

CAMERA = "observation.images.top"


def multi_task_dit(seed: int = 0, steps: int = 10) -> nn.Module:
    """Return a random multi-task DiT with the flow-matching objective: 4 of 6 steps, 3 dimensions.

    Args:
        seed: of the weights.
        steps: Euler steps.

    Raises:
        ModuleNotFoundError: lerobot's extra is not installed.
    """
    with _name_extra():
        from lerobot.policies.multi_task_dit import modeling_multi_task_dit as modelling
        from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
    config = MultiTaskDiTConfig(
        **_features(images=False),
        objective="flow_matching",
        n_obs_steps=2,
        horizon=6,
        n_action_steps=4,
        num_integration_steps=steps,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        timestep_embed_dim=8,
        drop_n_last_frames=0,
        device="cpu",
    )
    with _replace(modelling, CLIPTextEncoder=_Words):
        return _build_random(lambda: modelling.MultiTaskDiTPolicy(config), seed, "cpu")


def vla_jepa(seed: int = 0, steps: int = 10) -> nn.Module:
    """Return a random VLA-JEPA without its world model; arguments and errors as of :func:`multi_task_dit`."""
    with _name_extra():
        from lerobot.policies.vla_jepa import modeling_vla_jepa as modelling
        from lerobot.policies.vla_jepa.configuration_vla_jepa import VLAJEPAConfig
    config = VLAJEPAConfig(
        **_features(images=True),
        chunk_size=6,
        n_action_steps=4,
        action_dim=3,
        state_dim=4,
        enable_world_model=False,
        action_model_type="DiT-test",
        action_hidden_size=16,
        action_num_layers=2,
        num_embodied_action_tokens_per_instruction=2,
        num_inference_timesteps=steps,
        action_dropout=0.0,
        device="cpu",
    )
    with _replace(modelling, VLAJEPAModel=_model_of(modelling)):
        return _build_random(lambda: modelling.VLAJEPAPolicy(config), seed, "cpu")


def observe(policy: Any, rows: int = 1, seed: int = 0) -> dict[str, Any]:
    """Return random observations as the policy's ``select_action`` takes them."""
    draw = torch.Generator().manual_seed(seed)
    seen: dict[str, Any] = {STATE: torch.randn(rows, 4, generator=draw)}
    if policy.name == "vla_jepa":
        pictures = torch.rand(rows, 3, 8, 8, generator=draw)
        return seen | {CAMERA: pictures, "task": ["pick up the cube"] * rows}
    tokens = torch.randint(1, 60, (rows, 4), generator=draw)
    return seen | {
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": torch.ones(rows, 4, dtype=torch.bool),
    }


def _features(*, images: bool) -> dict[str, Any]:
    from lerobot.configs import FeatureType, PolicyFeature

    seen = {STATE: PolicyFeature(type=FeatureType.STATE, shape=(4,))}
    if images:
        seen[CAMERA] = PolicyFeature(type=FeatureType.VISUAL, shape=(3, 8, 8))
    action = PolicyFeature(type=FeatureType.ACTION, shape=(3,))
    return {"input_features": seen, "output_features": {"action": action}}


class _Words(nn.Module):
    """A bag of words in place of CLIP's text encoder."""

    def __init__(self, model_name: str = "", projection_dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, projection_dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean of the words."""
        return (self.embed(input_ids) * attention_mask[..., None]).mean(1)


class _Qwen(nn.Module):
    """What VLA-JEPA asks of Qwen3-VL when it is built."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = SimpleNamespace(config=SimpleNamespace(hidden_size=16))
        self.embed = nn.Linear(3, 32)

    def expand_tokenizer(self) -> tuple[list[str], list[int], int]:
        """Return no action tokens: they are for the world model."""
        return [], [], 0

    def to_pixel_values(self, images: Tensor) -> Tensor:
        """Return them as they are."""
        return images


def _model_of(modelling: Any) -> type:
    """Return VLA-JEPA's model, whose tokens are made of the images' colours and the instruction."""

    class Model(modelling.VLAJEPAModel):
        def __init__(self, config: Any) -> None:
            with _replace(modelling, Qwen3VLInterface=_Qwen):
                super().__init__(config)

        def _encode_qwen(self, images: Any, instructions: Any, **_: Any) -> tuple[Tensor, None]:
            colours = torch.stack([torch.stack(views).mean((0, 2, 3)) for views in images])
            words = torch.tensor([crc32(text.encode()) % 97 / 97 for text in instructions])
            return self.qwen.embed(colours + words[:, None].to(colours)).unflatten(1, (2, 16)), None

    return Model

"""lerobot's own policies and action heads with random weights, on stand-ins for what they would download.

Multi-task DiT is lerobot's whole policy on a stand-in for CLIP's text encoder; VLA-JEPA, GR00T N1.7 and Evo1
are their policies and action heads on stand-ins for Qwen3-VL and InternVL3, which make tokens.
"""

from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from qsteer.testing.lerobot import STATE, _build_random, _name_extra, replaced

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
    with replaced(modelling, CLIPTextEncoder=_Words):
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
    with replaced(modelling, VLAJEPAModel=_model_of(modelling)):
        return _build_random(lambda: modelling.VLAJEPAPolicy(config), seed, "cpu")


def groot(seed: int = 0, steps: int = 10) -> nn.Module:
    """Return a random GR00T N1.7; arguments and errors as of :func:`multi_task_dit`."""
    with _name_extra():
        from lerobot.policies.groot import modeling_groot as modelling
        from lerobot.policies.groot.configuration_groot import GrootConfig
    config = GrootConfig(
        **_features(images=True), chunk_size=6, n_action_steps=4, device="cpu", use_bf16=False
    )
    with replaced(modelling, GR00TN17=SimpleNamespace(from_pretrained=lambda **_: _Groot(steps))):
        policy = _build_random(lambda: modelling.GrootPolicy(config), seed, "cpu")
    for parameter in policy.parameters():
        if parameter.ndim == 3:  # one matrix for each robot, whose rows were counted as inputs
            parameter.data *= parameter.shape[2] ** 0.5
    return policy


def evo1(seed: int = 0, steps: int = 10) -> nn.Module:
    """Return a random Evo1; arguments and errors as of :func:`multi_task_dit`."""
    with _name_extra():
        from lerobot.policies.evo1 import evo1_model
        from lerobot.policies.evo1.configuration_evo1 import Evo1Config
        from lerobot.policies.evo1.modeling_evo1 import Evo1Policy
    config = Evo1Config(
        **_features(images=True),
        chunk_size=6,
        n_action_steps=4,
        max_action_dim=5,
        max_state_dim=6,
        embed_dim=16,
        hidden_dim=16,
        state_hidden_dim=16,
        num_heads=2,
        num_layers=2,
        num_inference_timesteps=steps,
        device="cpu",
    )
    with replaced(evo1_model, InternVL3Embedder=_InternVL):
        return _build_random(lambda: Evo1Policy(config), seed, "cpu")


def observe(policy: Any, rows: int = 1, seed: int = 0) -> dict[str, Any]:
    """Return random observations as the policy's ``select_action`` takes them."""
    draw = torch.Generator().manual_seed(seed)
    seen: dict[str, Any] = {STATE: torch.randn(rows, 4, generator=draw)}
    if policy.name in ("vla_jepa", "evo1"):
        pictures = torch.rand(rows, 3, 8, 8, generator=draw)
        return seen | {CAMERA: pictures, "task": ["pick up the cube"] * rows}
    if policy.name == "groot":
        state = torch.cat([seen[STATE], torch.zeros(rows, 2)], 1)[:, None]
        return {"state": state, "embodiment_id": torch.zeros(rows, dtype=torch.long)}
    tokens = torch.randint(1, 60, (rows, 4), generator=draw)
    return seen | {
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": torch.ones(rows, 4, dtype=torch.bool),
    }


def _features(*, images: bool, action: int = 3) -> dict[str, Any]:
    from lerobot.configs import FeatureType, PolicyFeature

    seen = {STATE: PolicyFeature(type=FeatureType.STATE, shape=(4,))}
    if images:
        seen[CAMERA] = PolicyFeature(type=FeatureType.VISUAL, shape=(3, 8, 8))
    moves = PolicyFeature(type=FeatureType.ACTION, shape=(action,))
    return {"input_features": seen, "output_features": {"action": moves}}


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
            with replaced(modelling, Qwen3VLInterface=_Qwen):
                super().__init__(config)

        def _encode_qwen(self, images: Any, instructions: Any, **_: Any) -> tuple[Tensor, None]:
            colours = torch.stack([torch.stack(views).mean((0, 2, 3)) for views in images])
            words = torch.tensor([crc32(text.encode()) % 97 / 97 for text in instructions])
            return self.qwen.embed(colours + words[:, None].to(colours)).unflatten(1, (2, 16)), None

    return Model


class _InternVL(nn.Module):
    """What Evo1 asks of InternVL3: fused tokens, here of the images' colours and the prompt's checksum."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {name: nn.Identity() for name in ("language_model", "vision_tower", "multi_modal_projector")}
        )
        self.embed = nn.Linear(3, 48)

    def get_fused_image_text_embedding_batched(
        self, camera_images: list[Tensor], image_masks: Tensor, text_prompts: list[str], return_cls_only: bool
    ) -> tuple[Tensor, None]:
        """Return three tokens."""
        words = torch.tensor([crc32(text.encode()) % 97 / 97 for text in text_prompts])
        return self.embed(camera_images[0].mean((2, 3)) + words[:, None]).unflatten(1, (3, 16)), None


class _Groot(nn.Module):
    """GR00T N1.7's action head, behind a backbone that makes tokens of the state."""

    def __init__(self, steps: int) -> None:
        from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, GR00TN17Config

        super().__init__()
        sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "dropout": 0.0}
        config = GR00TN17Config(
            backbone_embedding_dim=16,
            max_state_dim=6,
            max_action_dim=5,
            action_horizon=6,
            hidden_size=16,
            input_embedding_dim=16,
            max_seq_len=16,
            max_num_embodiments=2,
            num_inference_timesteps=steps,
            diffusion_model_cfg=sizes
            | {
                "norm_type": "ada_norm",
                "final_dropout": False,
                "output_dim": 16,
                "interleave_self_attention": True,
                "positional_embeddings": None,
            },
            vl_self_attention_cfg=sizes | {"final_dropout": False, "positional_embeddings": None},
        )
        self.config, self.backbone = config, nn.Linear(6, 48)
        self.action_head = GR00TN17ActionHead(config)

    def get_action(self, inputs: dict[str, Any], options: Any = None) -> Any:
        """Return the head's actions."""
        from transformers.feature_extraction_utils import BatchFeature

        tokens = self.backbone(inputs["state"][:, 0]).unflatten(1, (3, 16))
        image = torch.tensor([True, True, False]).expand(len(tokens), 3)
        seen = {
            "backbone_features": tokens,
            "image_mask": image,
            "backbone_attention_mask": torch.ones_like(image),
        }
        return self.action_head.get_action(BatchFeature(data=seen), BatchFeature(data=inputs), options)

"""lerobot's pi0, pi0.5 and SmolVLA with few random weights: their real code, nothing to download.

Widths, depths and vocabulary are shrunk while the policy is being built; what runs then is lerobot's code.
For tests, examples and timings without a checkpoint; such a policy is of no use on a robot.
"""

import contextlib
import io
from types import SimpleNamespace
from unittest.mock import patch

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

VOCABULARY = 64
FEATURES = {
    "input_features": {
        "observation.images.top": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 32, 32)),
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(4,)),
    },
    "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(3,))},
}
CHUNK = {"chunk_size": 6, "n_action_steps": 4, "max_action_dim": 5, "max_state_dim": 6, "device": "cpu"}


def pi05(width: int = 16, depth: int = 2, seed: int = 0) -> modeling_pi05.PI05Policy:
    """Return a random pi0.5; ``width`` and ``depth`` of VLM and expert (512 and 8: 76 M parameters)."""
    config = PI05Config(**FEATURES, **CHUNK, image_resolution=(28, 28), tokenizer_max_length=5)
    return _pi(modeling_pi05, modeling_pi05.PI05Policy, config, width, depth, seed)


def pi0(width: int = 16, depth: int = 2, seed: int = 0) -> modeling_pi0.PI0Policy:
    """Return a random pi0; sizes as for :func:`pi05`."""
    config = PI0Config(**FEATURES, **CHUNK, image_resolution=(28, 28), tokenizer_max_length=5)
    return _pi(modeling_pi0, modeling_pi0.PI0Policy, config, width, depth, seed)


def smolvla(width: int = 16, depth: int = 4, seed: int = 0) -> SmolVLAPolicy:
    """Return a random SmolVLA; its layers alternate self- and cross-attention."""
    from transformers import SmolVLMConfig

    small = SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=3,
    )
    tokens = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=1, global_image_token_id=2))
    config = SmolVLAConfig(
        **FEATURES, **CHUNK, resize_imgs_with_padding=(32, 32), num_vlm_layers=depth, tokenizer_max_length=5
    )
    with (
        patch.object(smolvlm_with_expert.AutoConfig, "from_pretrained", lambda name: small),
        patch.object(smolvlm_with_expert.AutoProcessor, "from_pretrained", lambda name: tokens),
    ):
        return _random(lambda: SmolVLAPolicy(config), seed)


def batch(policy: nn.Module, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return ``rows`` random observations of the shapes that the policy's configuration names."""
    draw = torch.Generator().manual_seed(seed)
    observation = {
        name: torch.rand(rows, *feature.shape, generator=draw)
        for name, feature in policy.config.input_features.items()
    }
    length = policy.config.tokenizer_max_length
    observation["observation.language.tokens"] = torch.randint(4, VOCABULARY, (rows, length), generator=draw)
    observation["observation.language.attention_mask"] = torch.ones(rows, length, dtype=torch.bool)
    device = next(policy.parameters()).device
    return {name: value.to(device) for name, value in observation.items()}


def _pi(modelling, policy_class, config, width: int, depth: int, seed: int):
    """Build a policy of the pi family with its PaliGemma and Gemma shrunk."""
    size = modelling.GemmaConfig(
        width=width, depth=depth, mlp_dim=4 * width, num_heads=8, num_kv_heads=1, head_dim=max(4, width // 8)
    )
    vlm, expert = modelling.PaliGemmaForConditionalGenerationWithPiGemma, modelling.PiGemmaForCausalLM

    def small_vlm(config):
        config.text_config.vocab_size = config.image_token_index = VOCABULARY
        config.vision_config.hidden_size = config.vision_config.projection_dim = width
        config.vision_config.intermediate_size = 2 * width
        config.vision_config.num_hidden_layers = 1
        config.vision_config.num_attention_heads = 2
        config.projection_dim = width
        return vlm(config=config)

    def small_expert(config):
        config.vocab_size = VOCABULARY
        return expert(config=config)

    with (
        patch.object(modelling, "get_gemma_config", lambda variant: size),
        patch.object(modelling, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm),
        patch.object(modelling, "PiGemmaForCausalLM", small_expert),
    ):
        return _random(lambda: policy_class(config), seed)


def _random(build, seed: int):
    """Build a policy and draw all its weights: as initialised, zero gates would hide the prefix."""
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        policy = build().eval()
        torch.manual_seed(seed)
        for parameter in policy.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            nn.init.normal_(parameter, std=fan_in**-0.5)
    return policy

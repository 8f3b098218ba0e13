"""lerobot's pi0, pi0.5 and SmolVLA with few random weights: their real code, nothing to download.

Widths, depths and vocabulary are shrunk while the policy is being built; what runs then is lerobot's code.
For tests, examples and timings without a checkpoint; such a policy is of no use on a robot.
"""

import contextlib
import io
from types import SimpleNamespace
from unittest.mock import patch
from zlib import crc32

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import PolicyProcessorPipeline as Pipeline
from lerobot.processor import tokenizer_processor
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
TOY = {**FEATURES, **CHUNK, "tokenizer_max_length": 5}
LIBERO = {
    "input_features": {
        "observation.images.image": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 256, 256)),
        "observation.images.image2": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 256, 256)),
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
    },
    "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))},
    "chunk_size": 10,
    "n_action_steps": 10,
    "max_action_dim": 8,
    "max_state_dim": 10,
    "device": "cpu",
    "tokenizer_max_length": 48,
}
"""What the policies for LIBERO see and do; chunks of 10."""


def pi05(width: int = 16, depth: int = 2, seed: int = 0, shape: dict = TOY) -> modeling_pi05.PI05Policy:
    """Return a random pi0.5; ``width`` and ``depth`` of VLM and expert (512 and 8: 76 M parameters).

    ``shape`` is ``TOY`` or ``LIBERO``: what it sees and does.
    """
    config = PI05Config(**shape, image_resolution=(28, 28))
    return _pi(modeling_pi05, modeling_pi05.PI05Policy, config, width, depth, seed)


def pi0(width: int = 16, depth: int = 2, seed: int = 0, shape: dict = TOY) -> modeling_pi0.PI0Policy:
    """Return a random pi0; arguments as for :func:`pi05`."""
    config = PI0Config(**shape, image_resolution=(28, 28))
    return _pi(modeling_pi0, modeling_pi0.PI0Policy, config, width, depth, seed)


def smolvla(width: int = 16, depth: int = 4, seed: int = 0, shape: dict = TOY) -> SmolVLAPolicy:
    """Return a random SmolVLA, arguments as for :func:`pi05`; it alternates self- and cross-attention."""
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
    config = SmolVLAConfig(**shape, resize_imgs_with_padding=(32, 32), num_vlm_layers=depth)
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


def processors(policy: nn.Module) -> tuple[Pipeline, Pipeline]:
    """Return lerobot's own pre- and post-processor for a policy, with statistics made up.

    States and actions have mean 0.1, standard deviation 0.5, quantiles -0.9 and 1.1; a word becomes a token
    by its checksum, for a tokenizer would have to be downloaded.
    """
    numbers = {"mean": 0.1, "std": 0.5, "min": -1.0, "max": 1.2, "q01": -0.9, "q99": 1.1}
    shapes = {**policy.config.input_features, **policy.config.output_features}
    stats = {
        name: {key: torch.full(feature.shape, value) for key, value in numbers.items()}
        for name, feature in shapes.items()
        if feature.type is not FeatureType.VISUAL
    }

    def tokenize(texts, max_length, **_):
        tokens = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            words = [4 + crc32(word.encode()) % (VOCABULARY - 4) for word in text.split()][:max_length]
            row[: len(words)] = torch.tensor(words)
        return {"input_ids": tokens, "attention_mask": tokens > 0}

    with patch.object(tokenizer_processor.AutoTokenizer, "from_pretrained", lambda name: tokenize):
        return make_pre_post_processors(policy.config, dataset_stats=stats)


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

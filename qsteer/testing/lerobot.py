"""lerobot's own code for pi0, pi0.5 and SmolVLA with random weights, shrunk where asked.

``width`` and ``depth`` shrink networks and vocabulary while the policy is being built; what runs then is
lerobot's code.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

VOCABULARY = 64
STATE = "observation.state"


@dataclass(frozen=True)
class Shape:
    """What a policy sees and does.

    Attributes:
        cameras: the images' names, after ``observation.images.``.
        pixels: edge of an image as it comes.
        resolution: edge of an image as the policy sees it; None: the policy's own.
        state: size of the state.
        action: size of an action.
        chunk: actions of a chunk.
        executed: of these, how many are executed.
        padded_action: size of an action with padding; None: the policy's own.
        padded_state: size of a state with padding; None: the policy's own.
        tokens: length of the instruction; None: the policy's own.
    """

    cameras: tuple[str, ...] = ("top",)
    pixels: int = 32
    resolution: int | None = 28
    state: int = 4
    action: int = 3
    chunk: int = 6
    executed: int = 4
    padded_action: int | None = 5
    padded_state: int | None = 6
    tokens: int | None = 5

    def options(self) -> dict[str, Any]:
        """Return the options of a lerobot configuration that say so."""
        from lerobot.configs import FeatureType, PolicyFeature

        images = {
            f"observation.images.{name}": PolicyFeature(
                type=FeatureType.VISUAL, shape=(3, self.pixels, self.pixels)
            )
            for name in self.cameras
        }
        state = PolicyFeature(type=FeatureType.STATE, shape=(self.state,))
        action = PolicyFeature(type=FeatureType.ACTION, shape=(self.action,))
        padding = {
            "max_action_dim": self.padded_action,
            "max_state_dim": self.padded_state,
            "tokenizer_max_length": self.tokens,
        }
        return {
            "input_features": {**images, STATE: state},
            "output_features": {"action": action},
            "chunk_size": self.chunk,
            "n_action_steps": self.executed,
            **{name: size for name, size in padding.items() if size is not None},
        }


TOY = Shape()
LIBERO = Shape(
    cameras=("image", "image2"),
    pixels=256,
    state=8,
    action=7,
    chunk=10,
    executed=10,
    padded_action=8,
    padded_state=10,
    tokens=48,
)
"""What the policies for LIBERO see and do; chunks of 10."""
REAL = Shape(
    pixels=224,
    resolution=None,
    state=8,
    action=7,
    chunk=10,
    executed=10,
    padded_action=None,
    padded_state=None,
    tokens=None,
)
"""The same in lerobot's own sizes, images of 224 pixels; give it cameras."""


def pi05(
    width: int | None = 16,
    depth: int | None = 2,
    seed: int = 0,
    shape: Shape = TOY,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return a random pi0.5.

    Args:
        width: of VLM and expert; None: lerobot's own sizes of everything.
        depth: of both (width 512 and depth 8: 76 million parameters).
        seed: of the weights.
        shape: what it sees and does.
        device: where it is built, and stays.
        dtype: its precision; lerobot keeps some parts in float32.

    Raises:
        ModuleNotFoundError: lerobot is not installed.
    """
    with _name_extra():
        from lerobot.policies.pi05 import modeling_pi05
        from lerobot.policies.pi05.configuration_pi05 import PI05Config
    return _build_pi(modeling_pi05, "PI05Policy", PI05Config, width, depth, seed, shape, device, dtype)


def pi0(
    width: int | None = 16,
    depth: int | None = 2,
    seed: int = 0,
    shape: Shape = TOY,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return a random pi0; arguments and errors as for :func:`pi05`."""
    with _name_extra():
        from lerobot.policies.pi0 import modeling_pi0
        from lerobot.policies.pi0.configuration_pi0 import PI0Config
    return _build_pi(modeling_pi0, "PI0Policy", PI0Config, width, depth, seed, shape, device, dtype)


def smolvla(
    width: int | None = 16,
    depth: int | None = 4,
    seed: int = 0,
    shape: Shape = TOY,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Return a random SmolVLA, arguments and errors as for :func:`pi05`.

    It alternates self- and cross-attention. Its own sizes are those of lerobot's configuration and of its
    SmolVLM2 of 500 million parameters, of which it uses half the layers.
    """
    with _name_extra():
        from lerobot.policies.smolvla import smolvlm_with_expert
        from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
        from transformers import SmolVLMConfig
    sizes = _SMOLVLM if width is None or depth is None else _shrink_smolvlm(width, depth)
    shrunk = {} if width is None else {"resize_imgs_with_padding": (32, 32), "num_vlm_layers": depth}
    vlm = SmolVLMConfig(**sizes)
    tokens = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=1, global_image_token_id=2))
    config = SmolVLAConfig(**shape.options(), **shrunk, device="cpu")
    config.device = str(device)
    with replaced(
        smolvlm_with_expert,
        AutoConfig=SimpleNamespace(from_pretrained=lambda name: vlm),
        AutoProcessor=SimpleNamespace(from_pretrained=lambda name: tokens),
    ):
        return _build_random(lambda: SmolVLAPolicy(config), seed, device)


def processors(policy: Any) -> tuple[Any, Any]:
    """Return lerobot's own pre- and post-processor for a policy, with statistics made up.

    States and actions have mean 0.1, standard deviation 0.5, quantiles -0.9 and 1.1; a word becomes a token
    by its checksum, for a tokenizer would have to be downloaded.
    """
    from lerobot.configs import FeatureType
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.processor import tokenizer_processor

    numbers = {"mean": 0.1, "std": 0.5, "min": -1.0, "max": 1.2, "q01": -0.9, "q99": 1.1}
    shapes = {**policy.config.input_features, **policy.config.output_features}
    stats = {
        name: {key: torch.full(feature.shape, value) for key, value in numbers.items()}
        for name, feature in shapes.items()
        if feature.type is not FeatureType.VISUAL
    }

    def tokenize(texts: list[str], max_length: int, **_: Any) -> dict[str, Tensor]:
        tokens = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            words = [4 + crc32(word.encode()) % (VOCABULARY - 4) for word in text.split()][:max_length]
            row[: len(words)] = torch.tensor(words)
        return {"input_ids": tokens, "attention_mask": tokens > 0}

    with replaced(tokenizer_processor, AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokenize)):
        return make_pre_post_processors(policy.config, dataset_stats=stats)


_SMOLVLM: Mapping[str, Any] = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "scale_factor": 4,
    "image_token_id": 49190,
}
"""SmolVLM2-500M's published sizes, which lerobot would look up on the hub."""


def _shrink_smolvlm(width: int, depth: int) -> Mapping[str, Any]:
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": max(8, width // 8),
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return {"text_config": text, "vision_config": vision, "scale_factor": 2, "image_token_id": 3}


def _build_pi(
    modelling: Any,
    policy_class: str,
    config_class: Any,
    width: int | None,
    depth: int | None,
    seed: int,
    shape: Shape,
    device: str | torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Build a policy of the pi family, its PaliGemma and Gemma shrunk unless width or depth is None."""
    resolution = {} if shape.resolution is None else {"image_resolution": (shape.resolution,) * 2}
    precision = str(dtype).removeprefix("torch.")
    config = config_class(**shape.options(), **resolution, dtype=precision, device="cpu")
    config.device = str(device)
    shrunk = contextlib.nullcontext() if width is None or depth is None else shrink(modelling, width, depth)
    with shrunk:
        return _build_random(lambda: getattr(modelling, policy_class)(config), seed, device, dtype)


@contextlib.contextmanager
def shrink(modelling: Any, width: int, depth: int, vocabulary: int = VOCABULARY) -> Iterator[None]:
    """Shrink what the pi family's code builds in the block."""
    size = modelling.GemmaConfig(
        width=width, depth=depth, mlp_dim=4 * width, num_heads=8, num_kv_heads=1, head_dim=max(4, width // 8)
    )
    vlm, expert = modelling.PaliGemmaForConditionalGenerationWithPiGemma, modelling.PiGemmaForCausalLM

    def small_vlm(config: Any) -> nn.Module:
        config.text_config.vocab_size = config.image_token_index = vocabulary
        config.vision_config.hidden_size = config.vision_config.projection_dim = width
        config.vision_config.intermediate_size = 2 * width
        config.vision_config.num_hidden_layers = 1
        config.vision_config.num_attention_heads = 2
        config.projection_dim = width
        return vlm(config=config)

    def small_expert(config: Any) -> nn.Module:
        config.vocab_size = vocabulary
        return expert(config=config)

    with replaced(
        modelling,
        get_gemma_config=lambda variant: size,
        PaliGemmaForConditionalGenerationWithPiGemma=small_vlm,
        PiGemmaForCausalLM=small_expert,
    ):
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Replace names of a module in the block, where lerobot asks for a download or a size of its own."""
    own = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(own)


def _build_random(
    build: Callable[[], nn.Module],
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build a policy on its device and draw all its weights; as initialised, zero gates hide the prefix.

    In bfloat16 the backbones are made in that precision instead of being converted, which would take three
    times the memory. The layers around them are float32 in lerobot's code whatever the precision.
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), contextlib.redirect_stdout(io.StringIO()):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                policy = build().eval()
        finally:
            torch.set_default_dtype(default)
        for name, layer in getattr(policy, "model", policy).named_children():
            if dtype != torch.float32 and name != "paligemma_with_expert":
                layer.float()
        torch.manual_seed(seed)
        for parameter in policy.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            nn.init.normal_(parameter, std=fan_in**-0.5)
    return policy


@contextlib.contextmanager
def _name_extra() -> Iterator[None]:
    """Say which extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'this policy is lerobot\'s ({error}): pip install "qsteer[lerobot]", or take the host mlp'
        ) from error

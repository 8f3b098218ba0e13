"""Checkpoints of SmolVLA and pi0.5 that lerobot itself loads without a download; random, or to train."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

SPECIAL = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}

BINS = 256
"""Of a number of the state, as pi0.5 reads it."""
PROMPT = ("Task", "State", "Action", ":", ",", ";")
"""What pi0.5's prompt has beside instruction and state."""


def write_tokenizer(folder: str | Path, words: Sequence[str]) -> Any:
    """Write a tokenizer of some words, and return it; a whole number is a word, and so is a comma.

    Args:
        folder: where it goes.
        words: all others are unknown to it.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    kit: Any = transformers
    names = ["<pad>", "<unk>", *SPECIAL.values(), "\n", *sorted(set(words))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = pre_tokenizers.Split(Regex(r"-?\d+|[^\W\d]+|[^\w\s]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), parts])
    fast = kit.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=SPECIAL
    )
    fast.save_pretrained(folder)
    return fast


def write_vlm(
    folder: str | Path,
    words: Sequence[str],
    width: int = 16,
    depth: int = 2,
    *,
    pixels: int = 32,
    patch: int = 16,
    vision_depth: int = 1,
) -> Path:
    """Write what lerobot asks of a SmolVLM: configuration, processor, and a tokenizer of some words.

    Args:
        folder: where it goes; ``SmolVLAConfig(vlm_model_name=folder)`` finds it there.
        words: all others are unknown to the tokenizer.
        width: of the language model and the vision tower.
        depth: layers of the language model.
        pixels: edge of a picture; ``(pixels / patch / 2) ** 2`` tokens of the language model are its.
        patch: edge of the vision tower's patches, in pixels.
        vision_depth: its layers.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    import transformers

    kit: Any = transformers
    fast = write_tokenizer(folder, words)
    vocabulary = fast.get_vocab()
    text = {
        "model_type": "llama",
        "vocab_size": max(64, len(vocabulary)),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": max(8, width // 2),
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": vision_depth,
        "num_attention_heads": 2,
        "image_size": pixels,
        "patch_size": patch,
    }
    config = kit.SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=2,
        image_token_id=vocabulary["<image>"],
        pad_token_id=0,
    )
    config.save_pretrained(folder)
    processor = kit.SmolVLMProcessor(
        kit.SmolVLMImageProcessor(), fast, kit.SmolVLMVideoProcessor(), chat_template=None
    )
    processor.save_pretrained(folder)
    return Path(folder)


def smolvla(
    folder: str | Path,
    vlm: str | Path,
    stats: dict[str, dict[str, torch.Tensor]],
    *,
    state: int,
    action: int,
    camera: str = "observation.image",
    pixels: int = 32,
    chunk: int = 10,
    executed: int = 5,
    depth: int = 2,
    steps: int = 10,
    seed: int = 0,
) -> nn.Module:
    """Write a checkpoint of a new SmolVLA with its processors, and return the policy.

    Args:
        folder: where it goes.
        vlm: what :func:`write_vlm` wrote.
        stats: of the data, by lerobot's names: the processors normalise by them.
        state: size of the state.
        action: size of an action.
        camera: name of its image.
        pixels: edge of the image, and of the VLM's.
        chunk: actions of a chunk.
        executed: of these, how many are executed.
        depth: layers of the VLM that are used.
        steps: Euler steps.
        seed: of the weights.

    Raises:
        ModuleNotFoundError: lerobot is not installed.
    """
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = SmolVLAConfig(
        input_features={
            camera: PolicyFeature(type=FeatureType.VISUAL, shape=(3, pixels, pixels)),
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(state,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(action,))},
        chunk_size=chunk,
        n_action_steps=executed,
        max_state_dim=state,
        max_action_dim=action,
        num_steps=steps,
        resize_imgs_with_padding=(pixels, pixels),
        tokenizer_max_length=12,
        vlm_model_name=str(vlm),
        num_vlm_layers=depth,
        expert_width_multiplier=1.0,
        freeze_vision_encoder=False,
        train_expert_only=False,
        device="cpu",
        push_to_hub=False,
    )
    with _seeded(seed):
        policy = SmolVLAPolicy(config).eval()
    save(policy, folder, make_pre_post_processors(config, dataset_stats=stats))
    return policy


def pi05(
    folder: str | Path,
    words: Sequence[str],
    stats: dict[str, dict[str, torch.Tensor]],
    *,
    state: int,
    action: int,
    camera: str = "observation.image",
    pixels: int = 28,
    chunk: int = 10,
    executed: int = 5,
    width: int = 128,
    depth: int = 4,
    tokens: int = 30,
    seed: int = 0,
) -> nn.Module:
    """Write a checkpoint of a new small pi0.5, its processors and its tokenizer, and return the policy.

    pi0.5 reads its state as text: each number, normalised, is one of 256 whole numbers. Here each is a token,
    and near numbers have near embeddings to begin with, which a pretrained VLM knows.

    Args:
        folder: where it goes; the tokenizer into its folder ``tokenizer``.
        words: of the instructions.
        stats: of the data, by lerobot's names, with quantiles ``q01`` and ``q99``.
        state: size of the state.
        action: size of an action.
        camera: name of its image.
        pixels: edge of the image as it comes; the policy sees it in 28.
        chunk: actions of a chunk.
        executed: of these, how many are executed.
        width: of the VLM and the action expert.
        depth: layers of both.
        tokens: length of the text.
        seed: of the weights.

    Raises:
        ModuleNotFoundError: lerobot is not installed.
    """
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors

    from qsteer.testing.small_pi05.configuration_small_pi05 import SmallPI05Config
    from qsteer.testing.small_pi05.modeling_small_pi05 import SmallPI05Policy

    numbers = [str(bin_) for bin_ in range(-1, BINS)]
    known = [*numbers, *PROMPT, *words]
    tokenizer = write_tokenizer(Path(folder) / "tokenizer", known)
    config = SmallPI05Config(
        input_features={
            camera: PolicyFeature(type=FeatureType.VISUAL, shape=(3, pixels, pixels)),
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(state,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(action,))},
        chunk_size=chunk,
        n_action_steps=executed,
        max_state_dim=state,
        max_action_dim=action,
        image_resolution=(28, 28),
        tokenizer_max_length=tokens,
        tokenizer=str(Path(folder) / "tokenizer"),
        width=width,
        depth=depth,
        vocabulary=len(tokenizer),
        device="cpu",
        push_to_hub=False,
    )
    with _seeded(seed):
        policy: Any = SmallPI05Policy(config).eval()
        table = policy.model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight
        with torch.no_grad():
            table[tokenizer.convert_tokens_to_ids(numbers)] = _near(len(numbers), width) * table.std()
    save(policy, folder, make_pre_post_processors(config, dataset_stats=stats))
    return policy


def _near(count: int, width: int) -> torch.Tensor:
    """Return an embedding (count, width) of 0 to count - 1 of unit size, in which near numbers are near."""
    wave = torch.randn(width) * 8 / count
    return 2**0.5 * torch.cos(torch.arange(count)[:, None] * wave + 2 * torch.pi * torch.rand(width))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw weights from a seed in the block, and say nothing."""
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(seed)
        yield


def save(policy: Any, folder: str | Path, processors: tuple[Any, Any]) -> None:
    """Write a policy of lerobot's and its processors to a folder, as lerobot's training does."""
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    policy.config.pretrained_path = Path(folder)


def halve(folder: str | Path) -> None:
    """Store a policy's weights in half precision, in half the space; it is loaded in its own again."""
    path = Path(folder) / "model.safetensors"
    weights = {
        name: value.half() if value.dtype == torch.float32 else value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, {"format": "pt"})

"""Policies with random weights: lerobot's own code for pi0, pi0.5 and SmolVLA, and the demonstration's MLP.

For tests, examples and timings without a checkpoint or a download; such a policy is of no use on a robot.
``tiny`` and ``small`` shrink widths, depths and vocabulary while the policy is being built; ``full`` is
lerobot's own configuration. What runs then is lerobot's code.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsteer.adapters import PlainPolicy
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.testing.lerobot import LIBERO, REAL, STATE, TOY, VOCABULARY, Shape, pi0, pi05, processors, smolvla

__all__ = [
    "HOSTS",
    "LIBERO",
    "REAL",
    "SIZES",
    "STATE",
    "TOY",
    "MlpPolicy",
    "Shape",
    "batch",
    "make",
    "mlp",
    "pi0",
    "pi05",
    "processors",
    "smolvla",
]

HOSTS = ("mlp", "pi0", "pi05", "smolvla")
SIZES = ("tiny", "small", "full")


def make(
    host: str,
    size: str = "small",
    *,
    cameras: int = 2,
    chunk: int = 10,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a random policy, its parameters frozen.

    pi0.5 has 76 million parameters in the size ``small``, pi0 as many. ``mlp`` is the demonstration's policy
    in the size ``small``: no camera, and what it sees of a state is encoded once per chunk.

    Args:
        host: one of :data:`HOSTS`.
        size: one of :data:`SIZES`.
        cameras: number of images.
        chunk: actions of a chunk, all of them executed.
        device: where it is built, and stays.
        dtype: ``torch.float32``, or ``torch.bfloat16`` for pi0 and pi0.5 (what lerobot keeps in float32 then
            stays so); None: bfloat16 for their full size on CUDA, else float32.
        seed: of the weights.

    Raises:
        ValueError: a name is unknown, a number below 1, or the precision is not the policy's.
        ModuleNotFoundError: lerobot is not installed.
    """
    if host not in HOSTS or size not in SIZES:
        raise ValueError(
            f"host, size: expected one of {', '.join(HOSTS)} and one of {', '.join(SIZES)}, got {host!r} and "
            f"{size!r}"
        )
    if min(cameras, chunk) < 1:
        raise ValueError(f"cameras, chunk: expected at least 1 each, got {cameras} and {chunk}")
    device, pi = torch.device(device), host in ("pi0", "pi05")
    if dtype is None:
        dtype = torch.bfloat16 if pi and size == "full" and device.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.bfloat16) or (dtype == torch.bfloat16 and not pi):
        raise ValueError(
            f"dtype: expected torch.float32, or torch.bfloat16 for pi0 and pi05, got {dtype} for {host}"
        )
    if host == "mlp":
        return mlp(size, chunk=chunk, seed=seed).to(device).requires_grad_(False)
    names = tuple(f"camera{i + 1}" for i in range(cameras))
    shape = replace(REAL if size == "full" else TOY, cameras=names, chunk=chunk, executed=chunk)
    build: Callable[..., nn.Module] = {"pi0": pi0, "pi05": pi05, "smolvla": smolvla}[host]
    widths: Mapping[str, dict[str, Any]] = {
        "tiny": {},
        "small": {"width": 512, "depth": 8},
        "full": {"width": None, "depth": None},
    }
    precision = {"dtype": dtype} if pi else {}
    return build(**widths[size], seed=seed, shape=shape, device=device, **precision).requires_grad_(False)


def mlp(size: str = "small", *, chunk: int = 5, seed: int = 0) -> "MlpPolicy":
    """Return a random MLP policy: ``small`` is the demonstration's, ``full`` of OGBench's widths."""
    hidden = {"tiny": (64,) * 3, "small": (256,) * 3, "full": (512,) * 4}[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MlpPolicy(FlowPolicy(FlowPolicyConfig(obs_dim=28, action_dim=5, horizon=chunk, hidden=hidden)))


class MlpPolicy(PlainPolicy):
    """A :class:`~qsteer.policies.FlowPolicy` as a host: the observation is encoded before the first step."""

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__(policy.velocity, policy.config.horizon, policy.config.action_dim)
        self.policy = policy

    @torch.no_grad()
    def predict_action_chunk(
        self, obs: Any, noise: Float[Tensor, "B H A"] | None = None, num_steps: int | None = None
    ) -> Float[Tensor, "B H A"]:
        """Return one chunk per observation; arguments as for :class:`~qsteer.adapters.PlainPolicy`."""
        return self.sample_actions(self.policy.encode(obs[STATE]), noise=noise, num_steps=num_steps)


def batch(policy: Any, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return ``rows`` random observations of the shapes that the policy's configuration names."""
    draw = torch.Generator().manual_seed(seed)
    device = next(policy.parameters()).device
    if isinstance(policy, MlpPolicy):
        return {STATE: torch.randn(rows, policy.policy.config.obs_dim, generator=draw).to(device)}
    observation = {
        name: torch.rand(rows, *feature.shape, generator=draw)
        for name, feature in policy.config.input_features.items()
    }
    length = policy.config.tokenizer_max_length
    observation["observation.language.tokens"] = torch.randint(4, VOCABULARY, (rows, length), generator=draw)
    observation["observation.language.attention_mask"] = torch.ones(rows, length, dtype=torch.bool)
    return {name: value.to(device) for name, value in observation.items()}

"""Behaviour cloning by flow matching: the frozen policy that everything else steers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qsteer.data.episodes import Chunks, Episodes, Transitions
from qsteer.flow import interpolate
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training.loop import Learner, Training, fit


@dataclass(frozen=True, kw_only=True)
class PolicyTraining(Training):
    """How to train a :class:`~qsteer.policies.FlowPolicy`.

    Attributes:
        horizon: actions per chunk.
        hidden: widths of the hidden layers.
        residual, layer_norm: see :class:`~qsteer.policies.FlowPolicyConfig`.
    """

    steps: int = 30_000
    gradient_clip: float | None = None
    horizon: int = 5
    hidden: Sequence[int] = (256, 256, 256)
    residual: bool = False
    layer_norm: bool = True


class FlowMatching(Learner):
    """``E || v(x_t, t | s) - (x1 - x0) ||^2`` with x1 a stored chunk, x0 ~ N(0, I), t ~ U[0, 1]."""

    def __init__(self, policy: FlowPolicy, chunks: Chunks, batch_size: int) -> None:
        """Learn ``policy`` from ``chunks``."""
        super().__init__()
        self.policy, self.chunks, self.batch_size = policy, chunks, batch_size

    def sample(self, generator: torch.Generator) -> Transitions:
        """Draw chunks."""
        return self.chunks.sample(self.batch_size, generator)

    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the flow-matching loss."""
        return flow_matching_loss(self.policy, batch.observations, batch.actions, generator), {}


def flow_matching_loss(
    policy: nn.Module,
    obs: Float[Tensor, "B O"],
    x1: Float[Tensor, "B H A"],
    generator: torch.Generator,
    valid: Bool[Tensor, "B H"] | None = None,
) -> Float[Tensor, ""]:
    """Return ``E || v(x_t, t | s) - (x1 - x0) ||^2`` per entry, over x0 ~ N(0, I) and t ~ U[0, 1].

    Args:
        policy: called as ``policy(obs, x, t)``.
        obs: s.
        x1: stored chunks.
        generator: of x0 and t.
        valid: steps that count; None: all.
    """
    x0 = torch.randn(x1.shape, generator=generator, device=x1.device)
    t = torch.rand(len(x1), generator=generator, device=x1.device)
    v = policy(obs, interpolate(x0, x1, t), t)
    errors = (v - (x1 - x0)).square()
    if valid is None:
        return errors.mean()
    return (errors.mean(-1) * valid).sum() / valid.sum()


def train_policy(
    episodes: Episodes,
    out: str | Path,
    training: PolicyTraining | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> FlowPolicy:
    """Clone the behaviour in ``episodes``; ``FlowPolicy.from_pretrained`` reads the result in ``out``.

    A run that was interrupted goes on from its last checkpoint; a finished run is returned as it is.

    Args:
        episodes: the data; held in memory on ``device``.
        out: run directory.
        training: how to train; defaults to ``PolicyTraining()``.
        device: where to train.
        progress: show a progress bar.

    Raises:
        ValueError: ``out`` holds a run with other settings or other data.
    """
    out, training = Path(out), training or PolicyTraining()
    config = FlowPolicyConfig(
        episodes.observations.shape[1],
        episodes.actions.shape[1],
        training.horizon,
        training.hidden,
        residual=training.residual,
        layer_norm=training.layer_norm,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        policy = FlowPolicy(config)
    policy.normalizer.fit(episodes.observations)
    learner = FlowMatching(
        policy.to(device), Chunks(episodes.to(device), training.horizon, 1.0, "actions"), training.batch_size
    )
    fit(learner, out, training, training.describe() | {"data": episodes.fingerprint()}, progress=progress)
    policy.requires_grad_(False).eval().save_pretrained(out)
    return policy

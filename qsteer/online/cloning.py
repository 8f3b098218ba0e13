"""Policies that go on cloning while a critic learns beside them, as in the papers' OGBench experiments."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, override

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qsteer.data.episodes import Source, Transitions
from qsteer.files import replacing_directory
from qsteer.policies import FlowPolicy
from qsteer.training.checkpoints import resume, save
from qsteer.training.loop import Learner, descend, differentiator
from qsteer.training.policy import PolicyTraining, flow_matching_loss


class OnlineCloning(Learner):
    """Flow matching on what the critic learns from: offline data, and whatever was done since.

    Of a chunk that a terminal cuts short only the steps before it count. The policies that act are moving
    averages of those that learn; they change in place.

    Args:
        policies: act, one for each seed.
        source: of batches with an equal group of rows for each seed.
        settings: ``batch_size`` rows for each; its ``steps`` and cadences are not used.
        ema: step of the moving averages, in (0, 1].
    """

    def __init__(
        self, policies: Sequence[FlowPolicy], source: Source, settings: PolicyTraining, ema: float
    ) -> None:
        super().__init__()
        self.acting = nn.ModuleList(policies)
        self.learning = nn.ModuleList(deepcopy(policy).requires_grad_(True) for policy in policies)
        self.source, self.settings = source, settings
        self.update = 0
        self.optimizer = settings.optimizer(list(self.learning.parameters()))
        self._differentiate = differentiator(self, self.optimizer, settings)
        self._average = get_ema_multi_avg_fn(1 - ema)
        self._averaged = list(self.acting.parameters()), list(self.learning.parameters())

    @override
    def sample(self, generator: torch.Generator) -> Transitions:
        return self.source.sample(self.settings.batch_size * len(self.acting), generator)

    @override
    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the policies' losses, each on its own rows."""
        columns = batch.observations, batch.actions, batch.valid
        groups = zip(self.learning, *(column.chunk(len(self.acting)) for column in columns), strict=True)
        losses = [
            flow_matching_loss(policy, obs, actions, generator, valid)
            for policy, obs, actions, valid in groups
        ]
        return torch.stack(losses).sum(), {}

    @override
    def after_step(self) -> None:
        self._average(*self._averaged, 0)

    def step(self, update: int, generator: torch.Generator) -> None:
        """Make the gradient step of this number, unless it was made before a kill."""
        if update > self.update:
            self.update = update
            self._differentiate(generator)
            if self.settings.gradient_clip is not None:
                for policy in self.learning:
                    nn.utils.clip_grad_norm_(policy.parameters(), self.settings.gradient_clip)
            descend(self, self.optimizer, replace(self.settings, gradient_clip=None), update)

    def resume(self, out: Path, identity: Mapping[str, Any]) -> None:
        """Go on from the checkpoint in ``out``, if any; see :func:`~qsteer.training.checkpoints.resume`."""
        self.update = resume(out, self, self.optimizer, [], identity)

    def save(self, out: Path, identity: Mapping[str, Any], directories: Sequence[Path]) -> None:
        """Write a checkpoint, and each seed's acting policy to its own directory.

        Raises:
            RuntimeError: a weight is not finite.
        """
        if not all(bool(weights.isfinite().all()) for weights in self.parameters()):
            raise RuntimeError(
                f"{out}: expected finite weights, got NaN or infinity in a policy that goes on cloning by "
                f"update {self.update}; look for outliers in the data, or lower learning_rate"
            )
        out.mkdir(parents=True, exist_ok=True)
        save(out, self, self.optimizer, [], self.update, identity)
        for directory, policy in zip(directories, cast(Sequence[FlowPolicy], self.acting), strict=True):
            with replacing_directory(directory / "policy") as fresh:
                policy.save_pretrained(fresh)

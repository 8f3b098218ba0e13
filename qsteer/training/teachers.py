"""Frozen policies to distil from: a small state policy, or a pretrained vision-language-action model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.checks import check_choice
from qsteer.data.batches import Batches
from qsteer.data.episodes import Chunks
from qsteer.fingerprints import fingerprint
from qsteer.flow import read_features
from qsteer.policies import FlowPolicy
from qsteer.samplers import Euler
from qsteer.steering.opening import open_action
from qsteer.training.loop import WHOLE, Share
from qsteer.types import Field

ACTION = "action"


class Sizes(NamedTuple):
    """What a map must have of its teacher: the first four arguments of a :class:`~qsteer.maps.MapConfig`."""

    horizon: int
    action_dim: int
    features: int
    network: Literal["mlp", "transformer"]


class Teacher(ABC):
    """A frozen policy together with observations to evaluate it on."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the policy is; generators must be there too."""

    @abstractmethod
    def batch(
        self, size: int, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Field, Float[Tensor, "B H A"]]:
        """Draw ``size`` observations; return the policy's field for those of ``share`` and clean actions.

        The observations are encoded once. ``generator`` is used as if all ``size`` were wanted.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of policy and data: a resumed run must see the teacher that it started with."""

    def sizes(self) -> Sizes:
        """Return the sizes of a map of this policy: ``MetaMapConfig(*teacher.sizes(), width=512)``."""
        field, x1 = self.batch(1, torch.Generator(self.device).manual_seed(0))
        features = read_features(field)
        tokens = not isinstance(features, Tensor)
        width = (features[0] if tokens else features).shape[-1]
        return Sizes(x1.shape[1], x1.shape[2], width, "transformer" if tokens else "mlp")


@dataclass(frozen=True)
class StateTeacher(Teacher):
    """A small state policy on the data that it was cloned from.

    Attributes:
        policy: the frozen policy.
        chunks: the data.
    """

    policy: FlowPolicy
    chunks: Chunks

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.chunks.starts.device

    def batch(
        self, size: int, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Field, Float[Tensor, "B H A"]]:
        """Draw stored observations and the chunks which followed them."""
        batch = self.chunks.sample(size, generator)
        return self.policy.field(share.of(batch.observations)), share.of(batch.actions)

    def fingerprint(self) -> str:
        """Return a hash of policy and data."""
        return fingerprint(self.policy.state_dict().values(), self.chunks.episodes.fingerprint())


@dataclass(frozen=True)
class HostTeacher(Teacher):
    """A pretrained lerobot policy (pi0, pi0.5, SmolVLA) on batches of its own kind.

    Observations are encoded by the host's code, once per batch; the map is conditioned on the result
    (:attr:`~qsteer.hosts.Host.features`). The policy is left as it was.

    Clean actions decide where the policy is evaluated. By default the policy draws them: the states ``x_t``
    are then those which it passes through when it acts, in padded dimensions too, and the posterior is that
    of its own distribution, whatever the data. ``"data"`` takes the stored chunks, normalised and padded as
    for the host's training: right for data which the policy was trained on, and cheaper.

    Cost per batch: one prefix, and with ``"policy"`` the host's own number of velocity forwards.

    Attributes:
        policy: the frozen policy.
        batches: observations, and under ``"data"`` actions.
        actions: where clean actions come from: ``"policy"`` or ``"data"``.
    """

    policy: Any
    batches: Batches
    actions: Literal["policy", "data"] = "policy"

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice(self, "actions", ("policy", "data"))
        if not len(self.batches):
            raise ValueError("batches: expected at least one row, got none; record some first")

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    def batch(
        self, size: int, generator: torch.Generator, share: Share = WHOLE
    ) -> tuple[Field, Float[Tensor, "B H A"]]:
        """Draw observations; load and encode those of ``share``."""
        draw = torch.randint(len(self.batches), (size,), generator=generator, device=generator.device)
        rows = self.batches.rows(share.of(draw).tolist())
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in rows.items()}
        field, noise = _encode(self.policy, {k: v for k, v in batch.items() if k != ACTION})
        if self.actions == "data":
            return field, _stored_actions(self.policy, batch)
        whole = torch.randn(size, *noise.shape[1:], generator=generator, device=generator.device)
        with torch.no_grad():
            return field, Euler()(field, None, share.of(whole).to(noise)).float()

    def fingerprint(self) -> str:
        """Return a hash of policy and data."""
        return fingerprint(self.policy.state_dict().values(), self.batches.fingerprint() + self.actions)


def _encode(policy: Any, batch: dict[str, Any]) -> tuple[Field, Float[Tensor, "B H A"]]:
    """Return the policy's velocity for a batch, and noise; torch's random stream is left as it was."""
    device = next(policy.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        opened = open_action(policy, batch)
    return opened.field, opened.noise


def _stored_actions(policy: Any, batch: dict[str, Any]) -> Float[Tensor, "B H A"]:
    """Return the batch's chunks as the host's training sees them: padded, and for Aloha in pi's joints."""
    if ACTION not in batch:
        raise KeyError(
            f"batch: expected the key {ACTION!r}, got {sorted(batch)}; store the chunks, or use "
            "HostTeacher(actions='policy')"
        )
    actions = batch[ACTION].float()
    if getattr(policy.config, "adapt_to_pi_aloha", False):
        actions = policy._pi_aloha_encode_actions_inv(actions.clone())
    return policy.prepare_action({ACTION: actions})

"""A small chunked flow policy for state observations: the base policy of the examples and experiments."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qsteer.checks import check_at_least, check_bounds, check_widths
from qsteer.contract import Contract, check_contract
from qsteer.critics.critic import CriticConfig
from qsteer.critics.networks import Normalizer
from qsteer.flow import FunctionField, normal
from qsteer.hub import HubModule
from qsteer.types import Bounds, Field


@dataclass(frozen=True)
class FlowPolicyConfig:
    """Shape of a :class:`FlowPolicy`.

    Attributes:
        obs_dim: size of the observation vector.
        action_dim: size of one action.
        horizon: actions per chunk.
        hidden: widths of the hidden layers.
        harmonics: the network sees ``sin(k pi t), cos(k pi t)`` for k = 1 .. harmonics.
        residual: hidden layers after the first add to what they read; they are of one width.
        layer_norm: what a layer reads of the one before it is normalised before its GELU, without a gain or
            offset. Such a policy fits the same data better (docs/results/peers.md).
        bounds: lowest and highest entry of an action; None: there are none.
    """

    obs_dim: int
    action_dim: int
    horizon: int
    hidden: Sequence[int] = (256, 256, 256)
    harmonics: int = 8
    residual: bool = False
    layer_norm: bool = False
    bounds: Sequence[float] | None = (-1.0, 1.0)

    def __post_init__(self) -> None:
        """Check the values; widths and bounds read from JSON become tuples."""
        check_bounds(self.bounds)
        object.__setattr__(self, "bounds", None if self.bounds is None else tuple(self.bounds))
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_at_least(self, 1, "obs_dim", "action_dim", "horizon", "harmonics")
        check_widths(self, "hidden")
        if self.residual and len(set(self.hidden)) > 1:
            raise ValueError(f"hidden: expected one width for residual layers, got {self.hidden}")


@dataclass(frozen=True)
class PolicyField(FunctionField):
    """The field of a :class:`FlowPolicy`, whose gradient can be restricted to the last layers."""

    _: KW_ONLY
    policy: "FlowPolicy"

    def truncated(self, layers: int) -> Field:
        """Return the same velocity with a gradient through its last layers, see :class:`qsteer.Tweedie`.

        Raises:
            ValueError: the layers are not residual, or fewer.
        """
        config = self.policy.config
        added = len(config.hidden) - 1 if config.residual else 0
        if not 1 <= layers <= added:
            raise ValueError(
                f"layers: expected 1 to {added}, which this policy adds to its residual stream, got {layers}"
                "; train one with more (PolicyTraining(residual=True)), or leave Tweedie's layers out"
            )
        return replace(self, fn=partial(self.policy.velocity, layers=layers))


class FlowPolicy(HubModule, tags=["qsteer", "robotics", "flow-matching"]):
    """An MLP velocity ``v(x, t | s)`` over action chunks on the linear path ``x_t = (1 - t) x0 + t x1``.

    Example:
        >>> policy = FlowPolicy(FlowPolicyConfig(obs_dim=3, action_dim=2, horizon=5))
        >>> policy.field(torch.zeros(4, 3))(torch.zeros(4, 5, 2), torch.zeros(4)).shape
        torch.Size([4, 5, 2])
    """

    frequencies: Tensor

    def __init__(self, config: FlowPolicyConfig) -> None:
        """Build an untrained policy."""
        super().__init__()
        self.config = config
        self.normalizer = Normalizer(config.obs_dim)
        chunk = config.horizon * config.action_dim
        widths = (config.obs_dim + chunk + 2 * config.harmonics, *config.hidden, chunk)
        self.first = nn.Linear(widths[0], widths[1])
        self.rest = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths[1:]))
        frequencies = torch.pi * torch.arange(1.0, config.harmonics + 1)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def contract(self) -> Contract:
        """What its observations and actions are: as they come, and actions in [-1, 1]."""
        mean, std = self.normalizer.mean, self.normalizer.std
        fitted = bool((mean != 0).any() or (std != 1).any())
        dim = self.config.action_dim
        return Contract(
            observation_normalisation="identity",
            observation_mean=mean.tolist() if fitted else None,
            observation_std=std.tolist() if fitted else None,
            horizon=self.config.horizon,
            action_dim=dim,
            action_normalisation="identity",
            action_low=(-1.0,) * dim,
            action_high=(1.0,) * dim,
        )

    def check_critic(self, config: CriticConfig) -> None:
        """Check that a critic of this configuration can steer the policy.

        Raises:
            ValueError: it sees other sizes, or was trained for another contract.
        """
        names = ("obs_dim", "action_dim", "horizon")
        mine, its = ({n: getattr(c, n) for n in names} for c in (self.config, config))
        if not config.views and not config.features and mine != its:
            raise ValueError(f"critic: expected the policy's {mine}, got {its}; train one for this policy")
        check_contract(config.contract, self.contract)

    def encode(self, obs: Float[Tensor, "B O"]) -> Float[Tensor, "B D"]:
        """Return the observation's half of the first layer: what does not change while an action is made.

        Raises:
            ValueError: the observation has another size.
        """
        if obs.shape[1] != self.config.obs_dim:
            raise ValueError(
                f"observation: expected shape (B, obs_dim) = (B, {self.config.obs_dim}), got "
                f"{tuple(obs.shape)}; this policy was trained on another observation"
            )
        weight = self.first.weight[:, : self.config.obs_dim]
        return F.linear(self.normalizer(obs), weight, self.first.bias)

    def velocity(
        self,
        x: Float[Tensor, "B H A"],
        t: Float[Tensor, "B"],
        z: Float[Tensor, "B D"],
        layers: int | None = None,
    ) -> Float[Tensor, "B H A"]:
        """Return the velocity for encoded observations ``z``.

        Args:
            x: noisy chunks.
            t: times, 0 noise, 1 action.
            z: encoded observations.
            layers: the gradient goes through the last so many residual layers only; ``None``: through all.
        """
        angles = t[:, None] * self.frequencies
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)
        h = z + F.linear(features, self.first.weight[:, self.config.obs_dim :])
        *hidden, last = self.rest
        constant = 0 if layers is None else len(hidden) - layers
        for i, layer in enumerate(hidden):
            branch = layer(self._activate(h.detach() if i < constant else h))
            h = h + branch if self.config.residual else branch
        return last(self._activate(h)).view_as(x)

    def _activate(self, h: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return F.gelu(F.layer_norm(h, h.shape[-1:]) if self.config.layer_norm else h)

    def forward(
        self, obs: Float[Tensor, "B O"], x: Float[Tensor, "B H A"], t: Float[Tensor, "B"]
    ) -> Float[Tensor, "B H A"]:
        """Return the velocity at ``x`` and ``t`` (t = 0 noise, t = 1 action) for observations ``obs``."""
        return self.velocity(x, t, self.encode(obs))

    def field(self, obs: Float[Tensor, "B O"]) -> Field:
        """Return the :class:`~qsteer.types.Field` for ``obs``, encoded once and without a graph."""
        with torch.no_grad():
            return PolicyField(
                self.velocity, normal(self.encode(obs)), bounds=cast(Bounds, self.config.bounds), policy=self
            )

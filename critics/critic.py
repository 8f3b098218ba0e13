"""The action-chunk critic: a pessimistic ensemble of Q functions, bound to an observation for use."""

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from qsteer.critics.networks import EnsembleMLP, Normalizer
from qsteer.critics.targets import pessimistic

CARD = """---
{{ card_data }}
---

# Critic for value-guided flow policies

An ensemble of {{ config.members }} action-chunk critics `Q(s, a)` for qsteer: it steers a frozen flow policy
towards chunks of higher value while they are being generated.

* observation: `{{ config.observation_key }}`, shape `(B, {{ config.obs_dim }})`, normalised inside the critic
* action: shape `(B, {{ config.horizon }}, {{ config.action_dim }})`, the policy's model space, without
  padding
* value: mean over the members minus {{ config.rho }} population standard deviations, shape `(B,)`

```python
critic = qsteer.Critic.from_pretrained("this repository or folder")
handle = qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.2))
action = policy.select_action(batch)
```
"""


@dataclass(frozen=True)
class CriticConfig:
    """Shape and reduction of a :class:`Critic`.

    Attributes:
        obs_dim: size of the observation vector.
        action_dim: size of one action, unpadded.
        horizon: actions per chunk that the critic sees.
        hidden: widths of the hidden layers.
        members: size of the ensemble.
        rho: pessimism, in population standard deviations over the members.
        observation_key: where the observation lies in a host's batch.
    """

    obs_dim: int
    action_dim: int
    horizon: int
    hidden: Sequence[int] = (256, 256, 256)
    members: int = 4
    rho: float = 0.5
    observation_key: str = "observation.state"

    def __post_init__(self) -> None:
        """Check the values; widths read from JSON become a tuple."""
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("obs_dim", "action_dim", "horizon", "members"):
            if getattr(self, name) < 1:
                raise ValueError(f"CriticConfig.{name}: expected at least 1, got {getattr(self, name)}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"CriticConfig.hidden: expected at least one positive width, got {self.hidden}")
        if self.rho < 0:
            raise ValueError(f"CriticConfig.rho: expected 0 or more, got {self.rho}; 0 turns pessimism off")


class Critic(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="qsteer",
    tags=["qsteer", "robotics", "flow-matching", "critic"],
    pipeline_tag="robotics",
    model_card_template=CARD,
):
    """An ensemble of LayerNorm MLPs ``Q_j(s, a[0:H])`` on state observations, evaluated in one batched call.

    Example:
        >>> critic = Critic(CriticConfig(obs_dim=3, action_dim=2, horizon=5))
        >>> value = critic.bind(torch.zeros(4, 3))
        >>> value(torch.zeros(4, 5, 2)).shape
        torch.Size([4])
    """

    def __init__(self, config: CriticConfig) -> None:
        """Build an untrained critic."""
        super().__init__()
        self.config = config
        self.normalizer = Normalizer(config.obs_dim)
        chunk = config.horizon * config.action_dim
        self.net = EnsembleMLP(config.members, config.obs_dim, chunk, config.hidden)
        self._warned = False

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **hub: Any) -> "Critic":
        """Load with the hub's machinery, but refuse a checkpoint that lacks weights."""
        with contextlib.redirect_stdout(None):  # the hub says where it loads from
            return super()._from_pretrained(strict=strict, **hub)

    def fit_normalisation(self, obs: Float[Tensor, "N O"]) -> None:
        """Take the observations' mean and standard deviation into the checkpoint."""
        self.normalizer.fit(self._observation(obs))

    def encode(self, obs: Tensor | Mapping[str, Any]) -> Float[Tensor, "J B D"]:
        """Return what the critic needs of observations: the observation's half of the first layer.

        Computed on the critic's device and in its precision, whatever those of ``obs``.

        Args:
            obs: (B, obs_dim), or a mapping that holds it under ``config.observation_key``.

        Raises:
            KeyError: the mapping lacks the observation.
            ValueError: the observation has another shape.
        """
        return self.net.encode(self.normalizer(self._observation(obs)))

    def members(self, z: Float[Tensor, "J _ D"], a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return what each member says of the chunks ``a`` under encoded observations ``z``.

        Raises:
            ValueError: ``a`` is not (B, horizon, action_dim), or its rows are not those of ``z``.
        """
        expected = (z.shape[1], self.config.horizon, self.config.action_dim)
        if a.shape != expected:
            raise ValueError(
                f"action: expected shape (B, H, A) = {expected}, got {tuple(a.shape)}; pass the executed "
                "steps, without padding, one chunk per observation (value.repeat(k) for k candidates of each)"
            )
        return self.net(z, a.flatten(1).to(z.dtype))

    def bind(self, obs: Tensor | Mapping[str, Any]) -> "BoundCritic":
        """Encode ``obs`` once, without a graph, and return the :class:`~qsteer.types.Value` closed over it.

        Cost: one matrix product here, then one ensemble pass per call of the value.
        """
        if self.config.rho > 0 and self.config.members < 3 and not self._warned:
            self._warned = True
            warnings.warn(
                f"critic: pessimism rho = {self.config.rho} with {self.config.members} member(s): the "
                "gradient of so small a spread is noise; train 3 or more members, or set rho to 0",
                stacklevel=2,
            )
        with torch.no_grad():
            return BoundCritic(self, self.encode(obs))

    def generate_model_card(self, **card: Any) -> ModelCard:
        """Return the model card that ``save_pretrained`` and ``push_to_hub`` write as README.md."""
        return super().generate_model_card(config=self.config, **card)

    def _observation(self, obs: Tensor | Mapping[str, Any]) -> Float[Tensor, "B O"]:
        key = self.config.observation_key
        if isinstance(obs, Mapping) and key not in obs:
            raise KeyError(
                f"observation: expected key {key!r} in the batch, got {sorted(obs)}; set "
                "CriticConfig.observation_key or pass critic_inputs= to steer"
            )
        state: Tensor = obs[key] if isinstance(obs, Mapping) else obs
        if state.ndim != 2 or state.shape[1] != self.config.obs_dim:
            raise ValueError(
                f"observation: expected shape (B, obs_dim) = (B, {self.config.obs_dim}), got "
                f"{tuple(state.shape)}; flatten it and keep one row per environment"
            )
        return state.to(self.normalizer.mean)


@dataclass(frozen=True)
class BoundCritic:
    """A :class:`Critic` closed over encoded observations; a :class:`~qsteer.types.Value`."""

    critic: Critic
    z: Float[Tensor, "J B D"]

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the pessimistic value ``mean_j Q_j - rho std_j Q_j`` of each chunk."""
        return pessimistic(self.members(a), self.critic.config.rho)

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return what each member says of each chunk."""
        return self.critic.members(self.z, a)

    def repeat(self, k: int) -> "BoundCritic":
        """Return the value for ``k`` rows per observation; nothing is encoded again."""
        return replace(self, z=self.z.repeat_interleave(k, dim=1))

"""The action-chunk critic: a pessimistic ensemble of Q functions, bound to an observation for use."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsteer.checks import check_at_least, check_widths
from qsteer.contract import Contract
from qsteer.critics.encoders import (
    FEATURES,
    FeatureEncoder,
    ViewEncoder,
    find_encoded_size,
    shift_randomly,
    to_unit_view,
)
from qsteer.critics.networks import EnsembleMLP, Normalizer
from qsteer.critics.targets import pessimistic
from qsteer.hub import HubModule
from qsteer.types import Value

type Batch = Tensor | Mapping[str, Any]  # a state; or a host's batch, of which a critic reads some entries

OVERSHOOT = 0.1
"""How far resampling may put a pixel beyond [0, 1]."""

CARD = """---
{{ card_data }}
---

# Critic for value-guided flow policies

An ensemble of {{ config.members }} action-chunk critics `Q(s, a)` for qsteer: it steers a frozen flow policy
towards chunks of higher value while they are being generated.

{% if config.obs_dim -%}
* state: `{{ config.observation_key }}`, shape `(B, {{ config.obs_dim }})`, normalised inside the critic
{% endif -%}
{% for view in config.views -%}
* image: `{{ view }}`, shape `(B, 3, height, width)`, uint8 or floating point in [0, 1], resized to
  {{ config.view_size }} x {{ config.view_size }} pixels inside the critic
{% endfor -%}
{% if config.features -%}
* the policy's own features: `policy.features`, shape `(B, {{ config.features }})`, normalised inside the
  critic; `qsteer.steer` adds them to the batch
{% endif -%}
* action: shape `(B, {{ config.horizon }}, {{ config.action_dim }})`, the policy's model space, without
  padding
* value: mean over the members minus {{ config.rho }} population standard deviations, shape `(B,)`
{%- if config.stack > 1 %}
* a stack of {{ config.stack }} independent critics: the rows of a batch come in {{ config.stack }} equal
  groups, one for each critic; `critic.unstacked()` takes them apart
{%- endif %}

```python
critic = qsteer.Critic.from_pretrained("this repository or folder")
handle = qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.2))
action = policy.select_action(batch)
```
"""


@dataclass(frozen=True)
class CriticConfig:
    """Inputs, shape and reduction of a :class:`Critic`.

    A critic sees any of the state, camera views and the frozen policy's own features. Views and features pass
    through one encoder each, which all members share; the state goes to the members as it is. QPILOTS' LIBERO
    critic is ``hidden=(128, 128, 128), members=10, horizon=10`` on ``views`` of 64 pixels, from a global and
    a wrist camera; of its encoder the paper says no more than four convolutions, so that DrQ-v2's are the
    defaults.

    Attributes:
        obs_dim: size of the state vector; 0: the critic sees none.
        action_dim: size of one action, unpadded.
        horizon: actions per chunk that the critic sees.
        hidden: widths of the hidden layers.
        members: J, size of the ensemble.
        rho: pessimism, at least 0, in population standard deviations over the members.
        observation_key: where the state lies in a host's batch.
        views: where camera images lie in a host's batch.
        view_size: edge in pixels to which images are resized.
        features: size of the policy's pooled features, see :func:`qsteer.critics.pooled`; 0: none.
        latent: how many numbers an encoder makes of a view or of the features.
        channels: of each convolution.
        strides: of the convolutions, one each; ``(2, 2, 1, 1)`` costs a quarter.
        shift: largest random shift of a view in training, in pixels.
        stack: S independent critics (seeds) side by side, each with normalisation of its own. The rows of
            every batch come in S equal groups, one after another; each critic sees its group alone.
        contract: what the critic was trained on, which :func:`qsteer.steer` compares with the policy; None:
            nothing is known, and nothing compared.
    """

    obs_dim: int
    action_dim: int
    horizon: int
    hidden: Sequence[int] = (256, 256, 256)
    members: int = 4
    rho: float = 0.5
    observation_key: str = "observation.state"
    views: Sequence[str] = ()
    view_size: int = 64
    features: int = 0
    latent: int = 50
    channels: int = 32
    strides: Sequence[int] = (2, 1, 1, 1)
    shift: int = 4
    stack: int = 1
    contract: Any = None  # a Contract, once it is converted

    def __post_init__(self) -> None:
        """Check the values; sequences read from JSON become tuples."""
        for name in ("hidden", "views", "strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.contract, Mapping):  # read from JSON
            object.__setattr__(self, "contract", Contract(**self.contract))
        if not isinstance(self.contract, Contract | None):
            raise TypeError(
                f"CriticConfig.contract: expected a qsteer.contract.Contract or None, got {self.contract!r}"
            )
        check_at_least(self, 1, "action_dim", "horizon", "members", "latent", "channels", "stack")
        check_at_least(self, 0, "obs_dim", "features", "shift", "rho")
        if not self.keys:
            raise ValueError(
                "CriticConfig.obs_dim: expected at least 1, got 0, and neither views nor features; name what "
                "the critic is to see"
            )
        check_widths(self, "hidden")
        if not self.strides or min(self.strides) < 1 or find_encoded_size(self.view_size, self.strides) < 1:
            raise ValueError(
                "CriticConfig.strides: expected positive ones which leave something of a view of "
                f"{self.view_size} pixels, got {self.strides}; use fewer or smaller ones"
            )
        if self.stack > 1 and (self.views or self.features):
            raise ValueError(
                f"CriticConfig.stack: expected 1 with views or features, got {self.stack}; only critics of "
                "states are stacked, train the others one by one"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries of a batch that the critic reads."""
        state, features = (self.observation_key,) * (self.obs_dim > 0), (FEATURES,) * (self.features > 0)
        return (*state, *self.views, *features)

    @property
    def context(self) -> int:
        """Size C of what a member sees of an observation: the state, and a latent of each other input."""
        return self.obs_dim + self.latent * (len(self.views) + (self.features > 0))


class Critic(HubModule, tags=["qsteer", "robotics", "flow-matching", "critic"], model_card_template=CARD):
    """An ensemble of LayerNorm MLPs ``Q_j(s, a[0:H])``, evaluated in one batched call.

    An observation is the state alone, a tensor (B, obs_dim), or a mapping with the keys of a host's batch,
    ``config.keys``: the state, images (B, 3, h, w) as uint8 or floating point in [0, 1], and the policy's
    features (B, features) under ``"policy.features"``.

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
        self.normalizer = Normalizer(config.obs_dim, config.stack)
        self.views = nn.ModuleList(
            ViewEncoder(config.view_size, config.channels, config.strides, config.latent)
            for _ in config.views
        )
        self.features = FeatureEncoder(config.features, config.latent) if config.features else None
        chunk = config.horizon * config.action_dim
        self.net = EnsembleMLP(config.members, config.context, chunk, config.hidden, config.stack)
        self._warned = False
        self._ranged: set[str] = set()  # views whose range was checked

    @staticmethod
    def stacked(critics: Sequence["Critic"]) -> "Critic":
        """Return one critic that is copies of ``critics`` side by side; :meth:`unstacked` takes it apart.

        Raises:
            ValueError: there are none, their configurations differ or cannot be stacked, or one is a stack.
        """
        configs = {critic.config for critic in critics}
        if len(configs) != 1 or any(config.stack > 1 for config in configs):
            raise ValueError(
                "stacked: expected critics of one configuration, none of them a stack, got "
                f"{sorted(map(str, configs))}; only weights and normalisation may differ"
            )
        states = [critic.state_dict() for critic in critics]
        config = replace(configs.pop(), stack=len(critics))
        return critics[0]._like(config, {name: torch.stack([s[name] for s in states]) for name in states[0]})

    def unstacked(self) -> list["Critic"]:
        """Return copies of the critics of a stack, one by one."""
        seeds, config = self.config.stack, replace(self.config, stack=1)
        state = {name: tensor.unflatten(0, (seeds, -1)) for name, tensor in self.state_dict().items()}
        return [self._like(config, {name: t[s] for name, t in state.items()}) for s in range(seeds)]

    def fit_normalisation(self, obs: Batch) -> None:
        """Normalise states and the policy's features by their mean and standard deviation from now on.

        The statistics are part of the checkpoint.

        Args:
            obs: as the class says, with as many rows as there are; of a stack, in equal groups.
        """
        if self.config.obs_dim:
            self.normalizer.fit(self._state(obs))
        if self.features is not None:
            self.features.normalizer.fit(self._features(obs))

    def context(self, obs: Batch, *, augment: torch.Generator | None = None) -> Float[Tensor, "B C"]:
        """Return what a member sees of observations: the normalised state, the latents of views and features.

        Arguments and errors as for :meth:`encode`.
        """
        parts = [self.normalizer(self._state(obs))] if self.config.obs_dim else []
        if self.config.context == self.config.obs_dim:
            return parts[0]
        for key, encoder in zip(self.config.views, self.views, strict=True):
            view = self._view(obs, key)
            parts.append(
                encoder(view if augment is None else shift_randomly(view, self.config.shift, augment))
            )
        if self.features is not None:
            parts.append(self.features(self._features(obs)))
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                f"observation: expected one row per environment of each of {list(self.config.keys)}, got "
                f"{[len(part) for part in parts]} rows; repeat none of them"
            )
        return torch.cat(parts, dim=1)

    def encode(self, obs: Batch, *, augment: torch.Generator | None = None) -> Float[Tensor, "J _ D"]:
        """Return what the critic needs of observations: the observation's half of the first layer.

        Computed on the critic's device and in its precision, whatever those of ``obs``.

        Args:
            obs: as the class says.
            augment: shifts the views at random, for training; one draw per row and view. None: no shift.

        Returns:
            (J, B, D); of a stack of S critics (S * J, B / S, D), the members of each one after another.

        Raises:
            KeyError: the mapping lacks an input.
            TypeError: it is a tensor, and the critic sees more than a state.
            ValueError: an input has another shape, the rows do not fall into equal groups, or the first image
                of a view is floating point and plainly not in [0, 1].
        """
        return self.net.encode(self.context(obs, augment=augment))

    def members(self, z: Float[Tensor, "J _ D"], a: Float[Tensor, "B H A"]) -> Float[Tensor, "_ B"]:
        """Return each member's value of the chunks ``a`` under encoded observations ``z``: (J, B).

        Cost: one pass of the ensemble, all members in one batched call.

        Raises:
            ValueError: ``a`` is not (B, horizon, action_dim), or its rows are not those of ``z``.
        """
        expected = (self.config.stack * z.shape[1], self.config.horizon, self.config.action_dim)
        if a.shape != expected:
            raise ValueError(
                f"action: expected shape (B, H, A) = {expected}, got {tuple(a.shape)}; pass the executed "
                "steps, without padding, one chunk per observation (value.repeat(k) for k candidates of each)"
            )
        return self.net(z, a.flatten(1).to(z.dtype))

    def bind(self, obs: Batch) -> "BoundCritic":
        """Encode ``obs`` once, without a graph, and return the :class:`~qsteer.types.Value` closed over it.

        Cost: the encoders and one matrix product here, then one ensemble pass per call of the value.
        """
        if not self._warned:
            self._warned = True
            warn_of_few_members(self.config.rho, self.config.members)
        with torch.no_grad():
            return BoundCritic(self, self.encode(obs))

    def _like(self, config: CriticConfig, state: Mapping[str, Tensor]) -> "Critic":
        """Return a critic of ``config`` with copies of the tensors in ``state``, whose axes may be split."""
        with torch.device("meta"):  # no random number is drawn
            critic = Critic(config)
        shapes = {name: tensor.shape for name, tensor in critic.state_dict().items()}
        state = {name: tensor.reshape(shapes[name]).clone() for name, tensor in state.items()}
        critic.load_state_dict(state, assign=True)
        return critic.train(self.training)

    def _state(self, obs: Batch) -> Float[Tensor, "B O"]:
        state = self._read(obs, self.config.observation_key, "observation_key")
        if state.ndim != 2 or state.shape[1] != self.config.obs_dim:
            raise ValueError(
                f"observation: expected shape (B, obs_dim) = (B, {self.config.obs_dim}), got "
                f"{tuple(state.shape)}; flatten it and keep one row per environment"
            )
        if state.shape[0] % self.config.stack:
            raise ValueError(
                f"observation: expected rows in {self.config.stack} equal groups, one for each critic of the "
                f"stack, got {state.shape[0]} rows; pass every critic as many"
            )
        return state.to(self.normalizer.mean)

    def _view(self, obs: Batch, key: str) -> Float[Tensor, "B 3 s s"]:
        image = self._read(obs, key, "views")
        known = image.dtype == torch.uint8 or image.is_floating_point()
        if image.ndim != 4 or image.shape[1] != 3 or not known:
            raise ValueError(
                f"observation: expected {key!r} as (B, 3, h, w), uint8 or floating point in [0, 1], got "
                f"{tuple(image.shape)} of {image.dtype}; put channels first: image.permute(0, 3, 1, 2)"
            )
        if key not in self._ranged and image.dtype != torch.uint8 and not _is_captured(image):
            self._ranged.add(key)
            low, high = (bound.item() for bound in image.aminmax()) if image.numel() else (0.0, 1.0)
            if low < -OVERSHOOT or high > 1 + OVERSHOOT:
                self._ranged.discard(key)
                raise ValueError(
                    f"observation: expected {key!r} as uint8, or floating point in [0, 1], got floats from "
                    f"{low:.3g} to {high:.3g}; pass bytes, or image / 255, as in training"
                )
        return to_unit_view(image, self.config.view_size, self.net.first.bias)

    def _features(self, obs: Batch) -> Float[Tensor, "B F"]:
        features = self._read(obs, FEATURES, "features")
        if features.ndim != 2 or features.shape[1] != self.config.features:
            raise ValueError(
                f"observation: expected {FEATURES!r} as (B, features) = (B, {self.config.features}), got "
                f"{tuple(features.shape)}; pool tokens with qsteer.critics.pooled(field.features), and set "
                "CriticConfig.features to the policy's width"
            )
        return features.to(self.net.first.bias)

    def _read(self, obs: Batch, key: str, setting: str) -> Tensor:
        """Return the input under ``key``, which the configuration names in ``setting``."""
        if isinstance(obs, Mapping):
            if key in obs:
                return obs[key]
            raise KeyError(
                f"observation: expected key {key!r} in the batch, got {sorted(obs)}; set "
                f"CriticConfig.{setting} or pass critic_inputs= to steer"
            )
        if self.config.views or self.config.features:
            raise TypeError(
                f"observation: expected a mapping with {list(self.config.keys)}, got {type(obs).__name__}; "
                "only a critic of states alone takes a tensor"
            )
        return obs


def _is_captured(image: Tensor) -> bool:
    """Return whether its values cannot be read now."""
    return torch.compiler.is_compiling() or (image.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True)
class BoundCritic(Value):
    """A :class:`Critic` closed over encoded observations."""

    critic: Critic
    z: Float[Tensor, "J _ D"]

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the pessimistic value ``mean_j Q_j - rho std_j Q_j`` of each chunk."""
        return pessimistic(self.members(a), self.critic.config.rho)

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return each member's value of each chunk."""
        return self.critic.members(self.z, a)

    def repeat(self, k: int) -> "BoundCritic":
        """Return the value for ``k`` rows per observation; nothing is encoded again."""
        return replace(self, z=self.z.repeat_interleave(k, dim=1))


def warn_of_few_members(rho: float, members: int) -> None:
    """Warn of a pessimism that the spread of one or two members cannot carry."""
    if rho > 0 and members < 3:
        warnings.warn(
            f"critic: expected 3 or more members for a pessimism of rho = {rho}, got {members}: so small a "
            "spread is noise, in targets and, as a gradient, in every push; train more, or set rho to 0",
            skip_file_prefixes=(str(Path(__file__).parents[1]),),
        )

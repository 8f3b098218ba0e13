"""Flow maps: jumps between two times of the flow, learnt, or made of the frozen policy's own integration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.checks import check_at_least, check_choice, check_widths
from qsteer.clock import Chain, Time
from qsteer.flow import expand_time, factor, normal, read_features, repeat_rows
from qsteer.hub import HubModule
from qsteer.maps.networks import ChunkMLP, ChunkNetwork, ChunkTransformer
from qsteer.types import Field, Jump

CARD = """---
{{ card_data }}
---

# Flow map of a flow policy

A learnt jump `X_{r,t}(x)` between two times of the policy's flow, for qsteer: a beam search looks ahead with
it, and in one step from noise it is a policy.

* action: shape `(B, {{ config.horizon }}, {{ config.action_dim }})`, as the policy generates it, with padding
* features of the observation, which the policy provides: {{ config.features }} numbers, per token if it has
  tokens

```python
flow_map = qsteer.maps.FlowMap.from_pretrained("this repository or folder")
handle = qsteer.steer(policy, critic, qsteer.BeamSearch(flow_map=flow_map))
action = policy.select_action(batch)
```
"""


@dataclass(frozen=True)
class MapConfig:
    """Shape of a learnt map.

    Attributes:
        horizon: steps of a chunk, as the policy generates it (with padding).
        action_dim: dimensions of an action, as the policy generates it (with padding).
        features: size of the observation's feature vector, or of a feature token.
        network: ``mlp`` for feature vectors (B, F) of state policies, ``transformer`` for feature tokens
            (B, L, F) of vision-language-action models.
        hidden: widths of the MLP's hidden layers.
        width, depth, heads: of the transformer.
        harmonics: Fourier harmonics per time.
        residual: the network adds to the frozen policy's own velocity, and starts as it; without, the map
            stands alone, and needs no policy once it is trained.
    """

    horizon: int
    action_dim: int
    features: int
    network: Literal["mlp", "transformer"] = "mlp"
    hidden: Sequence[int] = (512, 512, 512, 512)
    width: int = 512
    depth: int = 8
    heads: int = 8
    harmonics: int = 32
    residual: bool = False

    def __post_init__(self) -> None:
        """Check the values; widths read from JSON become a tuple."""
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_at_least(self, 1, "horizon", "action_dim", "features", "width", "depth", "heads", "harmonics")
        check_choice(self, "network", ("mlp", "transformer"))
        check_widths(self, "hidden")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads = {self.heads}, got {self.width}")

    def build(self, chunks: int, times: int) -> ChunkNetwork:
        """Return an untrained network of ``chunks`` chunks and ``times`` times."""
        shape = {
            "features": self.features,
            "horizon": self.horizon,
            "action_dim": self.action_dim,
            "chunks": chunks,
            "times": times,
            "harmonics": self.harmonics,
        }
        if self.network == "mlp":
            return ChunkMLP(**shape, hidden=self.hidden)
        return ChunkTransformer(**shape, width=self.width, depth=self.depth, heads=self.heads)


class LearntMap(HubModule):
    """What learnt maps have in common: how they are bound to observations, saved and loaded."""

    config: MapConfig
    net: ChunkNetwork

    def encode(self, features: Any, field: Field | None) -> Any:
        """Encode the observation's features, without a graph.

        Raises:
            ValueError: a residual map without a field.
        """
        if self.config.residual and field is None:
            raise ValueError(
                f"{type(self).__name__}: expected the field of the policy to which a residual map adds, got "
                "none; use on(field), or bind(features, field)"
            )
        with torch.no_grad():
            return self.net.encode(normal(features))


class FlowMap(LearntMap, tags=["qsteer", "robotics", "flow-matching", "flow-map"], model_card_template=CARD):
    """A learnt two-time jump ``X_{r,t}(x) = x + (t - r) u_{r,t}(x)``; in one step, a policy.

    Bound to observations by :meth:`bind` or to a policy's field by :meth:`on`, it is called as ``(x, r, t)``.
    A *residual* map learns what a long jump adds to the policy's velocity where it starts,
    ``u_{r,t}(x) = v(x, r) + net``: untrained, it is one Euler step.

    Example:
        >>> flow_map = FlowMap(MapConfig(horizon=5, action_dim=2, features=3)).bind(torch.zeros(4, 3))
        >>> flow_map(torch.randn(4, 5, 2), torch.zeros(4), torch.ones(4)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, config: MapConfig) -> None:
        """Build an untrained map."""
        super().__init__()
        self.config = config
        self.net = config.build(chunks=2 if config.residual else 1, times=2)
        if config.residual:
            self.net.start_at_zero()

    def bind(self, features: Any, field: Field | None = None) -> "BoundFlowMap":
        """Encode the observation's features once, without a graph, and return the map closed over them.

        Args:
            features: of the observation.
            field: the policy's velocity; only a residual map needs it.

        Raises:
            ValueError: a residual map without a field.
        """
        z = self.encode(features, field)
        return BoundFlowMap(self, z, field if self.config.residual else None)

    def on(self, field: Field) -> "BoundFlowMap":
        """Bind to a policy's velocity and to the features of the observation which it is closed over.

        Raises:
            ValueError: the field has no features.
        """
        return self.bind(read_features(field), field)

    def average_velocity(
        self,
        z: Any,
        x: Float[Tensor, "B H A"],
        r: Time,
        t: Time,
        field: Field | None = None,
    ) -> Float[Tensor, "B H A"]:
        """Return ``u_{r,t}(x)`` for encoded features ``z``; a residual map needs the policy's field."""
        times = expand_time(r, x), expand_time(t, x)
        if not self.config.residual or field is None:
            return self.net(z, (x,), times)
        v = field(x, r)
        return v + self.net(z, (x, v), times)


@dataclass(frozen=True)
class BoundFlowMap(Jump):
    """A :class:`FlowMap` closed over encoded observations."""

    flow_map: FlowMap
    z: Any
    field: Field | None = None

    def __call__(self, x: Float[Tensor, "B H A"], r: Time, t: Time) -> Float[Tensor, "B H A"]:
        """Jump from time r to time t. Cost: 1 forward of the map; if it is residual, 1 of the policy too."""
        return x + factor(t - r, x) * self.flow_map.average_velocity(self.z, x, r, t, self.field)

    def repeat(self, k: int) -> "BoundFlowMap":
        """Return the map for ``k`` rows per observation; nothing is encoded again."""
        field = None if self.field is None else self.field.repeat(k)
        return replace(self, z=repeat_rows(self.z, k), field=field)


@dataclass(frozen=True)
class EulerMap(Jump):
    """The frozen policy's own integration as a two-time jump, for policies without a learnt map.

    Cost: ``ceil((t - r) steps)`` velocity forwards.

    Args:
        field: the policy's velocity.
        steps: Euler steps from 0 to 1; None: the field's own number. A shorter jump has its share of them.

    Raises:
        ValueError: fewer than one step.
    """

    field: Field
    steps: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_at_least(self, 1, "steps")

    def __call__(self, x: Float[Tensor, "B H A"], r: Time, t: Time) -> Float[Tensor, "B H A"]:
        """Integrate from time r to time t; from 0 to 1 it is the policy's own chain.

        With times per row the longest jump is read from the device.
        """
        clock = self.field.clock
        steps = clock.steps if self.steps is None else self.steps
        if isinstance(r, Tensor) or isinstance(t, Tensor):
            wide = torch.float32 if x.device.type == "mps" else torch.float64
            r, t = expand_time(r, x).to(wide), expand_time(t, x).to(wide)
            longest = float((t - r).abs().max())
        else:
            longest = abs(t - r)
        n = max(1, math.ceil(longest * steps - 1e-4))  # float32 times miss the grid by an ulp
        step = (t - r) / n
        whole = not isinstance(r, Tensor) and (r, n) == (0, steps)
        field = self.field.chain(self.steps, None if whole else Chain(r, step))
        for i in range(n):
            s = clock.snap(r + i * step)
            x = field.advance(x, field(x, s), s, step)
        return x

    def repeat(self, k: int) -> "EulerMap":
        """Return the map for ``k`` rows per observation."""
        return replace(self, field=self.field.repeat(k))

"""Meta flow maps: one forward pass from noise to a sample of the endpoint posterior p(x1 | x_t = x)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from qsteer.clock import Time
from qsteer.flow import denoise, expand_time, factor, read_features, repeat_rows
from qsteer.maps.flow_maps import LearntMap, MapConfig
from qsteer.maps.glass import Glass
from qsteer.maps.networks import ChunkNetwork
from qsteer.types import Field, PosteriorSampler

CARD = """---
{{ card_data }}
---

# Meta flow map of a flow policy

One forward pass from noise to a sample of the clean action given a noisy one, `p(x1 | x_t)`, for qsteer:
posterior samples steer the policy by what its actions will be worth, not only their mean.

* action: shape `(B, {{ config.horizon }}, {{ config.action_dim }})`, as the policy generates it, with padding
* features of the observation, which the policy provides: {{ config.features }} numbers, per token if it has
  tokens
* {{ "adds to the policy's own velocity: use it with the policy that it was distilled from"
  if config.residual else "stands alone" }}

```python
meta = qsteer.maps.MetaFlowMap.from_pretrained("this repository or folder")
handle = qsteer.steer(policy, critic, qsteer.Posterior(meta, alpha=0.2))
action = policy.select_action(batch)
```
"""


@dataclass(frozen=True)
class MetaMapConfig(MapConfig):
    """Shape of a :class:`MetaFlowMap`.

    Attributes:
        residual: the network adds to the frozen policy's own velocity (see :class:`MetaFlowMap`); without, it
            stands alone, needs no policy to train from data, and none to sample.
    """

    residual: bool = True


class MetaFlowMap(
    LearntMap, tags=["qsteer", "robotics", "flow-matching", "meta-flow-map"], model_card_template=CARD
):
    """Average velocity ``vhat_{u,w}(xbar; t, x)`` of the posterior flow of outer state (x, t), from u to w.

    ``X_{u,w}(xbar) = xbar + (w - u) vhat_{u,w}(xbar)``, and ``X_{0,1}(eps)`` is one posterior sample (Meta
    Flow Maps, Potaptchik et al. 2026; QPILOTS section 4).

    A *residual* map starts as the frozen policy's own GLASS velocity and learns what a long step adds to it:
    ``vhat_{u,w} = A x + B xbar + C (v(x*, t*) + net)``, where the network's output starts at zero. At u = 0,
    where samples are drawn, ``x* = x`` and ``t* = t``: a sample is ``D(x, t) + (1 - t) net(eps)``, the
    policy's denoised action plus a learnt deviation, and an untrained map makes of :class:`qsteer.Posterior`
    a :class:`qsteer.Tweedie`. It costs the one evaluation of the policy that a guided step makes anyway.

    Example:
        >>> meta = MetaFlowMap(MetaMapConfig(horizon=5, action_dim=2, features=3, residual=False))
        >>> posterior = meta.bind(torch.zeros(4, 3))
        >>> posterior(torch.randn(8, 4, 5, 2), torch.zeros(4, 5, 2), torch.full((4,), 0.5)).shape
        torch.Size([8, 4, 5, 2])
    """

    config: MetaMapConfig

    def __init__(self, config: MetaMapConfig) -> None:
        """Build an untrained map."""
        super().__init__()
        self.config = config
        self.net = config.build(chunks=3 if config.residual else 2, times=3)
        if config.residual:
            self.net.start_at_zero()

    def bind(self, features: Any, field: Field | None = None) -> "BoundMetaFlowMap | ResidualMetaFlowMap":
        """Encode the observation's features once, without a graph, and return the map closed over them.

        Args:
            features: of the observation.
            field: the policy's velocity; only a residual map needs it.

        Raises:
            ValueError: a residual map without a field.
        """
        z = self.encode(features, field)
        if field is None or not self.config.residual:
            return BoundMetaFlowMap(self, z)
        return ResidualMetaFlowMap(self, z, field)

    def on(self, field: Field) -> "BoundMetaFlowMap | ResidualMetaFlowMap":
        """Bind to a policy's velocity and to the features of the observation which it is closed over.

        Raises:
            ValueError: the field has no features.
        """
        return self.bind(read_features(field), field)

    def velocity(
        self,
        z: Any,
        xbar: Float[Tensor, "B H A"],
        u: Float[Tensor, "B"],
        w: Float[Tensor, "B"],
        x: Float[Tensor, "B H A"],
        t: Float[Tensor, "B"],
        base: Glass | None = None,
    ) -> Float[Tensor, "B H A"]:
        """Return ``vhat_{u,w}(xbar; t, x)`` for encoded features ``z``.

        Args:
            z: encoded features.
            xbar: inner state at time u.
            u: inner time.
            w: inner time to which the velocity is averaged, not before u.
            x: outer state.
            t: outer time.
            base: the policy's answer, ``glass(field, x, t, xbar, u)``; only a residual map needs it.
        """
        if base is None:
            return self.net(z, (xbar, x), (t, u, w))
        return base.velocity + base.gain * self.net(z, (xbar, x, base.v), (t, u, w))


@dataclass(frozen=True)
class BoundMetaFlowMap(PosteriorSampler):
    """A map that stands alone, closed over encoded observations."""

    meta: MetaFlowMap
    z: Any

    def __call__(
        self, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "N B H A"]:
        """Return one posterior sample per noise. Cost: 1 forward of the map on N rows."""
        return eps + run_branches(self.meta.net, self.z, eps, (x,), t)

    def repeat(self, k: int) -> "BoundMetaFlowMap":
        """Return the map for ``k`` rows per observation; nothing is encoded again."""
        return replace(self, z=repeat_rows(self.z, k))


@dataclass(frozen=True)
class ResidualMetaFlowMap(PosteriorSampler):
    """A residual map, closed over encoded observations and the policy's velocity on them."""

    meta: MetaFlowMap
    z: Any
    field: Field

    def __call__(
        self, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "N B H A"]:
        """Return one posterior sample per noise. Cost: 1 velocity forward, 1 forward of the map on N rows."""
        return self.given(self.field(x, t), eps, x, t)

    def draw(
        self, field: Field, eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> tuple[Float[Tensor, "B H A"], Float[Tensor, "N B H A"]]:
        """Return v(x, t) and the samples, which add to it."""
        v = field(x, t)
        return v, self.given(v, eps, x, t)

    def given(
        self, v: Float[Tensor, "B H A"], eps: Float[Tensor, "N B H A"], x: Float[Tensor, "B H A"], t: Time
    ) -> Float[Tensor, "N B H A"]:
        """Return the same samples where ``v = v(x, t)`` is known."""
        return denoise(x, v, t) + factor(1 - t, x) * run_branches(self.meta.net, self.z, eps, (x, v), t)

    def repeat(self, k: int) -> "ResidualMetaFlowMap":
        """Return the map for ``k`` rows per observation; nothing is encoded again."""
        return replace(self, z=repeat_rows(self.z, k), field=self.field.repeat(k))


def run_branches(
    net: ChunkNetwork, z: Any, eps: Float[Tensor, "N B H A"], chunks: Sequence[Tensor], t: Time
) -> Float[Tensor, "N B H A"]:
    """Run the network from inner time 0 to 1 on every noise of every row."""
    n = len(eps)
    noise = rearrange(eps, "n b h a -> (b n) h a")
    inputs = (noise, *(chunk.repeat_interleave(n, 0) for chunk in chunks))
    t = expand_time(t, eps[0]).repeat_interleave(n, 0)
    out = net(repeat_rows(z, n), inputs, (t, torch.zeros_like(t), torch.ones_like(t)))
    return rearrange(out, "(b n) h a -> n b h a", n=n)

"""What all checks look at: states, what the policy makes of them, and what the critic says of that."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.flow import ask, ask_members, clip_actions
from qsteer.policies import FlowPolicy
from qsteer.sampling import sample
from qsteer.statistics import seed_bootstrap
from qsteer.steering.opening import Executed, open_action
from qsteer.types import Bindable, Bounds, Field, Value

type Estimate = tuple[float, float, float]
"""A mean over states and its 95 % interval."""


@dataclass(frozen=True)
class Probe:
    """One batch of B states and what the policy makes of S noises of each.

    Attributes:
        field: the policy's velocity.
        value: the critic's value.
        other: the value of a critic of another seed; None: there is none.
        bounds: to which actions are clipped before the critic sees them.
        noise: where the chains begin.
        samples: where the policy's own chains end, unclipped.
        q: the critic's value of each sample.
        members: what each member says of it.
    """

    field: Field
    value: Value
    other: Value | None
    bounds: Bounds
    noise: Float[Tensor, "S B H A"]
    samples: Float[Tensor, "S B H A"]
    q: Float[Tensor, "S B"]
    members: Float[Tensor, "J S B"]

    @classmethod
    def of(
        cls, field: Field, value: Value, other: Value | None, bounds: Bounds, noise: Float[Tensor, "S B H A"]
    ) -> "Probe":
        """Run the policy from each noise, and ask the critic what it makes of that.

        Cost: S chains of the policy on B rows, one after another; 2 S critic forwards.
        """
        samples = torch.stack([sample(field, None, x) for x in noise])
        with torch.no_grad():
            clipped = [clip_actions(a, bounds) for a in samples]
            q = torch.stack([ask(value, a) for a in clipped])
            members = torch.stack([ask_members(value, a) for a in clipped], 1)
        return cls(field, value, other, bounds, noise, samples, q, members)

    @property
    def mask(self) -> Tensor:
        """(H, A), 1 on the entries which the critic sees."""
        mask = self.value.mask
        return torch.ones_like(self.noise[0, 0]) if mask is None else mask

    def seen(self, x: Float[Tensor, "*R H A"]) -> Float[Tensor, "*R D"]:
        """Return the entries which the critic sees, flat, in double precision on the CPU."""
        return x[..., self.mask.bool()].detach().double().cpu()

    def ask(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return the critic's value of clipped actions."""
        with torch.no_grad():
            return ask(self.value, clip_actions(a, self.bounds))


@dataclass(frozen=True)
class Part(Value):
    """The mean of some members of a value."""

    value: Value
    chosen: tuple[int, ...]
    mask: Tensor | None = None

    @classmethod
    def of(cls, value: Value, chosen: Iterable[int]) -> "Part":
        """Return the mean of the chosen members."""
        return cls(value, tuple(chosen), value.mask)

    def __call__(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        """Return their mean."""
        return self.members(a).mean(0)

    def members(self, a: Float[Tensor, "B H A"]) -> Float[Tensor, "J B"]:
        """Return what each of them says."""
        return ask_members(self.value, a)[list(self.chosen)]

    def repeat(self, k: int) -> "Part":
        """Return the value for ``k`` rows per observation."""
        return replace(self, value=self.value.repeat(k))


def open_batch(
    policy: Any, critic: Bindable, batch: Any, critic_inputs: Callable[[Any], Any] | None
) -> tuple[Field, Value, Float[Tensor, "B H A"]]:
    """Return a policy's velocity and a critic's value for a batch, and noise of the shape of a chunk.

    Raises:
        As :func:`qsteer.open_action`.
    """
    if not isinstance(policy, FlowPolicy):
        opened = open_action(policy, batch, critic, critic_inputs=critic_inputs)
        assert opened.value is not None  # a critic was given
        return opened.field, opened.value, opened.noise
    value = critic.bind(batch if critic_inputs is None else critic_inputs(batch))
    field = policy.field(batch)
    like = next(policy.parameters())
    shape = policy.config.horizon, policy.config.action_dim
    noise = torch.zeros(len(batch), *shape, device=like.device, dtype=like.dtype)
    if (horizon := getattr(getattr(critic, "config", None), "horizon", shape[0])) != shape[0]:
        return field, Executed.of(value, noise, horizon, shape[1]), noise
    return field, value, noise


def read_batches(batches: Iterable[Any]) -> list[Any]:
    """Return the batches.

    Raises:
        TypeError: one batch is given in the place of several.
        ValueError: there is none.
    """
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(
            f"batches: expected several of what the policy takes, got one {type(batches).__name__}; "
            "pass [batch]"
        )
    found = list(batches)
    if not found:
        raise ValueError("batches: expected at least one, got none; an iterator serves once")
    return found


def draw_noise(
    like: Float[Tensor, "B H A"], samples: int, generator: torch.Generator
) -> Float[Tensor, "S B H A"]:
    """Return standard normal noise, the same on every device."""
    return torch.randn(samples, *like.shape, generator=generator).to(like)


def estimate(values: Float[Tensor, "N"]) -> list[float]:
    """Return a mean over states and its 95 % bootstrap interval; states are resampled."""
    band = seed_bootstrap(values.double().cpu().numpy(), samples=2000)
    return [float(band.mean), float(band.low), float(band.high)]


def over_states(values: Iterable[Float[Tensor, "*R B"]]) -> Float[Tensor, "*R N"]:
    """Join what was found for the states of each batch."""
    return torch.cat([value.detach().double().cpu() for value in values], -1)

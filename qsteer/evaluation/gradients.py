"""How far a cheaper gradient is from the true one: direction and norm, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.rules import Guidance, Steered, Tweedie
from qsteer.sampling import outside_inference_mode
from qsteer.types import Field, Value


@dataclass(frozen=True)
class Agreement:
    """One rule's gradient against the true one, at K guided steps of B chains; NaN where it does not guide.

    Attributes:
        t: times of the steps.
        cosine: of the two gradients of each row, over the entries which the critic sees.
        ratio: norm of the rule's gradient over the true one's.
    """

    t: Float[Tensor, "K"]
    cosine: Float[Tensor, "K B"]
    ratio: Float[Tensor, "K B"]


def agreement(
    field: Field,
    value: Value,
    noise: Float[Tensor, "B H A"],
    rules: Mapping[str, Guidance],
    *,
    truth: Guidance = Tweedie(),  # noqa: B008 (frozen)
    steps: int | None = None,
) -> dict[str, Agreement]:
    """Compare gradients along the chains which ``truth`` steers from ``noise``.

    Each rule is asked for its unscaled direction at the states and times of those chains, in their order, so
    that one which remembers its last step remembers it from there. The match is of directions before any
    scaling: with ``match_norm`` only the cosine matters.

    Cost: at each step that of ``truth`` twice and of every rule once.

    Args:
        field: the policy's velocity; of a pretrained policy :func:`qsteer.open_action` has it.
        value: the critic's value.
        noise: where the chains begin.
        rules: what is compared, by name.
        truth: what it is compared with, and what steers; of strength 0, the chains are the policy's own.
        steps: Euler steps; None: the field's own number.

    Returns:
        For each name the agreement at the steps which ``truth`` guides, in float64 on the CPU.

    Raises:
        ValueError: it guides none.
    """
    asked = {
        name: Steered(rule.on(field), field, value, steps) for name, rule in {**rules, "": truth}.items()
    }
    steered, x = truth(field, value).chain(steps), noise
    clock, times, found = steered.clock, [], []
    with outside_inference_mode():
        for t, dt in clock.grid(steps):
            if truth.guides(t, clock.steps):
                times.append(t)
                found.append({name: direction(rule, x, t) for name, rule in asked.items()})
            x = x + dt * steered(x, t)
    if not found:
        raise ValueError(
            f"truth: expected a rule that guides at least one of the chain's steps, got {truth}; widen its "
            "window"
        )
    result = {}
    for name in rules:
        pairs = [(step[name], step[""]) for step in found]
        dots, mine, its = (
            torch.stack([(a * b).sum(1) for a, b in group])
            for group in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
        )
        cosine, ratio = dots / (mine * its).sqrt(), (mine / its).sqrt()
        result[name] = Agreement(torch.tensor(times, dtype=torch.float64), cosine, ratio)
    return result


def direction(steered: Steered, x: Float[Tensor, "B H A"], t: float) -> Float[Tensor, "B HA"]:
    """Return a rule's unscaled gradient on the entries which the critic sees; NaN at unguided times."""
    if not steered.rule.guides(t, steered.clock.steps):
        return torch.full_like(x.flatten(1), torch.nan, dtype=torch.float64, device="cpu")
    return steered.ascend(x.detach(), t).gradient.flatten(1).double().cpu()

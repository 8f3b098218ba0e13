"""Does a push along the gradient pay, as judged by members that did not choose it, and by how much?"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.auditing.page import Check, Verdict
from qsteer.auditing.probes import Part, Probe, estimate, over_states
from qsteer.flow import ask, clip_actions
from qsteer.rules import Guidance, RandomDirection
from qsteer.sampling import sample
from qsteer.trace import Trace
from qsteer.types import Value

ALPHAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
TRUST = 1.5
WORTH = 0.5
CHAINS = 2


@dataclass(frozen=True)
class Sweep:
    """What pushes of each strength do, in K strengths and N states.

    Attributes:
        alphas: the strengths.
        gain: by how much judges prefer the pushed action to its unsteered twin, in standard deviations of the
            judge's values over the policy's own actions of a state.
        random: the same of a random direction of the same norm.
        moved: displacement from the twin, root mean square over the entries which the critic sees.
        spread: standard deviation of the policy's own actions of a state, likewise.
    """

    alphas: tuple[float, ...]
    gain: Float[Tensor, "K N"]
    random: Float[Tensor, "K N"]
    moved: Float[Tensor, "K N"]
    spread: Float[Tensor, "N"]


def sweep(probes: Sequence[Probe], rule: Guidance, alphas: Sequence[float], seed: int) -> Sweep | None:
    """Push by one half of the ensemble, judge by the other, both ways; or judge by another critic.

    Returns:
        What was found; None: there is one member and no other critic.

    Cost: per strength and batch 4 chains of the rule and 2 of the random direction.
    """
    if len(probes[0].members) < 2 and probes[0].other is None:
        return None
    sides = [splits(probe) for probe in probes]
    units = [_scale(probes, [side[i][1] for side in sides]) for i in range(2)]
    rows = [
        [_push(probe, side, units, with_strength(rule, alpha), seed) for alpha in alphas]
        for probe, side in zip(probes, sides, strict=True)
    ]
    gain, random, moved = (
        torch.stack([over_states(row[k][i] for row in rows) for k in range(len(alphas))]) for i in range(3)
    )
    spread = over_states(probe.seen(probe.samples).var(0).mean(-1).sqrt() for probe in probes)
    return Sweep(tuple(alphas), gain, random, moved, spread)


def _push(
    probe: Probe, sides: Sequence[tuple[Value, Value]], units: Sequence[float], rule: Guidance, seed: int
) -> tuple[Tensor, ...]:
    """Return for each state the gain, that of a random direction, and the displacement, at one strength."""
    gains, randoms, moves = [], [], []
    control = as_random(rule, seed)
    for s in range(CHAINS):
        x, twin = probe.noise[s], clip_actions(probe.samples[s], probe.bounds)
        astray = clip_actions(sample(probe.field, probe.value, x, rule=control), probe.bounds)
        for (guide, judge), unit in zip(sides, units, strict=True):
            a = clip_actions(sample(probe.field, guide, x, rule=rule), probe.bounds)
            with torch.no_grad():
                gains.append((ask(judge, a) - ask(judge, twin)).double().cpu() / unit)
                randoms.append((ask(judge, astray) - ask(judge, twin)).double().cpu() / unit)
            moves.append(probe.seen(a - twin).square().mean(-1).sqrt())
    return tuple(torch.stack(column).mean(0) for column in (gains, randoms, moves))


def splits(probe: Probe) -> list[tuple[Value, Value]]:
    """Return who guides and who judges."""
    if probe.other is not None:
        return [(probe.value, probe.other), (probe.other, probe.value)]
    members = range(len(probe.members))
    even, odd = (Part.of(probe.value, members[i::2]) for i in (0, 1))
    return [(even, odd), (odd, even)]


@torch.no_grad()
def _scale(probes: Sequence[Probe], judges: Sequence[Value]) -> float:
    """Return the standard deviation of a judge's values over the policy's own actions of a state."""
    pairs = zip(probes, judges, strict=True)
    q = [torch.stack([ask(judge, clip_actions(a, p.bounds)) for a in p.samples]) for p, judge in pairs]
    return float(over_states(q).var(0).mean().sqrt()) or 1.0


def with_strength(rule: Guidance, alpha: float) -> Guidance:
    """Return the rule at another strength."""
    name = "weight" if any(f.name == "weight" for f in fields(rule)) else "alpha"
    changed: dict[str, Any] = {name: alpha}
    return replace(rule, **changed)


def as_random(rule: Guidance, seed: int) -> RandomDirection:
    """Return a random direction of the rule's norm and window."""
    strength = rule.strength
    assert isinstance(strength, float | int)  # one of the grid
    return RandomDirection(
        float(strength),
        seed,
        scaling=rule.scaling,
        clip=rule.clip,
        start=rule.start,
        stop=rule.stop,
        every=rule.every,
    )


def recommend(found: Sweep) -> tuple[tuple[float, float], float] | None:
    """Return the range of strengths that pay, and the one that is proposed; None: none pays.

    A strength pays if its gain and its gain over a random direction are above 0 with 95 % confidence, and the
    median displacement is at most TRUST standard deviations of the policy's own actions. The range is that
    around the largest gain. The proposed one is the least that has WORTH of the largest gain.
    """
    pays = []
    for k in range(len(found.alphas)):
        gain, ahead = estimate(found.gain[k]), estimate(found.gain[k] - found.random[k])
        near = float(found.moved[k].median() / found.spread.median().clamp(min=1e-9)) <= TRUST
        pays.append(gain[1] > 0 and ahead[1] > 0 and near)
    if not any(pays):
        return None
    mean = found.gain.mean(1)
    best = max((k for k, paying in enumerate(pays) if paying), key=lambda k: float(mean[k]))
    low = high = best
    while low > 0 and pays[low - 1]:
        low -= 1
    while high < len(pays) - 1 and pays[high + 1]:
        high += 1
    chosen = next(k for k in range(low, high + 1) if mean[k] >= WORTH * mean[best])
    return (found.alphas[low], found.alphas[high]), found.alphas[chosen]


def check_push(found: Sweep | None) -> Check:
    """Say what a push pays, by strength."""
    question = "Does a push pay, as judged by members that did not choose it?"
    threshold = (
        "Passes where gain, and gain over a random direction of the same norm, are above 0 (95 % interval "
        f"over states) at a median displacement of at most {TRUST:g} standard deviations of the policy's own "
        "actions: beyond, no judge of the same data is to be believed. Proposed: the least strength with "
        f"{WORTH:.0%} of the largest gain."
    )
    if found is None:
        return Check("push", question, "not known", "one member, and no other critic to judge", threshold)
    advice = recommend(found)
    figures: dict[str, Any] = {
        "alpha": list(found.alphas),
        "gain": [estimate(row) for row in found.gain],
        "random": [estimate(row) for row in found.random],
        "ahead": [estimate(a - b) for a, b in zip(found.gain, found.random, strict=True)],
        "displacement": [row.quantile(row.new_tensor([0.1, 0.5, 0.9])).tolist() for row in found.moved],
        "spread": float(found.spread.median()),
    }
    verdict: Verdict = "fail" if advice is None else "pass"
    best = int(found.gain.mean(1).argmax())
    finding = (
        f"at best {figures['gain'][best][0]:+.2f} ({figures['gain'][best][1]:+.2f} to "
        f"{figures['gain'][best][2]:+.2f}) standard deviations of the policy's own actions, at alpha "
        f"{found.alphas[best]:g}; a random direction {figures['random'][best][0]:+.2f}"
    )
    finding += "; no strength pays" if advice is None else f"; pays from {advice[0][0]:g} to {advice[0][1]:g}"
    return Check("push", question, verdict, finding, threshold, figures)


def check_strength(probes: Sequence[Probe], rule: Guidance) -> Check:
    """Say what the whole critic does at the proposed strength: strength and displacement, 10 to 90 %.

    Cost: 1 chain of the rule a batch.
    """
    trace, moved, spread = Trace(), [], []
    for probe in probes:
        a = sample(probe.field, probe.value, probe.noise[0], rule=rule, trace=trace)
        moved.append(probe.seen(a - probe.samples[0]).square().mean(-1).sqrt())
        spread.append(probe.seen(probe.samples).var(0).mean(-1).sqrt())
    ends = [0.1, 0.5, 0.9]
    strength = torch.from_numpy(trace.arrays()["strength"]).double().flatten()
    strength = strength[strength.isfinite()]
    displacement, own = over_states(moved), over_states(spread)
    figures: dict[str, Any] = {
        "alpha": float(rule.strength),  # type: ignore[arg-type]
        "strength": strength.quantile(strength.new_tensor(ends)).tolist() if len(strength) else None,
        "displacement": displacement.quantile(displacement.new_tensor(ends)).tolist(),
        "spread": float(own.median()),
        "fallbacks": trace.fallbacks,
    }
    ratio = figures["displacement"][1] / max(figures["spread"], 1e-9)
    verdict: Verdict = "fail" if trace.fallbacks else "warn" if ratio > TRUST else "pass"
    said = (
        "none" if figures["strength"] is None else " to ".join(f"{s:.2g}" for s in figures["strength"][::2])
    )
    return Check(
        "strength",
        "How hard is the push, and how far does it take the action?",
        verdict,
        f"at alpha {figures['alpha']:g} strength {said}; displacement {figures['displacement'][0]:.2g} to "
        f"{figures['displacement'][2]:.2g} an entry, {ratio:.1f} of the spread of the policy's own actions; "
        f"{trace.fallbacks} fallbacks",
        f"Fails where rows fell back, warns where the median displacement is above {TRUST:g} standard "
        "deviations of the policy's own actions.",
        figures,
    )

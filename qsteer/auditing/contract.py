"""Is the critic made for this policy, and does the policy's time run as qsteer believes?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qsteer.adapters import contract_of
from qsteer.auditing.page import Check, Verdict
from qsteer.auditing.probes import Probe
from qsteer.contract import differences
from qsteer.flow import denoise, interpolate
from qsteer.hosts import parameters_of
from qsteer.policies import FlowPolicy
from qsteer.steering.checks import read_contract

FOLLOWS, OVERSHOOTS, SLOPES = 0.5, 1.3, (1 / 1.4, 1.4)
BEYOND = 0.02, 0.15


def check_contract(policy: Any, critic: Any, own_inputs: bool = False) -> Check:
    """Compare what the critic was trained for with what the policy is.

    Args:
        policy: a host, or a FlowPolicy.
        critic: whose configuration may hold a :class:`~qsteer.contract.Contract`.
        own_inputs: the critic's observations do not come from the policy's batch, and are not compared.
    """
    its = read_contract(critic)
    mine = policy.contract if isinstance(policy, FlowPolicy) else contract_of(policy)
    if own_inputs:
        mine = replace(mine, observations=None, observation_normalisation=None)
        mine = replace(mine, observation_mean=None, observation_std=None)
    found = None if its is None else differences(its, mine)
    verdict: Verdict = "not known" if found is None else "fail" if found else "pass"
    finding = {
        "not known": "the critic carries no record of what it was trained on",
        "pass": "the critic was trained for this policy's observations, actions and normalisation",
        "fail": f"the critic was trained for something else: {'. '.join(found or ())}",
    }[verdict]
    return Check(
        "contract",
        "Was the critic trained for this policy's inputs?",
        verdict,
        finding,
        "Fails at any difference: critics that differ in normalisation alone disagree on the direction of a "
        "push while their values look right.",
        {"differences": found},
    )


def check_clock(probes: Sequence[Probe]) -> Check:
    """See whether the velocity is that of a straight path from noise to what its own chain ends in.

    Three facts hold for ``v(x, t) = E[x1 - x0 | x_t = x]`` and not for one whose time or sign is turned
    around. At t = 0, where x is noise, ``D(x, t) = E[x1 | x_t = x]`` does not follow x. Half way it follows x
    by ``2 s^2 / (1 + s^2)``, s the spread of the actions of one state, which is less than that of noise.
    And ``x1 - x0`` regressed on v has the slope 1 at all times.

    Cost: 8 velocity forwards a batch.
    """
    follow = {t: _follow(probes, t) for t in (0.0, 0.5)}
    slopes = {t: _slope(probes, t) for t in (0.0, 0.5, 0.9)}
    wrong = follow[0.0] >= FOLLOWS or follow[0.5] >= OVERSHOOTS
    wrong |= not all(SLOPES[0] <= slope <= SLOPES[1] for slope in slopes.values())
    values = (
        f"D follows x by {follow[0.0]:.2f} at noise and {follow[0.5]:.2f} half way; x1 - x0 on v has slope "
    )
    values += ", ".join(f"{slope:.2f}" for slope in slopes.values())
    return Check(
        "clock",
        "Does time run from noise to action, and the velocity to the action?",
        "fail" if wrong else "pass",
        values + ("; time or sign is turned around, or this is no trained velocity" if wrong else ""),
        f"Fails at {FOLLOWS} at noise (right: 0, turned around: 2), at {OVERSHOOTS} half way (more than 1 "
        f"only if actions spread wider than noise), and where a slope leaves {SLOPES[0]:.1f} to "
        f"{SLOPES[1]:.1f} (right: 1, at t = 0, 0.5 and 0.9).",
        {"follow": list(follow.values()), "slope": list(slopes.values())},
    )


def check_bounds(probes: Sequence[Probe]) -> Check:
    """See whether the policy's own actions lie where the critic is asked."""
    bounds = probes[0].bounds
    samples = torch.cat([probe.seen(probe.samples).flatten() for probe in probes])
    few = samples[:: 1 + len(samples) // 10**6]
    low, high = (float(few.quantile(q)) for q in (0.01, 0.99))
    if bounds is None:
        beyond = 0.0
    else:
        width = bounds[1] - bounds[0]
        edge = 0.01 * width
        beyond = float(((samples < bounds[0] - edge) | (samples > bounds[1] + edge)).double().mean())
    verdict: Verdict = "pass" if beyond <= BEYOND[0] else "warn" if beyond <= BEYOND[1] else "fail"
    return Check(
        "bounds",
        "Do the policy's actions lie within the bounds at which the critic is asked?",
        verdict,
        f"{beyond:.1%} of the policy's entries lie beyond {bounds}; 1 to 99 % of them from {low:.2f} to "
        f"{high:.2f}",
        f"Warns above {BEYOND[0]:.0%}, fails above {BEYOND[1]:.0%}: there the critic judges the clipped "
        "action, not the policy's; a rule's clip is the policy's own range, None if it is normalised by mean "
        "and standard deviation.",
        {"beyond": beyond, "bounds": list(bounds) if bounds else None, "range": [low, high]},
    )


def check_numbers(policy: Any, critic: Any, probes: Sequence[Probe]) -> Check:
    """See whether everything is finite, where both are, and in which precision."""
    where: Callable[[Any], list[str]] = lambda owner: sorted(  # noqa: E731
        {f"{p.dtype}".removeprefix("torch.") + f" on {p.device}" for p in parameters_of(owner)}
    )
    lost = sum(
        int((~torch.isfinite(part)).sum()) for probe in probes for part in (probe.samples, probe.members)
    )
    coarse = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters_of(critic))
    dropout = any(
        isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.training and m.p > 0
        for owner in (policy, critic)
        if isinstance(owner, torch.nn.Module)
        for m in owner.modules()
    )
    notes = ["not finite: actions or values"] * bool(lost) + ["dropout in training mode"] * dropout
    notes += ["the critic computes in half precision"] * coarse
    return Check(
        "numbers",
        "Is everything finite, on one device, in a sufficient precision?",
        "fail" if lost else "warn" if notes else "pass",
        f"policy {', '.join(where(policy)) or 'without parameters'}; critic "
        f"{', '.join(where(critic)) or 'without parameters'}; {lost} numbers not finite"
        + "".join(f"; {note}" for note in notes[bool(lost) :]),
        "Fails where anything is not finite; warns of a critic in half precision, whose differences between "
        "actions are rounded away first, and of dropout, which makes gradients random.",
        {"policy": where(policy), "critic": where(critic), "not_finite": lost, "dropout": dropout},
    )


def _follow(probes: Sequence[Probe], t: float) -> float:
    """Return by how much the denoised action follows x, over pairs of noises of each state."""
    moved, distance = 0.0, 0.0
    for probe in probes:
        here, there = (
            interpolate(noise, probe.samples[0], t) if t else noise
            for noise in (probe.noise[1], probe.noise[2])
        )
        there = here + 0.1 * (there - here)
        d = probe.seen(_denoised(probe, there, t) - _denoised(probe, here, t))
        step = probe.seen(there - here)
        moved, distance = moved + float((d * step).sum()), distance + float(step.square().sum())
    return moved / distance


def _slope(probes: Sequence[Probe], t: float) -> float:
    """Return the slope of ``x1 - x0`` on the velocity at ``x_t``, of the policy's samples and fresh noise."""
    product, square = 0.0, 0.0
    for probe in probes:
        x0, x1 = probe.noise[1], probe.samples[0]
        with torch.no_grad():
            v = probe.seen(probe.field(interpolate(x0, x1, t), t))
        product += float((v * probe.seen(x1 - x0)).sum())
        square += float(v.square().sum())
    return product / square if square else 0.0


def _denoised(probe: Probe, x: Tensor, t: float) -> Tensor:
    with torch.no_grad():
        return denoise(x, probe.field(x, t), t)

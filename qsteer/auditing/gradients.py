"""Do the members' gradients agree?"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.auditing.page import Check, Verdict
from qsteer.auditing.probes import Probe, estimate
from qsteer.flow import ask, ask_members, clip_actions, denoise
from qsteer.types import Value

NONE, LITTLE = 0.2, 0.4
PESSIMISM = 0.5


def check_gradients(probes: Sequence[Probe]) -> Check:
    """Compare gradients in the denoised action along the policy's own chains.

    Cost: per batch one chain, and at each of its steps J + 2 critic backwards (one more with another critic).
    """
    cosines, shares, others = [], [], []
    for probe in probes:
        x = probe.noise[0]
        steps = []
        for t, dt in probe.field.clock.grid():
            with torch.no_grad():
                v = probe.field(x, t)
            if t > 0:
                steps.append(_at(probe, clip_actions(denoise(x, v, t), probe.bounds)))
            x = x + dt * v
        cosine, share, other = (torch.stack(column) for column in zip(*steps, strict=True))
        cosines.append(cosine)
        shares.append(share)
        others.append(other)
    cosine, share, other = (torch.cat(rows, 1) for rows in (cosines, shares, others))
    members = len(probes[0].members)
    found = estimate(cosine.mean(0)) if members > 1 else None
    with_other = estimate(other.mean(0)) if probes[0].other is not None else None
    pessimism = float(share.nanmedian())
    known = [value for value in (found, with_other) if value is not None]
    verdict: Verdict = "not known"
    if known:
        least = min(value[0] for value in known)
        verdict = "fail" if least < NONE else "warn" if least < LITTLE or pessimism > PESSIMISM else "pass"
    finding = "one member, and no other critic: nothing to compare" if not known else ""
    if found is not None:
        tenth = float(cosine.flatten().quantile(0.1)) if cosine.numel() < 10**7 else None
        finding = f"cosine {found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f}) between members"
        finding += "" if tenth is None else f", {tenth:.2f} in the worst tenth"
        finding += f"; the pessimism is {pessimism:.0%} of the mean's gradient"
    if with_other is not None:
        finding += f"{'; ' if found else ''}cosine {with_other[0]:.2f} with the other critic"
    return Check(
        "gradients",
        "Do gradients agree between members, and with another critic?",
        verdict,
        finding,
        f"Fails below a mean cosine of {NONE}, warns below {LITTLE}: what members do not share is their "
        f"initial weights. Warns where the pessimism's gradient is more than {PESSIMISM:.0%} of the mean's: "
        "mostly noise where members are few.",
        {"members": found, "other": with_other, "pessimism": pessimism},
    )


def _at(probe: Probe, a: Float[Tensor, "B H A"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the members' mean cosine, the pessimism's share, and the cosine with the other."""
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        each = torch.stack([_gradient(probe, q, a) for q in ask_members(probe.value, a)])
        whole = _gradient(probe, ask(probe.value, a), a)
        other = torch.full_like(whole, torch.nan) if probe.other is None else _of(probe, probe.other, a)
    mean = each.mean(0)
    share = (whole - mean).norm(dim=-1) / mean.norm(dim=-1)
    return cosines(each), share, torch.cosine_similarity(whole, other, dim=-1)


def cosines(each: Float[Tensor, "J B D"]) -> Float[Tensor, "B"]:
    """Return the mean cosine between the members' gradients; 0 of a single one."""
    j, unit = len(each), each / each.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    return (unit.sum(0).square().sum(-1) - unit.square().sum(-1).sum(0)) / max(j * (j - 1), 1)


def _of(probe: Probe, value: Value, a: Tensor) -> Tensor:
    return _gradient(probe, ask(value, a), a)


def _gradient(probe: Probe, q: Float[Tensor, "B"], a: Float[Tensor, "B H A"]) -> Float[Tensor, "B D"]:
    """Return the gradient on the entries which the critic sees; 0 of a value without one."""
    found = None
    if q.requires_grad:
        found = torch.autograd.grad(q.sum(), a, retain_graph=True, allow_unused=True)[0]
    return probe.seen(torch.zeros_like(a) if found is None else found)

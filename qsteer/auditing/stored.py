"""What can be asked of a critic with nothing but the rows that it learns from: no policy, no rollout."""

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.auditing.gradients import NONE, cosines
from qsteer.auditing.page import Check, Verdict
from qsteer.auditing.probes import estimate
from qsteer.auditing.ranking import AGAINST, _beats, correlate
from qsteer.flow import ask, ask_members
from qsteer.types import Bindable, Observation, Value


def check_stored(
    critic: Bindable,
    observations: Observation,
    actions: Float[Tensor, "B H A"],
    returns: Float[Tensor, "B"],
    *,
    seed: int = 0,
) -> Check:
    """Ask whether a critic agrees with what it was told: a part of ``rank`` and of ``gradients``.

    Fails where its values fall with the returns that followed (95 % interval below -0.25), where its members'
    gradients at the actions do not agree (mean cosine below 0.2), or where anything is not finite. Warns
    where it prefers noise, or the actions of other states, to those that were taken (interval below 0.5): a
    critic that has seen one policy's rows alone may, and unlearns it once it acts. Noise is uniform within
    what the actions span.

    Args:
        critic: on the device of what follows.
        observations: as the critic sees them.
        actions: that were taken.
        returns: that followed.
        seed: of noise, and of the intervals.

    Cost: 3 critic forwards and J backwards on B rows.
    """
    generator = torch.Generator().manual_seed(seed)
    value = critic.bind(observations)
    low, high = actions.amin(0), actions.amax(0)
    uniform = torch.rand(actions.shape, generator=generator).to(actions)
    with torch.no_grad():
        q, noise, others = (
            ask(value, a).double().cpu() for a in (actions, low + (high - low) * uniform, actions.roll(1, 0))
        )
    figures: dict[str, list[float]] = {
        "noise": estimate(_beats(q, noise)),
        "other_states": estimate(_beats(q, others)),
        "returns": list(correlate(q, returns.double().cpu(), generator)),
    }
    unsure = [name for name in ("noise", "other_states") if figures[name][2] < 0.5]
    failed = ["returns"] * (figures["returns"][2] < AGAINST)
    if len(gradients := _gradients(value, actions)) > 1:
        figures["gradients"] = estimate(cosines(gradients))
        failed += ["gradients"] * (not figures["gradients"][0] >= NONE)
    failed += ["numbers"] * (not bool(torch.cat([q, noise, others]).isfinite().all()))
    said = "; ".join(f"{name.replace('_', ' ')} {found[0]:.2f}" for name, found in figures.items())
    verdict: Verdict = "fail" if failed else "warn" if unsure else "pass"
    return Check(
        "stored",
        "Does the critic agree with the rows that it learns from?",
        verdict,
        said + (f"; fails: {', '.join(failed)}" if failed else ""),
        f"Fails where values fall with returns (interval below {AGAINST}), where members' gradients have a "
        f"mean cosine below {NONE}, and where anything is not finite. Warns where noise or the actions of "
        "other states are preferred to those that were taken.",
        figures,
    )


def _gradients(value: Value, actions: Float[Tensor, "B H A"]) -> Float[Tensor, "J B D"]:
    with torch.enable_grad():
        a = actions.detach().requires_grad_()
        each = [torch.autograd.grad(q.sum(), a, retain_graph=True)[0] for q in ask_members(value, a)]
    return torch.stack(each).flatten(2).double().cpu()

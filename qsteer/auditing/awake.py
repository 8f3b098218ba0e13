"""Does the critic tell the policy's own actions apart?"""

from collections.abc import Sequence

from qsteer.auditing.page import Check, Verdict
from qsteer.auditing.probes import Probe, over_states

BLIND, DROWSY = 0.02, 0.05
DROWNED, UNSURE = 1.5, 2.5


def check_awake(probes: Sequence[Probe]) -> Check:
    """Compare what actions change of the value with what states change, and with what members disagree on.

    With S actions a_i of each state n and members Q_j: the *spread over actions* is the standard deviation
    over i of Q(s_n, a_i), root mean square over n; the *spread over states* that of the mean over i. The
    *disagreement* is the standard deviation over j of what is left of Q_j after each member's own mean over
    the state's actions: offsets between members steer nobody.
    """
    q, members = over_states(p.q for p in probes), over_states(p.members for p in probes)
    actions = float(q.var(0).mean().sqrt())
    states = float(q.mean(0).std())
    relative = members - members.mean(1, keepdim=True)
    known = len(members) > 1
    disagreement = float(relative.var(0).mean().sqrt()) if known else None
    common = float(relative.mean(0).var(0).mean().sqrt())
    share = actions / states if states else float("inf") if actions else 0.0
    clarity = None if disagreement is None else common / disagreement if disagreement else float("inf")
    finding = f"its values spread by {actions:.3g} over the policy's actions, {share:.1%} of {states:.3g} "
    finding += "over states"
    if clarity is not None:
        finding += f"; by {clarity:.1f} of what its members disagree by"
    blind = actions == 0 or share < BLIND or (clarity is not None and clarity < DROWNED)
    drowsy = share < DROWSY or (clarity is not None and clarity < UNSURE)
    verdict: Verdict = "fail" if blind else "warn" if drowsy else "pass"
    return Check(
        "awake",
        "Does the critic tell the policy's own actions apart?",
        verdict,
        finding,
        f"Fails where actions make less than {BLIND:.0%} of what states make (warns below {DROWSY:.0%}), or "
        f"less than {DROWNED} of the members' disagreement on them (warns below {UNSURE}): a critic of "
        "data in which all succeed knows states alone.",
        {
            "over_actions": actions,
            "over_states": states,
            "disagreement": disagreement,
            "share": share if share < float("inf") else None,
            "clarity": clarity if clarity is None or clarity < float("inf") else None,
        },
    )

"""Does the critic rank actions as it should?"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.auditing.page import Check, Verdict
from qsteer.auditing.probes import Estimate, Probe, draw_noise, estimate, open_batch, over_states
from qsteer.data import Chunks, Episodes
from qsteer.flow import ask, clip_actions
from qsteer.sampling import sample
from qsteer.types import Bindable, Bounds, Field, Value

ROWS, OBSERVED_ROWS, ACTIONS = 512, 128, 4
BLIND, DIM = 0.25, 0.4
AGAINST = -0.25


def check_rank(probes: Sequence[Probe], data: Mapping[str, Any] | None) -> Check:
    """Compare the policy's actions with those of other states and with noise; with data, values with returns.

    A preference is the share of pairs in which the critic prefers the former, mean over states: 0.5 is
    chance. *Foresight* is the rank correlation of two advantages of the data's actions over the policy's:
    what the critic says of the action, ``Q(s, a) - V(s)``, and what came of it,
    ``R + gamma^H V(s') - V(s)``, each with draws of its own of V, the mean value of the policy's actions.

    Args:
        probes: what the policy does.
        data: what :func:`rank_data` found; None: there is no data.
    """
    figures: dict[str, Any] = {
        "other_states": estimate(over_states(_others(probes))),
        "noise": estimate(over_states(_noise(probe) for probe in probes)),
        **(data or {}),
    }
    asked = ("noise", "other_states", "data_over_noise", "data_over_other_states")
    worse: dict[str, Any] = {name: figures[name] for name in asked if name in figures}
    failed = [name for name, value in worse.items() if value[2] < 0.5]
    unsure = [name for name, value in worse.items() if value[1] < 0.5 and name not in failed]
    returns = figures.get("returns")
    if returns is not None:
        failed += ["returns"] * (returns[2] < AGAINST)
        unsure += ["returns"] * (returns[1] <= 0 and returns[2] >= AGAINST)
    if (foresight := figures.get("foresight")) is not None:
        failed += ["foresight"] * (foresight[0] < BLIND)
        unsure += ["foresight"] * (BLIND <= foresight[0] < DIM)
    verdict: Verdict = "fail" if failed else "warn" if unsure else "pass"
    said = "; ".join(f"{name.replace('_', ' ')} {_say(value)}" for name, value in figures.items())
    return Check(
        "rank",
        "Does the critic prefer the policy's actions to others?",
        verdict,
        said,
        "Fails where the critic prefers noise or the actions of other states (95 % interval below 0.5): its "
        "gradient then leads away from what was ever tried. With data, fails where values fall with returns "
        f"(interval below {AGAINST}; those of play are another behaviour's, and warn), and where foresight "
        f"(what it prefers against what came of it) is below {BLIND}, warns below {DIM}: "
        "it judges actions apart from states. Warns where an interval holds chance.",
        figures,
    )


def rank_data(
    policy: Any,
    critic: Bindable,
    data: Episodes,
    batch: Any,
    critic_inputs: Callable[[Any], Any] | None,
    bounds: Bounds,
    gamma: float,
    generator: torch.Generator,
    horizon: int,
    observe: Callable[[Tensor], Any] | None = None,
) -> dict[str, Any]:
    """Compare the data's actions with others, and values with the discounted returns that followed.

    Args:
        policy: whose actions the data's are compared with.
        critic: that is audited; it must take states.
        data: held out from its training, better.
        batch: one of the policy's; says what form the policy takes a state in.
        critic_inputs: as for ``steer``.
        bounds: of actions.
        gamma: discount per step.
        generator: of rows and noise.
        horizon: actions per chunk that the critic sees.
        observe: makes of the data's observations what the policy takes; None: they are its states.

    Cost: 13 chains of the policy and 16 critic forwards on 512 rows; with ``observe`` on 128.
    """
    chunks = Chunks(data, horizon, gamma, "returns")
    size = ROWS if observe is None else OBSERVED_ROWS
    rows = chunks.starts[torch.randint(len(chunks), (size,), generator=generator).to(chunks.starts.device)]
    drawn = chunks.gather(rows)
    read = observe or partial(_in_form, batch=batch)
    obs = read(drawn.observations)
    if obs is None:
        return {}
    field, value, like = open_batch(policy, critic, obs, critic_inputs)

    def judge(a: Float[Tensor, "B H A"]) -> Tensor:
        with torch.no_grad():
            return ask(value, clip_actions(a, bounds)).double().cpu()

    stored = torch.zeros_like(like)
    stored[:, :horizon, : drawn.actions.shape[2]] = drawn.actions.to(like)
    q = judge(stored)
    noise = draw_noise(like, 1, generator)[0]
    returns = drawn.returns
    assert returns is not None  # asked for above
    returns = returns.double().cpu()
    pairs = {
        "data_over_policy": judge(sample(field, None, noise)),
        "data_over_other_states": judge(stored.roll(1, 0)),
        "data_over_noise": judge(noise),
    }
    found: dict[str, Any] = {name: estimate(_beats(q, other)) for name, other in pairs.items()}
    found["returns"] = correlate(q, returns, generator)
    here, again = (_worth(field, value, like, bounds, generator) for _ in range(2))
    later = open_batch(policy, critic, read(drawn.next_observations), critic_inputs)
    came = drawn.rewards.double().cpu() + drawn.discount * drawn.masks.double().cpu() * _worth(
        later[0], later[1], like, bounds, generator
    )
    found["foresight"] = correlate(q - here, came - again, generator)
    return found


@torch.no_grad()
def _worth(
    field: Field, value: Value, like: Float[Tensor, "B H A"], bounds: Bounds, generator: torch.Generator
) -> Float[Tensor, "B"]:
    """Return V(s), the mean value of a few of the policy's own actions."""
    actions = (clip_actions(sample(field, None, x), bounds) for x in draw_noise(like, ACTIONS, generator))
    return torch.stack([ask(value, a) for a in actions]).mean(0).double().cpu()


def _others(probes: Sequence[Probe]) -> list[Float[Tensor, "_"]]:
    """Return, per batch, the share of pairs in which a state's own samples beat those of other states."""
    pool = torch.cat([probe.samples for probe in probes], 1)
    samples, n = pool.shape[:2]
    shifts = [1 + k * max(1, (n - 1) // samples) % (n - 1) for k in range(samples)]
    found, start = [], 0
    for probe in probes:
        rows = torch.arange(start, start + probe.samples.shape[1])
        theirs = [probe.ask(pool[s, (rows + shift) % n]) for s, shift in enumerate(shifts)]
        found.append(_share(probe.q, torch.stack(theirs)))
        start += len(rows)
    return found


def _noise(probe: Probe) -> Float[Tensor, "B"]:
    return _share(probe.q, torch.stack([probe.ask(x) for x in probe.noise]))


def _share(better: Float[Tensor, "S B"], worse: Float[Tensor, "S B"]) -> Float[Tensor, "B"]:
    return _beats(better[:, None], worse[None]).mean((0, 1))


def _beats(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 where a is larger, 0.5 where they are equal."""
    return (a > b).double() + 0.5 * (a == b).double()


def correlate(q: Float[Tensor, "N"], returns: Float[Tensor, "N"], generator: torch.Generator) -> Estimate:
    """Return Spearman's rank correlation and its bootstrap interval over rows."""

    def spearman(rows: Tensor) -> float:
        a, b = (_rank(x[rows]) for x in (q, returns))
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num())

    everything = torch.arange(len(q))
    drawn = [spearman(torch.randint(len(q), (len(q),), generator=generator)) for _ in range(500)]
    low, high = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    return (spearman(everything), low, high)


def _rank(x: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Return ranks, the mean rank for equal values."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _in_form(states: Tensor, batch: Any) -> Any:
    """Return states as the policy takes them; None: it takes more than a state."""
    if isinstance(batch, Tensor):
        return states.to(batch) if batch.shape[1:] == states.shape[1:] else None
    if isinstance(batch, Mapping) and len(batch) == 1:
        ((key, column),) = batch.items()
        return {key: states.to(column)} if column.shape[1:] == states.shape[1:] else None
    return None


def _say(value: Sequence[float]) -> str:
    return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"

"""``qsteer.audit``: six questions to a critic before it steers."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsteer.auditing.awake import check_awake
from qsteer.auditing.contract import check_bounds, check_clock, check_contract, check_numbers
from qsteer.auditing.gradients import check_gradients
from qsteer.auditing.page import Audit, Check
from qsteer.auditing.probes import Probe, draw_noise, open_batch, read_batches
from qsteer.auditing.push import ALPHAS, check_push, check_strength, recommend, sweep, with_strength
from qsteer.auditing.ranking import check_rank, rank_data
from qsteer.data import Episodes
from qsteer.files import check_npz
from qsteer.rules import Guidance, Tweedie
from qsteer.sampling import acting, outside_inference_mode
from qsteer.types import Bindable

LEAST_STATES, LEAST_SAMPLES = 8, 4


def audit(
    policy: Any,
    critic: Bindable,
    batches: Iterable[Any],
    data: Episodes | str | Path | None = None,
    *,
    other: Bindable | None = None,
    rule: Guidance = Tweedie(),  # noqa: B008 (frozen)
    alphas: Sequence[float] = ALPHAS,
    samples: int = 16,
    gamma: float = 0.99,
    critic_inputs: Callable[[Any], Any] | None = None,
    observe: Callable[[Tensor], Any] | None = None,
    seed: int = 0,
) -> Audit:
    """Ask whether a critic can be trusted to steer a policy, without a rollout.

    Whether steering helps is known after rollouts only. An audit finds what would make them a waste: a critic
    of other inputs, a clock that runs backwards, a critic that is blind to actions, prefers noise, or whose
    gradient no judge but itself agrees with. It proposes a range of strengths to begin with. How often its
    verdicts were right is in the documentation.

    Policy and critic are left as they are, and so is torch's random state.

    Cost: with S ``samples`` and K ``alphas``, for each batch the policy's prefix once, and S + 6 K + 3 chains
    of the policy on its rows, of which 4 K + 1 are guided. What the policy has encoded of all batches is held
    in memory.

    Args:
        policy: as for :func:`qsteer.steer`, or a :class:`~qsteer.policies.FlowPolicy`.
        critic: as for :func:`qsteer.steer`. Questions that need members are answered "not known" for one.
        batches: several of what the policy's ``predict_action_chunk`` takes, of states it will meet; at least
            8 states in all. 64 and more give useful intervals.
        data: transitions of states with their rewards, better not those the critic was trained on:
            :class:`~qsteer.data.Episodes`, or an OGBench single-task file. None: values are not compared with
            returns.
        other: a critic of another seed, which then judges pushes in the place of held-out members.
        rule: the guidance that is to steer, in its matched norm; its strength is varied.
        alphas: the strengths, increasing.
        samples: actions of the policy per state.
        gamma: discount per step, for the data's returns.
        critic_inputs: as for :func:`qsteer.steer`.
        observe: makes of observations of ``data`` (B, O) what the policy takes, for one that takes more than
            a state; see :meth:`qsteer.data.lerobot.Seen.episodes`.
        seed: of all noise; torch's global generator is not used.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: there are too few states or samples, or a rule of another scaling; and as
            :func:`qsteer.open_action`.

    Example:
        >>> from qsteer.adapters import PlainPolicy
        >>> policy = PlainPolicy(lambda x, t, obs: obs[:, None, None] - x, horizon=2, action_dim=2)
        >>> critic = Critic(CriticConfig(obs_dim=1, action_dim=2, horizon=2))  # doctest: +SKIP
        >>> print(audit(policy, critic, [torch.randn(64, 1)]))  # doctest: +SKIP
    """
    started = time.perf_counter()
    _check(rule, alphas, samples)
    episodes = _read(data)
    generator = torch.Generator().manual_seed(seed)
    devices = range(torch.cuda.device_count())
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(outside_inference_mode())
        for one in (critic, other):
            stack.enter_context(acting(one)) if one is not None else None
        torch.manual_seed(seed)
        found = read_batches(batches)
        contract = check_contract(policy, critic, critic_inputs is not None)
        if contract.verdict == "fail":  # which steer refuses
            took = time.perf_counter() - started
            return Audit((contract,), None, _own(rule, alphas), type(rule).__name__, 0, samples, seed, took)
        probes = []
        for batch in found:
            field, value, like = open_batch(policy, critic, batch, critic_inputs)
            second = None if other is None else open_batch(policy, other, batch, critic_inputs)[1]
            probes.append(
                Probe.of(field, value, second, rule.bounds(field), draw_noise(like, samples, generator))
            )
        states = sum(probe.noise.shape[1] for probe in probes)
        if states < LEAST_STATES:
            raise ValueError(
                f"batches: expected at least {LEAST_STATES} states in all, got {states}; intervals are over "
                "states"
            )
        checks, advice = _ask_all(
            contract,
            policy,
            critic,
            found[0],
            probes,
            episodes,
            rule,
            alphas,
            gamma,
            critic_inputs,
            observe,
            generator,
            seed,
        )
    failed = any(check.verdict == "fail" for check in checks)
    return Audit(
        checks,
        None if advice is None or failed else advice[0],
        _own(rule, alphas) if advice is None else advice[1],
        type(rule).__name__,
        states,
        samples,
        seed,
        time.perf_counter() - started,
    )


def _ask_all(
    contract: Check,
    policy: Any,
    critic: Bindable,
    batch: Any,
    probes: Sequence[Probe],
    data: Episodes | None,
    rule: Guidance,
    alphas: Sequence[float],
    gamma: float,
    critic_inputs: Callable[[Any], Any] | None,
    observe: Callable[[Tensor], Any] | None,
    generator: torch.Generator,
    seed: int,
) -> tuple[tuple[Check, ...], tuple[tuple[float, float], float] | None]:
    """Return the checks, and what strengths are recommended; with numbers not finite, no more is asked."""
    numbers = check_numbers(policy, critic, probes)
    if numbers.verdict == "fail":
        return (contract, numbers), None
    ranked = None
    if data is not None:
        horizon = getattr(getattr(critic, "config", None), "horizon", None) or probes[0].noise.shape[2]
        bounds = probes[0].bounds
        ranked = rank_data(
            policy, critic, data, batch, critic_inputs, bounds, gamma, generator, horizon, observe
        )
    swept = sweep(probes, rule, alphas, seed)
    advice = None if swept is None else recommend(swept)
    checks = (
        contract,
        numbers,
        check_clock(probes),
        check_bounds(probes),
        check_awake(probes),
        check_rank(probes, ranked),
        check_gradients(probes),
        check_push(swept),
        check_strength(probes, with_strength(rule, advice[1] if advice else _own(rule, alphas))),
    )
    return checks, advice


def _own(rule: Guidance, alphas: Sequence[float]) -> float:
    """Return the rule's own strength, where it is a number, within those that are tried."""
    own = float(rule.strength) if isinstance(rule.strength, float | int) else 0.2
    return min(max(own, min(alphas)), max(alphas))


def _check(rule: Any, alphas: Sequence[float], samples: int) -> None:
    if not isinstance(rule, Guidance):
        raise TypeError(f"rule: expected guidance such as qsteer.Tweedie(), got {rule!r}")
    if rule.scaling != "match_norm":
        raise ValueError(
            f"rule: expected scaling 'match_norm', got {rule.scaling!r}; the strengths of an audit are "
            "relative to the velocity: QGF(scaling='match_norm')"
        )
    if not len(alphas) or not all(a < b for a, b in zip((0.0, *alphas), alphas, strict=False)):
        raise ValueError(f"alphas: expected increasing strengths above 0, got {alphas}")
    if samples < LEAST_SAMPLES:
        raise ValueError(f"samples: expected at least {LEAST_SAMPLES}, got {samples}; spreads need several")


def _read(data: Episodes | str | Path | None) -> Episodes | None:
    if data is None or isinstance(data, Episodes):
        return data
    if not isinstance(data, str | Path):
        raise TypeError(f"data: expected Episodes or the path of an .npz, got {type(data).__name__}")
    check_npz(Path(data), ("observations", "next_observations", "actions", "rewards", "masks", "terminals"))
    with np.load(data) as columns:
        return Episodes.from_ogbench(columns)

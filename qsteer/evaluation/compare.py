"""Compare arms: one frozen policy, one critic, the same episodes and the same noise for every arm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsteer.bench.counting import count
from qsteer.bench.timing import time_calls
from qsteer.compiling.kept import Mode
from qsteer.critics.critic import Critic
from qsteer.envs.cluster import Cluster
from qsteer.envs.rollouts import Agent, MakeEnv, Rollouts, Simulators
from qsteer.envs.seeds import EVALUATION_SEED
from qsteer.evaluation.arms import Arm
from qsteer.policies import FlowPolicy
from qsteer.statistics import paired_interval, wilson_interval
from qsteer.trace import Trace
from qsteer.types import Field, Value

ROUNDS = 50
"""Timed actions of each arm, for the milliseconds of a table."""


def compare(
    make_env: MakeEnv,
    policy: FlowPolicy,
    critic: Critic,
    arms: Sequence[Arm],
    *,
    episodes: int,
    seed: int = EVALUATION_SEED,
    num_envs: int = 8,
    record: bool = False,
    traces: Mapping[str, Trace] | None = None,
    compile: Mode | None = None,
    cluster: Cluster | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Rollouts]]:
    """Roll every arm out and report success, difference from the first arm, and cost per action.

    Args:
        make_env: see :class:`qsteer.envs.rollouts.Simulators`.
        policy: the frozen policy.
        critic: the critic that steers it.
        arms: the arms; the first is what the others are compared with.
        episodes: per arm; every arm meets the same ones.
        seed: of the episodes and their noise.
        num_envs: environments at once.
        record: keep the executed actions in the rollouts, for videos.
        traces: what records the guided steps of an arm, by its spec; the others record displacements only.
        compile: how actions of all environments at once are made fast, see :func:`qsteer.sample`; the last
            ones, of fewer, run eagerly. Milliseconds and their ratios are of eager actions.
        cluster: of Ray, on whose nodes the environments run; None: on this machine.
        progress: show progress bars.

    Returns:
        A JSON-able report and the rollouts. The report holds ``seed`` and ``arms``, and of each arm ``name``,
        ``spec``, ``kind``, ``success``, ``low``, ``high``, ``episodes``, ``displacement`` (of its actions
        from their unsteered twins, per entry: median, 10 and 90 %) and more (rates in [0, 1] with 95 %
        Wilson intervals; ``difference`` with Tango's paired interval; evaluations and milliseconds per
        action of one observation).

    Raises:
        ValueError: the critic is of other sizes than the policy, or was trained for another contract.
    """
    policy.check_critic(critic.config)
    return compare_driven(
        make_env,
        _drive(policy, critic),
        arms,
        episodes=episodes,
        seed=seed,
        num_envs=num_envs,
        record=record,
        traces=traces,
        compile=compile,
        cluster=cluster,
        progress=progress,
    )


@dataclass(frozen=True)
class Driver:
    """How arms act with one policy and one critic.

    Attributes:
        horizon: executed steps of a chunk.
        noise_shape: of one chunk; None: that of the executed actions.
        agent: ``(arm, trace, compile, rows) -> act``, see :meth:`qsteer.evaluation.arms.Arm.agent`.
        open: returns velocity, value and noise for an observation.
        observation: one, of a single row, on which costs are counted and actions are timed.
        rounds: timed actions of each arm.
    """

    horizon: int
    noise_shape: tuple[int, ...] | None
    agent: Callable[[Arm, Trace | None, Mode | None, int], Agent]
    open: Callable[[Any], tuple[Field, Value | None, Tensor]]
    observation: Any
    rounds: int


def _drive(policy: FlowPolicy, critic: Critic) -> Driver:
    shape = policy.config.horizon, policy.config.action_dim
    return Driver(
        policy.config.horizon,
        None,
        lambda arm, trace, mode, rows: arm.agent(policy, critic, trace, compile=mode, rows=rows),
        lambda obs: (policy.field(obs), critic.bind(obs), torch.randn(1, *shape)),
        torch.zeros(1, policy.config.obs_dim),
        ROUNDS,
    )


def compare_driven(
    make_env: MakeEnv,
    driver: Driver,
    arms: Sequence[Arm],
    *,
    episodes: int,
    seed: int = EVALUATION_SEED,
    num_envs: int = 8,
    record: bool = False,
    traces: Mapping[str, Trace] | None = None,
    compile: Mode | None = None,
    cluster: Cluster | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Rollouts]]:
    """Do what :func:`compare` does for any policy that a :class:`Driver` acts with."""
    kept = {arm.spec: Trace(steps=False, displacement=True) for arm in arms} | dict(traces or {})
    num_envs = min(num_envs, episodes)
    with Simulators(make_env, horizon=driver.horizon, num_envs=num_envs, cluster=cluster) as simulators:
        runs = [
            simulators.rollout(
                driver.agent(arm, kept[arm.spec], compile, num_envs),
                noise_shape=driver.noise_shape,
                episodes=episodes,
                seed=seed,
                name=arm.spec,
                record=record,
                progress=progress,
            )
            for arm in arms
        ]
    moved = [kept[arm.spec].arrays()["displacement"] for arm in arms]
    return {"seed": seed, "arms": _report_arms(driver, arms, runs, moved)}, runs


def _report_arms(
    driver: Driver, arms: Sequence[Arm], runs: Sequence[Rollouts], displacements: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    obs = driver.observation
    field, value, noise = driver.open(obs)
    calls = {arm.spec: partial(driver.agent(arm, None, None, 1), obs, noise.cpu()) for arm in arms}
    times = time_calls(calls, repeats=driver.rounds)
    rows = []
    for arm, run, moved in zip(arms, runs, displacements, strict=True):
        low, high = wilson_interval(int(run.success.sum()), len(run.success))
        difference = paired_interval(run.success, runs[0].success)
        cost = count(field, value, noise, arm.rule, arm.sampler)
        rows.append(
            {
                "name": arm.name,
                "spec": arm.spec,
                "kind": arm.kind,
                "success": float(run.success.mean()),
                "low": low,
                "high": high,
                "episodes": len(run.success),
                "difference": list(difference),
                "displacement": np.quantile(moved, [0.5, 0.1, 0.9]).tolist(),
                "ms_per_action": times[arm.spec].p50,
                "time_ratio": times[arm.spec].ratio(times[arms[0].spec]),
                "policy_passes": asdict(cost.field),
                "critic_passes": asdict(cost.value),
                "map_passes": asdict(cost.map),
                "successes": "".join("01"[int(s)] for s in run.success),
            }
        )
    return rows


def format_comparison(report: Mapping[str, Any]) -> str:
    """Return the report as text: one line per arm."""
    base = report["arms"][0]
    lines = [
        f"{'':<28}{'':>9}{'95 %':>14}{'against ' + base['name']:>25}{'':>10}{'':>18}"
        "   policy passes   critic passes   map passes",
        f"{'arm':<28}{'success':>9}{'interval':>14}{'gain':>9}{'interval':>16}{'moved by':>10}"
        f"{'ms/action':>11}{'ratio':>7}   fwd  bwd  rows   fwd  bwd   fwd  bwd rows",
    ]
    for arm in report["arms"]:
        gain, low, high = arm["difference"]
        against = f"{gain:>+9.0%}{f'{low:+.0%} .. {high:+.0%}':>16}" if arm is not base else " " * 25
        policy, critic, learnt = (arm[f"{network}_passes"] for network in ("policy", "critic", "map"))
        lines.append(
            f"{arm['spec']:<28}{arm['success']:>9.0%}{f'{arm["low"]:.0%} .. {arm["high"]:.0%}':>14}{against}"
            f"{arm['displacement'][0]:>10.3f}{arm['ms_per_action']:>11.1f}{arm['time_ratio']:>7.2f}"
            f"{policy['forwards']:>6}{policy['backwards']:>5}{policy['forward_rows']:>6}"
            f"{critic['forwards']:>6}{critic['backwards']:>5}"
            f"{learnt['forwards']:>6}{learnt['backwards']:>5}{learnt['forward_rows']:>5}"
        )
    return "\n".join(lines)

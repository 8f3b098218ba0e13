"""What each rule and sampler costs per action: evaluations counted, CPU time as a ratio to no steering.

    python examples/cost_of_rules.py --out benchmarks/cost.json     # a few minutes on two cores

Two policies: the demonstration's small MLP, and a random pi0.5 of 76 million parameters, lerobot's own code.
All arms of a policy are timed in turns, one of each a round, and compared within the round, so that a busy
machine slows all of them alike. The critics are of the demonstration's size.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import tiny_hosts
import torch

import qsteer
from qsteer.evaluation.cost import Cost, count, latencies
from qsteer.training import FlowPolicy, FlowPolicyConfig

ARMS = {
    "unsteered": (None, qsteer.Euler()),
    "Tweedie": (qsteer.Tweedie(), qsteer.Euler()),
    "QGF": (qsteer.QGF(), qsteer.Euler()),
    "NoisyGradient": (qsteer.NoisyGradient(), qsteer.Euler()),
    "ThroughTime": (qsteer.ThroughTime(), qsteer.Euler()),
    "RandomDirection": (qsteer.RandomDirection(), qsteer.Euler()),
    "Negated(Tweedie)": (qsteer.Negated(qsteer.Tweedie()), qsteer.Euler()),
    "BestOfN(8)": (None, qsteer.BestOfN(8)),
    "RandomOfN(8)": (None, qsteer.RandomOfN(8)),
    "TrustRegion": (None, qsteer.TrustRegion()),
    "KeepBest, Tweedie": (qsteer.Tweedie(), qsteer.KeepBest()),
    "BestOfN(8), Tweedie": (qsteer.Tweedie(), qsteer.BestOfN(8)),
}


def small_policy() -> tuple[dict[str, Cost], dict[str, Callable[[], object]]]:
    """Return counts and calls on the small policy."""
    policy = FlowPolicy(FlowPolicyConfig(obs_dim=28, action_dim=5, horizon=5)).requires_grad_(False)
    critic = qsteer.Critic(qsteer.CriticConfig(obs_dim=28, action_dim=5, horizon=5)).requires_grad_(False)
    obs, noise = torch.randn(1, 28), torch.randn(1, 5, 5)

    def act(rule: qsteer.Rule | None, sampler: qsteer.Sampler) -> None:
        qsteer.sample(policy.field(obs), critic.bind(obs), noise, rule=rule, sampler=sampler)

    field, value = policy.field(obs), critic.bind(obs)
    counts = {name: count(field, value, noise, rule, sampler) for name, (rule, sampler) in ARMS.items()}
    return counts, {name: partial(act, *arm) for name, arm in ARMS.items()}


def large_policy() -> tuple[int, dict[str, Callable[[], object]]]:
    """Return the number of parameters of a random pi0.5, and calls on it."""
    policy = tiny_hosts.pi05(width=512, depth=8)
    size = qsteer.CriticConfig(obs_dim=4, action_dim=3, horizon=policy.config.n_action_steps)
    batch = tiny_hosts.batch(policy)

    def act(rule: qsteer.Rule | None, sampler: qsteer.Sampler) -> None:
        with qsteer.steer(policy, critic, rule, sampler=sampler):
            policy.predict_action_chunk(batch)

    critic = qsteer.Critic(size)
    calls: dict[str, Callable[[], object]] = {name: partial(act, *arm) for name, arm in ARMS.items()}
    calls["unsteered"] = partial(policy.predict_action_chunk, batch)
    return sum(parameter.numel() for parameter in policy.parameters()), calls


def main() -> None:
    """Count, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    counts, calls = small_policy()
    small = latencies(calls, repeats=20 * args.repeats)
    parameters, calls = large_policy()
    large = latencies(calls, repeats=args.repeats)

    print(f"{'':<22}{'policy':>16}{'critic':>12}{'small policy':>20}{f'pi0.5, {parameters / 1e6:.0f} M':>20}")
    print(f"{'':<22}{'fwd  bwd  rows':>16}{'fwd  bwd':>12}{'ms':>12}{'ratio':>8}{'ms':>12}{'ratio':>8}")
    rows = []
    for name, cost in counts.items():
        times = {
            "small_ms": small[name].median,
            "small_ratio": small[name].ratio(small["unsteered"]),
            "pi05_ms": large[name].median,
            "pi05_ratio": large[name].ratio(large["unsteered"]),
        }
        rows.append({"name": name, "policy": asdict(cost.field), "critic": asdict(cost.value), **times})
        print(
            f"{name:<22}{cost.field.forwards:>6}{cost.field.backwards:>5}{cost.field.forward_rows:>5}"
            f"{cost.value.forwards:>7}{cost.value.backwards:>5}"
            f"{times['small_ms']:>12.1f}{times['small_ratio']:>8.2f}{times['pi05_ms']:>12.0f}{times['pi05_ratio']:>8.2f}"
        )
    if args.out:
        conditions = {"threads": args.threads, "torch": torch.__version__, "pi05_parameters": parameters}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({**conditions, "repeats": args.repeats, "arms": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

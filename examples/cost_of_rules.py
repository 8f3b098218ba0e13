"""What each rule and sampler costs per action: evaluations counted, CPU time as a ratio to no steering.

    python examples/cost_of_rules.py --out benchmarks/cost.json     # a few minutes on two cores

Two policies: the demonstration's small MLP, and a random pi0.5 of 76 million parameters, lerobot's own code.
All arms of a policy are timed in turns, one of each a round, and compared within the round, in CPU time,
which other processes do not stretch. The critics are of the demonstration's size; learnt maps are untrained,
an MLP of the default size on the small policy, a transformer of width 256 and depth 4 on pi0.5.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qsteer
from qsteer.bench import hosts as tiny_hosts
from qsteer.evaluation.cost import Cost, count, latencies
from qsteer.maps import FlowMap, GlassPosterior, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.training import FlowPolicy, FlowPolicyConfig

Arm = tuple[qsteer.Rule | None, qsteer.Sampler]


def arms(meta: MetaFlowMap, flow_map: FlowMap) -> dict[str, Arm]:
    """Return every method, those with learnt maps on these."""
    glass = GlassPosterior(steps=4)
    return {
        "unsteered": (None, qsteer.Euler()),
        "Tweedie": (qsteer.Tweedie(), qsteer.Euler()),
        "Posterior(GLASS), N=4": (qsteer.Posterior(glass, samples=4), qsteer.Euler()),
        "Posterior(GLASS), N=8": (qsteer.Posterior(glass, samples=8), qsteer.Euler()),
        "Posterior(map), N=8": (qsteer.Posterior(meta, samples=8), qsteer.Euler()),
        "GradientFree(GLASS), N=8": (qsteer.GradientFreePosterior(glass, samples=8), qsteer.Euler()),
        "GradientFree(map), N=8": (qsteer.GradientFreePosterior(meta, samples=8), qsteer.Euler()),
        "QGF": (qsteer.QGF(), qsteer.Euler()),
        "NoisyGradient": (qsteer.NoisyGradient(), qsteer.Euler()),
        "ThroughTime": (qsteer.ThroughTime(), qsteer.Euler()),
        "RandomDirection": (qsteer.RandomDirection(), qsteer.Euler()),
        "Negated(Tweedie)": (qsteer.Negated(qsteer.Tweedie()), qsteer.Euler()),
        "BestOfN(8)": (None, qsteer.BestOfN(8)),
        "BestOfN(32)": (None, qsteer.BestOfN(32)),
        "RandomOfN(8)": (None, qsteer.RandomOfN(8)),
        "TrustRegion": (None, qsteer.TrustRegion()),
        "BeamSearch(4, 4, 1)": (None, qsteer.BeamSearch(4, 4, 1)),
        "BeamSearch, flow map": (None, qsteer.BeamSearch(4, 4, 1, flow_map=flow_map)),
        "KeepBest, Tweedie": (qsteer.Tweedie(), qsteer.KeepBest()),
        "BestOfN(8), Tweedie": (qsteer.Tweedie(), qsteer.BestOfN(8)),
    }


def small_policy() -> tuple[dict[str, Cost], dict[str, Callable[[], object]]]:
    """Return counts and calls on the small policy."""
    policy = FlowPolicy(FlowPolicyConfig(obs_dim=28, action_dim=5, horizon=5)).requires_grad_(False)
    critic = qsteer.Critic(qsteer.CriticConfig(obs_dim=28, action_dim=5, horizon=5)).requires_grad_(False)
    obs, noise = torch.randn(1, 28), torch.randn(1, 5, 5)
    methods = arms(*maps(horizon=5, action_dim=5, features=policy.config.hidden[0]))

    def act(rule: qsteer.Rule | None, sampler: qsteer.Sampler) -> None:
        qsteer.sample(policy.field(obs), critic.bind(obs), noise, rule=rule, sampler=sampler)

    field, value = policy.field(obs), critic.bind(obs)
    counts = {name: count(field, value, noise, rule, sampler) for name, (rule, sampler) in methods.items()}
    return counts, {name: partial(act, *arm) for name, arm in methods.items()}


def large_policy() -> tuple[int, int, dict[str, Callable[[], object]]]:
    """Return the number of parameters of a random pi0.5 and of a map for it, and calls on it."""
    policy = tiny_hosts.pi05(width=512, depth=8)
    size = qsteer.CriticConfig(obs_dim=4, action_dim=3, horizon=policy.config.n_action_steps)
    batch = tiny_hosts.batch(policy)
    shape = {"horizon": policy.config.chunk_size, "action_dim": policy.config.max_action_dim}
    tokens = 3 * 512 // 8  # values of three layers, one head each
    meta, flow_map = maps(**shape, features=tokens, network="transformer", width=256, depth=4)

    def act(rule: qsteer.Rule | None, sampler: qsteer.Sampler) -> None:
        with qsteer.steer(policy, critic, rule, sampler=sampler):
            policy.predict_action_chunk(batch)

    critic = qsteer.Critic(size)
    calls: dict[str, Callable[[], object]] = {
        name: partial(act, *arm) for name, arm in arms(meta, flow_map).items()
    }
    calls["unsteered"] = partial(policy.predict_action_chunk, batch)
    return parameters(policy), parameters(meta), calls


def maps(**shape: Any) -> tuple[MetaFlowMap, FlowMap]:
    """Return untrained maps of one shape."""
    return MetaFlowMap(MetaMapConfig(**shape)).requires_grad_(False), FlowMap(
        MapConfig(**shape)
    ).requires_grad_(False)


def parameters(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


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
    small = latencies(calls, repeats=20 * args.repeats, clock=time.process_time)
    of_policy, of_map, calls = large_policy()
    large = latencies(calls, repeats=args.repeats, warmup=1, clock=time.process_time)

    passes = "".join(f"{name:>20}" for name in ("policy", "critic", "map"))
    print(f"{'':<26}{passes}{'small policy':>18}{f'pi0.5, {of_policy / 1e6:.0f} M':>18}")
    print(f"{'':<26}" + 3 * f"{'fwd rows':>12}{'bwd':>8}" + 2 * f"{'ms':>10}{'ratio':>8}")
    rows = []
    for name, cost in counts.items():
        times = {
            "small_ms": small[name].median,
            "small_ratio": small[name].ratio(small["unsteered"]),
            "pi05_ms": large[name].median,
            "pi05_ratio": large[name].ratio(large["unsteered"]),
        }
        of = {"policy": cost.field, "critic": cost.value, "map": cost.map}
        rows.append({"name": name, **{part: asdict(passes) for part, passes in of.items()}, **times})
        print(
            f"{name:<26}"
            + "".join(f"{p.forwards:>6}{p.forward_rows:>6}{p.backwards:>8}" for p in of.values())
            + "".join(f"{times[f'{on}_ms']:>10.1f}{times[f'{on}_ratio']:>8.2f}" for on in ("small", "pi05"))
        )
    if args.out:
        conditions = {
            "threads": args.threads,
            "torch": torch.__version__,
            "pi05_parameters": of_policy,
            "pi05_map_parameters": of_map,
            "repeats": args.repeats,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**conditions, "arms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

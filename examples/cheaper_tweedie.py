r"""How far cheaper gradients are from Tweedie's, and what they cost: cosine and norm at each guided step.

    python examples/cheaper_tweedie.py --out benchmarks/cheaper/agreement.json   # about a minute on two cores

Two policies, each along the chains that Tweedie steers, medians over observations: the demonstration's small
MLP with its critic, in states of cube-single which the frozen policy visits (extra ogbench), and a random
pi0.5 of lerobot's code with a random critic (extra lerobot). Only the first has learnt a distribution of
actions, whose Jacobian would be symmetric; only the second has layers, unless --policy is one of
`qsteer train-policy --residual-layers`. QGF, which puts the identity in the Jacobian's place, is the mark to
beat. What the methods are worth is their success:

    qsteer evaluate --arms base tweedie=0.2 tweedie-every2=0.2 tweedie-from0.5=0.2 forward-tweedie=0.2 \
      forward-tweedie-stale=0.2 qgf-matched=0.2 --policy POLICY --critic CRITIC
"""

import argparse
from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qsteer
from qsteer.bench.counting import count
from qsteer.envs import ogbench
from qsteer.evaluation.gradients import agreement
from qsteer.experiments.tasks import TASKS
from qsteer.files import write_json
from qsteer.policies import FlowPolicy
from qsteer.testing import hosts as random_hosts
from qsteer.types import Field, Value

CHECKPOINTS = Path(__file__).parent / "checkpoints" / "cube-single"
RULES: dict[str, Any] = {
    "Tweedie": qsteer.Tweedie(),
    "Tweedie, every 2nd step": qsteer.Tweedie(every=2),
    "ForwardTweedie": qsteer.ForwardTweedie(),
    "ForwardTweedie, stale": qsteer.ForwardTweedie(stale=True),
    "QGF": qsteer.QGF(),
}


def truncated(depth: int) -> dict[str, Any]:
    """Return Tweedie through the last 1, 2 and 4 of some layers."""
    return {f"Tweedie, last {n} of {depth} layers": qsteer.Tweedie(layers=n) for n in (1, 2, 4) if n < depth}


def compare(field: Field, value: Value, noise: Tensor, rules: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Print and return each rule's gradient beside Tweedie's, and the policy's passes for one action."""
    rows = []
    for name, found in agreement(field, value, noise, rules).items():
        passes = count(field, value, noise, rules[name]).field
        cosine, ratio = (
            [None if isnan(m) else round(m, 4) for m in part.nanmedian(dim=1).values.tolist()]
            for part in (found.cosine, found.ratio)
        )
        rows.append(
            {
                "rule": name,
                "t": [round(t, 4) for t in found.t.tolist()],
                "cosine": cosine,
                "norm_ratio": ratio,
                "forwards": passes.forwards,
                "forward_rows": passes.forward_rows // len(noise),
                "backwards": passes.backwards,
            }
        )
    print(f"{'':<26}" + "".join(f"{f't={t:.1f}':>7}" for t in rows[0]["t"]) + "    fwd  rows   bwd")
    for row in rows:
        shown = [
            "".join(f"{'':>7}" if number is None else f"{number:>7.2f}" for number in row[key])
            for key in ("cosine", "norm_ratio")
        ]
        cost = f"{row['forwards']:>7}{row['forward_rows']:>6}{row['backwards']:>6}"
        print(f"{row['rule']:<26}{shown[0]}{cost}\n{'  its norm over Tweedie':<26}{shown[1]}")
    return rows


def visited(policy: FlowPolicy, task: str, episodes: int) -> Tensor:
    """Return the states in which the frozen policy chooses a chunk, (N, O)."""
    env, states = ogbench.make(task), []
    for seed in range(episodes):
        generator, ended = torch.Generator().manual_seed(seed), False
        obs, _ = env.reset(seed=seed)
        while not ended:
            states.append(torch.as_tensor(obs, dtype=torch.float32))
            noise = torch.randn(1, policy.config.horizon, policy.config.action_dim, generator=generator)
            chunk = qsteer.sample(policy.field(states[-1][None]), None, noise)[0].clamp(-1, 1)
            for action in chunk:
                obs, _, terminated, truncated, _ = env.step(action.numpy())
                if ended := terminated or truncated:
                    break
    env.close()
    return torch.stack(states)


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=8, help="of cube-single, whose states are used")
    parser.add_argument("--observations", type=int, default=8, help="of the random pi0.5")
    parser.add_argument("--policy", type=Path, default=CHECKPOINTS / "policy", help="of cube-single")
    parser.add_argument("--critic", type=Path, default=CHECKPOINTS / "critic", help="of cube-single")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.manual_seed(0)

    policy = FlowPolicy.from_pretrained(args.policy).requires_grad_(False)
    critic = qsteer.Critic.from_pretrained(args.critic).requires_grad_(False)
    states = visited(policy, TASKS["cube-single"].environment(), args.episodes)
    print(f"cube-single's policy and critic, {len(states)} states: cosine to Tweedie's gradient; passes")
    noise = torch.randn(len(states), policy.config.horizon, policy.config.action_dim)
    depth = len(policy.config.hidden) - 1 if policy.config.residual else 0
    small = compare(policy.field(states), critic.bind(states), noise, RULES | truncated(depth))

    large = random_hosts.pi05(width=128, depth=8)
    config = qsteer.CriticConfig(obs_dim=4, action_dim=3, horizon=large.config.n_action_steps)
    print("\na random pi0.5 and a random critic: cosine to Tweedie's gradient; passes")
    opened = qsteer.open_action(large, random_hosts.batch(large, args.observations), qsteer.Critic(config))
    hosted = compare(*opened, RULES | truncated(8))
    if args.out:
        write_json({"states": len(states), "cube-single": small, "random pi05": hosted}, args.out)


if __name__ == "__main__":
    main()

"""Cross the QGF authors' networks with ours: each policy under each critic, all by our rules.

python benchmarks/peers/qgf/cross.py CHECKOUT --task cube-single --theirs DIR --policy P --critic C --out OUT

DIR is what `train.py` left, whose weights are read into torch. CHECKOUT is for a comparison of actions, their
`sample_actions` against our `QGF` on their networks from the same noise. OUT/PAIR.json are comparisons as
`qsteer evaluate` writes them, of the pairs (policy-critic) ours-theirs, theirs-ours and theirs-theirs.
"""

import argparse
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import qsteer
from qsteer.critics import Critic
from qsteer.envs import ogbench
from qsteer.envs.seeds import EVALUATION_SEED, TUNING_SEED
from qsteer.evaluation.arms import parse
from qsteer.evaluation.compare import Driver, compare_driven, format_comparison
from qsteer.experiments.tasks import RECIPES
from qsteer.files import write_json
from qsteer.policies import FlowPolicy

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")


def main() -> None:
    """Read both, compare actions, roll out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--task", choices=list(RECIPES), required=True)
    parser.add_argument("--theirs", type=Path, required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--critic", required=True)
    parser.add_argument("--pairs", nargs="*", default=["ours-theirs", "theirs-ours", "theirs-theirs"])
    parser.add_argument("--arms", nargs="+", default=["base", "qgf=0.06", "best-of-8"])
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--tuning", action="store_true", help="on the tuning seeds")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    sys.path.insert(0, str(args.checkout))
    stored = pickle.loads((args.theirs / "weights.pkl").read_bytes())
    task, environment = RECIPES[args.task], RECIPES[args.task].environment()
    policies: dict[str, Any] = {
        "ours": FlowPolicy.from_pretrained(args.policy),
        "theirs": TheirPolicy(to_tensors(stored["policy"]), task.critic.horizon),
    }
    critics: dict[str, Any] = {
        "ours": Critic.from_pretrained(args.critic),
        "theirs": TheirCritic(to_tensors(stored["target_critic"]["value_net"])),
    }
    config = policies["ours"].config
    data, _ = ogbench.load(environment, task.data_path)
    compare_actions(
        stored, data["observations"][:: len(data["observations"]) // 64], policies, critics, config
    )
    for pair in args.pairs:
        mine, its = pair.split("-")
        policy, critic = policies[mine], critics[its]
        driver = Driver(
            config.horizon,
            None,
            lambda arm, trace, mode, rows, p=policy, c=critic: arm.agent(p, c, trace, rows=rows),
            lambda obs, p=policy, c=critic: (
                p.field(obs),
                c.bind(obs),
                torch.randn(1, config.horizon, config.action_dim),
            ),
            torch.zeros(1, config.obs_dim),
            20,
        )
        report, _ = compare_driven(
            partial(ogbench.make, environment),
            driver,
            [parse(arm) for arm in args.arms],
            episodes=args.episodes,
            seed=TUNING_SEED if args.tuning else EVALUATION_SEED,
        )
        print(f"policy {mine}, critic {its}\n{format_comparison(report)}")
        report = {"task": environment, "policy": mine, "critic": its} | report
        write_json(report, args.out / f"{pair}.json")


def to_tensors(weights: Any) -> Any:
    """Return a tree of their arrays as tensors."""
    if isinstance(weights, Mapping):
        return {name: to_tensors(part) for name, part in weights.items()}
    return torch.from_numpy(np.array(weights))


def mlp(weights: Mapping[str, Any], x: Tensor) -> Tensor:
    """Return their MLP up to its last dense layer; weights may have a leading axis of members."""
    layers = sum(name.startswith("Dense") for name in weights)
    for i in range(layers):
        dense = weights[f"Dense_{i}"]
        x = x @ dense["kernel"] + dense["bias"].unsqueeze(-2)
        if i + 1 < layers:
            norm = weights[f"LayerNorm_{i}"]
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = x * norm["scale"].unsqueeze(-2) + norm["bias"].unsqueeze(-2)
            x = F.gelu(x, approximate="tanh")
    return x


@dataclass(frozen=True)
class TheirPolicy:
    """Their ``ActorFlowField``, with what an arm asks of a policy."""

    weights: Mapping[str, Any]
    horizon: int

    def velocity(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """Return the velocity (B, H, A)."""
        frequencies = 10_000 * 10_000 ** -(torch.arange(8.0) / 8)
        angles = t[:, None] * frequencies
        given = torch.cat([obs, x.flatten(1), angles.cos(), angles.sin()], dim=1)
        h = F.gelu(mlp(self.weights["MLP_0"], given), approximate="tanh")
        last = self.weights["Dense_0"]
        return (h @ last["kernel"] + last["bias"]).view_as(x)

    def field(self, obs: Tensor) -> qsteer.Field:
        """Return the field for observations."""
        return qsteer.field(self.velocity, obs)


@dataclass(frozen=True)
class TheirCritic:
    """Their target critic, the lowest of its members."""

    weights: Mapping[str, Any]

    def q(self, a: Tensor, obs: Tensor) -> Tensor:
        """Return the value (B,)."""
        return mlp(self.weights, torch.cat([obs, a.flatten(1)], dim=1))[..., 0].amin(0)

    def bind(self, obs: Tensor) -> qsteer.Value:
        """Return the value for observations."""
        return qsteer.value(self.q, obs)


def compare_actions(
    stored: Mapping[str, Any],
    obs: np.ndarray,
    policies: Mapping[str, Any],
    critics: Mapping[str, Any],
    config: Any,
) -> None:
    """Print how far our actions on their networks are from their own."""
    import jax
    import ml_collections
    from agents.qgf import QGFAgent

    settings = ml_collections.ConfigDict(stored["settings"]["config"])
    agent = QGFAgent.create(0, obs[:1], np.zeros((1, config.action_dim), np.float32), settings)
    names = ("policy", "target_critic")
    agent = agent.replace(**{name: getattr(agent, name).replace(params=stored[name]) for name in names})
    key = jax.random.PRNGKey(0)
    shape = len(obs), config.horizon, config.action_dim
    noise = np.array(jax.random.normal(key, (len(obs), config.horizon * config.action_dim))).reshape(shape)
    seen, start = torch.from_numpy(obs), torch.from_numpy(noise)
    field, value = policies["theirs"].field(seen), critics["theirs"].bind(seen)
    clipped = qsteer.Euler(clip="policy")  # as they do
    for weight in (0.0, 0.06, 0.25):
        expected = np.array(agent.sample_actions(obs, seed=key, guidance_weight=weight)).reshape(shape)
        got = qsteer.sample(field, value, start, rule=qsteer.QGF(weight=weight), sampler=clipped).numpy()
        print(f"weight {weight}: actions differ by at most {np.abs(got - expected).max():.1e}")


if __name__ == "__main__":
    main()

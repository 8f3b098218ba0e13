"""Train the QGF authors' own JAX agent on a recipe's data, and roll it out in the recipe's environment.

python benchmarks/peers/qgf/train.py CHECKOUT --task cube-single --out DIR [--arms base qgf=0.06 best-of-8]

CHECKOUT is zhouzypaul/qgf; needs jax[cpu] flax optax distrax ml_collections beside qsteer[ogbench]. Agent,
losses, sampling of batches and settings are theirs, but for the recipe's widths, chunk and discount. Data (as
`ogbench.load` reads them), environment and the seeds of episodes are ours, those of `qsteer evaluate`. DIR
holds the weights, which are trained if they are missing; --report writes what `qsteer evaluate` does.
"""

import argparse
import json
import os
import pickle
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import trange

from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.envs.rollouts import Agent, Rollouts, Simulators
from qsteer.envs.seeds import EVALUATION_SEED, TUNING_SEED
from qsteer.experiments.tasks import RECIPES, Task
from qsteer.files import write_json
from qsteer.statistics import paired_interval, wilson_interval

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
NETWORKS = ("policy", "critic", "target_critic", "value")
CLIP = 1 - 1e-5
"""Bound of stored actions, as the authors' loader clips them."""


def main() -> None:
    """Train or load, roll out, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--task", choices=list(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory of the weights")
    parser.add_argument("--updates", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings of their agent")
    parser.add_argument("--arms", nargs="*", default=[], help="base, qgf=W, best-of-N, qgf=W+best-of-N")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--tuning", action="store_true", help="on the tuning seeds")
    parser.add_argument("--report", type=Path, help="JSON to write")
    args = parser.parse_args()

    sys.path.insert(0, str(args.checkout))
    task = RECIPES[args.task]
    changed = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
    data, _ = ogbench.load(task.environment(), task.data_path)
    agent = train(task, data, args.out, changed, args.updates, args.seed)
    if args.arms:
        first = TUNING_SEED if args.tuning else EVALUATION_SEED
        report = evaluate(task, agent, args.arms, args.episodes, first)
        report = {
            "task": task.environment(),
            "agent": str(args.out),
            "data": Episodes.from_ogbench(data).fingerprint(),
            "updates": args.updates,
            "training_seed": args.seed,
            "changed": changed,
        } | report
        if args.report:
            write_json(report, args.report)


def train(
    task: Task, data: dict[str, np.ndarray], out: Path, changed: dict[str, Any], updates: int, seed: int
) -> Any:
    """Return their agent after ``updates`` of its own loop, from ``out`` if it is there."""
    from agents.qgf import QGFAgent, get_config
    from utils.datasets import Dataset

    config = get_config()
    config.action_chunking, config.horizon_length = True, task.critic.horizon
    config.discount = task.critic.gamma
    config.actor_hidden_dims = tuple(task.policy.hidden)
    config.value_network_kwargs = {"hidden_dims": tuple(task.critic.hidden), "layer_norm": True}
    for name, value in changed.items():
        config[name] = value
    np.random.seed(seed)
    dataset = Dataset.create(**data | {"actions": data["actions"].clip(-CLIP, CLIP)})
    example = dataset.sample(1)
    agent = QGFAgent.create(seed, example["observations"], example["actions"], config)
    path, settings = out / "weights.pkl", {"updates": updates, "seed": seed, "config": config.to_dict()}
    if path.exists():
        stored = pickle.loads(path.read_bytes())
        if stored["settings"] != settings:
            raise ValueError(f"{path}: expected {settings}, got {stored['settings']}; use another --out")
        return agent.replace(**{name: getattr(agent, name).replace(params=stored[name]) for name in NETWORKS})
    info, started = {}, time.perf_counter()
    for step in (bar := trange(1, updates + 1, mininterval=10)):
        batch = dataset.sample_sequence(config.batch_size, config.horizon_length, config.discount)
        agent, info = agent.update(batch)
        if step % 5000 == 0:
            bar.write(f"{step} " + " ".join(f"{k}={float(v):.4g}" for k, v in info.items()))
    print(f"{updates} updates in {time.perf_counter() - started:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: getattr(agent, name).params for name in NETWORKS}
    path.write_bytes(pickle.dumps({"settings": settings} | weights))
    return agent


def acting(agent: Any, spec: str, horizon: int, rows: int) -> Agent:
    """Return an arm as ``act(obs, noise)``: each row's noise seeds the noise that they draw themselves."""
    import jax

    weight, candidates = 0.0, 1
    for part in () if spec == "base" else spec.split("+"):
        if part.startswith("qgf="):
            weight = float(part.removeprefix("qgf="))
        elif part.startswith("best-of-"):
            candidates = int(part.removeprefix("best-of-"))
        else:
            raise ValueError(f"arm: expected base, qgf=W, best-of-N or qgf=W+best-of-N, got {spec!r}")
    one = partial(agent.sample_actions, guidance_weight=weight, rejection_sampling=candidates)
    sample = jax.jit(jax.vmap(lambda obs, seed: one(obs, seed=jax.random.PRNGKey(seed))))

    def act(obs: Tensor, noise: Tensor) -> Tensor:
        seeds = noise[:, 0, 0].contiguous().view(torch.int32).numpy()
        missing = rows - len(obs)  # the last batches are smaller: filled up, lest each be compiled
        chunks = sample(np.pad(obs.numpy(), ((0, missing), (0, 0))), np.pad(seeds, (0, missing)))
        return torch.from_numpy(np.array(chunks)[: len(obs)]).unflatten(1, (horizon, -1))

    return act


def evaluate(task: Task, agent: Any, specs: list[str], episodes: int, seed: int) -> dict[str, Any]:
    """Roll the arms out on the same episodes; return what `qsteer evaluate` reports of success."""
    rows, horizon = min(8, episodes), task.critic.horizon
    with Simulators(partial(ogbench.make, task.environment()), horizon=horizon, num_envs=rows) as simulators:
        runs: list[Rollouts] = [
            simulators.rollout(acting(agent, spec, horizon, rows), episodes=episodes, seed=seed, name=spec)
            for spec in specs
        ]
    arms = []
    for run in runs:
        low, high = wilson_interval(int(run.success.sum()), episodes)
        print(f"{run.name:<20}{run.success.mean():>6.0%}  {low:.0%} .. {high:.0%}")
        arms.append(
            {
                "spec": run.name,
                "success": float(run.success.mean()),
                "low": low,
                "high": high,
                "episodes": episodes,
                "difference": list(paired_interval(run.success, runs[0].success)),
                "successes": "".join("01"[int(s)] for s in run.success),
            }
        )
    return {"seed": seed, "arms": arms}


if __name__ == "__main__":
    main()

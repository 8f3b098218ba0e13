"""How well policies fit a recipe's held-out data: flow-matching loss at the times of their chain.

python benchmarks/peers/qgf/fit.py --task cube-single --policies DIR ... --theirs DIR ... --out FILE.json

``--theirs`` are directories of weights that `train.py` wrote. The loss is a mean over entries, of the same
states, chunks and noise for all; how small it could be is not known: only differences say something.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from cross import TheirPolicy, to_tensors

from qsteer.data import Chunks, Episodes
from qsteer.envs import ogbench
from qsteer.experiments.tasks import RECIPES
from qsteer.files import write_json
from qsteer.flow import interpolate
from qsteer.policies import FlowPolicy

ROWS, TIMES = 20_000, [k / 10 for k in range(10)]


def main() -> None:
    """Measure each policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(RECIPES), required=True)
    parser.add_argument("--policies", nargs="*", default=[], help="directories of FlowPolicy checkpoints")
    parser.add_argument("--theirs", nargs="*", default=[], type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    task = RECIPES[args.task]
    horizon = task.policy.horizon
    _, held = ogbench.load(task.environment(), task.data_path)
    draw = torch.Generator().manual_seed(0)
    batch = Chunks(Episodes.from_ogbench(held), horizon, 1.0, "actions").sample(ROWS, draw)
    noise = torch.randn(batch.actions.shape, generator=draw)
    policies: dict[str, Any] = {name: FlowPolicy.from_pretrained(name) for name in args.policies}
    for path in args.theirs:
        weights = pickle.loads((path / "weights.pkl").read_bytes())["policy"]
        policies[str(path)] = TheirPolicy(to_tensors(weights), horizon)

    report = {}
    for name, policy in policies.items():
        losses = []
        with torch.no_grad():
            field = policy.field(batch.observations)
            for time in TIMES:
                t = noise.new_full((ROWS,), time)
                v = field(interpolate(noise, batch.actions, t), t)
                losses.append(float((v - (batch.actions - noise)).square().mean()))
        report[name] = {"mean": sum(losses) / len(losses), "times": dict(zip(TIMES, losses, strict=True))}
        print(f"{name}: {report[name]['mean']:.4f}")
    write_json(report, args.out)


if __name__ == "__main__":
    main()

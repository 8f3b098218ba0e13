r"""Where the policy's Jacobian pays: gradients with it, through its last layers and without it, step by step.

    python examples/jacobian_of_a_vla.py --policy examples/checkpoints/metaworld/policy \
      --critic examples/checkpoints/metaworld/critic --dataset runs/metaworld/dataset

Along the chains that Tweedie's raw gradient steers, in frames of a LeRobotDataset, for each instruction:
medians of cosine and norm against Tweedie's gradient of QGF (identity in the Jacobian's place) and of Tweedie
through the last layers, and how far a unit of each pushes the entries that the critic sees. A Jacobian that
shrinks directions in which the policy is certain takes the gradient's norm with it: what QGF pushes there,
Tweedie does not.
"""

import argparse
from math import isnan
from pathlib import Path
from typing import Any

import torch

import qsteer
from qsteer.data.lerobot import Seen, open_dataset, open_policy
from qsteer.evaluation.gradients import agreement
from qsteer.files import write_json

RULES: dict[str, Any] = {
    "qgf": qsteer.QGF(),
    "last layer": qsteer.Tweedie(layers=1),
    "last 2 layers": qsteer.Tweedie(layers=2),
    "forward difference": qsteer.ForwardTweedie(),
}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="a lerobot policy: folder, or name on the hub")
    parser.add_argument("--critic", required=True)
    parser.add_argument("--dataset", required=True, help="a LeRobotDataset: folder, or name on the hub")
    parser.add_argument("--alpha", type=float, default=1.0, help="raw weight of Tweedie, which steers")
    parser.add_argument("--observations", type=int, default=128, help="of each instruction")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.manual_seed(0)

    dataset = open_dataset(args.dataset)
    policy, preprocessor, _ = open_policy(args.policy)
    critic = qsteer.Critic.from_pretrained(args.critic).requires_grad_(False).eval()
    seen = Seen(dataset, policy, preprocessor)
    tasks = torch.as_tensor(dataset.hf_dataset.with_format("numpy")["task_index"][:])
    truth = qsteer.Tweedie(alpha=args.alpha, scaling="raw", clip=None)
    report = {}
    for number, task in enumerate(dataset.meta.tasks.sort_values("task_index").index):
        rows = (tasks == number).nonzero()[:, 0]
        drawn = rows[torch.randperm(len(rows))[: args.observations]].tolist()
        field, value, noise = qsteer.open_action(policy, seen.batch(drawn), critic)
        found = agreement(field, value, noise, RULES, truth=truth)
        print(f"{task}: cosine to Tweedie's gradient, and norm over Tweedie's, at each step")
        print(f"{'':<20}" + "".join(f"{f't={t:.1f}':>7}" for t in found["qgf"].t.tolist()))
        report[task] = {"t": found["qgf"].t.tolist()}
        for name, rule in found.items():
            medians = {
                key: [None if isnan(m) else round(m, 4) for m in part.nanmedian(1).values.tolist()]
                for key, part in (("cosine", rule.cosine), ("norm", rule.ratio))
            }
            report[task][name] = medians
            for key, numbers in medians.items():
                shown = "".join(f"{'':>7}" if m is None else f"{m:>7.2f}" for m in numbers)
                print(f"{name if key == 'cosine' else '  norm':<20}{shown}")
    if args.out:
        write_json({"observations": args.observations, "alpha": args.alpha, "tasks": report}, args.out)


if __name__ == "__main__":
    main()

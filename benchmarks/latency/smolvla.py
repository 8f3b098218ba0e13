"""An action of a small SmolVLA of lerobot's own code, eager, prepared and compiled: CPU time on one thread.

python benchmarks/latency/smolvla.py OUT [--modes eager static inductor] [--methods unsteered qgf tweedie]

Weights are random. The widths and depths are those of a policy that was trained on MetaWorld's push-v3: 128
and 4, chunks of 10 actions of which 5 are executed. All calls are timed in every round, lerobot's own too.
"""

import argparse
import time
from pathlib import Path

import torch

import qsteer
from qsteer.bench.latency import Subject, describe_conditions, steer_copy
from qsteer.bench.timing import time_calls
from qsteer.files import write_json
from qsteer.testing import hosts

SHAPE = hosts.Shape(
    resolution=None, state=10, action=4, chunk=10, executed=5, padded_action=4, padded_state=10, tokens=12
)
METHODS = {
    "unsteered": (None, qsteer.Euler()),
    "qgf": (qsteer.QGF(), qsteer.Euler()),
    "tweedie": (qsteer.Tweedie(), qsteer.Euler()),
}


def main() -> None:
    """Time each method in each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--modes", nargs="+", default=["eager", "static"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = hosts.smolvla(width=128, depth=4, shape=SHAPE).requires_grad_(False)
    critic = qsteer.Critic(qsteer.CriticConfig(SHAPE.state, SHAPE.action, SHAPE.executed))
    subject = Subject(policy, critic.requires_grad_(False), hosts.batch(policy))
    calls = {"stock": subject.action, "prefix": subject.open}
    for name in args.methods:
        for mode in args.modes:
            how = None if mode == "eager" else mode
            calls[f"{name}, {mode}"] = steer_copy(subject, METHODS[name], mode=how)
    found = time_calls(calls, repeats=args.repeats, timer=time.process_time)
    rows = {
        name: {"p50_ms": latency.p50, "of_stock": latency.against(found["stock"])}
        for name, latency in found.items()
    }
    for name, row in rows.items():
        ratio, low, high = row["of_stock"]
        print(f"{name:22} {row['p50_ms']:8.1f} ms {ratio:6.2f} ({low:.2f} to {high:.2f})")
    write_json({"conditions": describe_conditions(subject), "rounds": args.repeats, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

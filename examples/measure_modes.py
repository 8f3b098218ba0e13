"""Where could a posterior pay? How many kinds of actions small policies have in mind, domain by domain.

    python examples/measure_modes.py runs/protocol/*-[0-9] --out benchmarks/protocol/modes.json

Takes the run directories of `qsteer protocol`: of each the seeds' policies, on states of the domain's
validation data. A minute for each domain on one core. See qsteer.maps.modes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from qsteer.experiments.protocol import find_domain
from qsteer.files import read_json, write_json
from qsteer.maps.modes import Modes, measure_modes
from qsteer.policies import FlowPolicy

STATES = 256


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of qsteer protocol")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    found = {}
    for run in args.runs:
        domain = read_json(run / "results.json")["domain"]
        found[domain] = [measure(path, domain) for path in sorted(run.glob("seed*/policy"))]
        times = [row.time for row in found[domain][0]]
        print(f"{domain:<20}" + "".join(f"{f't = {t:g}':>16}" for t in times))
        for name in ("spread", "off"):
            means = np.array([[getattr(row, name) for row in seed] for seed in found[domain]]).mean(0)
            print(f"{'  ' + name:<20}" + "".join(f"{mean:>16.3f}" for mean in means))
    if args.out:
        rows = {
            domain: [[row._asdict() for row in seed] for seed in seeds] for domain, seeds in found.items()
        }
        print(f"report: {write_json({'states': STATES, 'domains': rows}, args.out)}")


def measure(path: Path, domain: str) -> list[Modes]:
    """Measure a policy on states that it was not trained on."""
    data = find_domain(domain).data_path
    observations = np.load(data.with_stem(data.stem + "-val"))["observations"]
    rows = np.random.default_rng(0).choice(len(observations), STATES, replace=False)
    policy = FlowPolicy.from_pretrained(path).requires_grad_(False)
    obs = torch.tensor(observations[rows], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(STATES, policy.config.horizon, policy.config.action_dim, generator=generator)
    return measure_modes(policy.field(obs), noise, generator=generator)


if __name__ == "__main__":
    main()

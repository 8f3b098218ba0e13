"""What the audit says of the critics of `qsteer protocol`, beside what Tweedie gained with them offline.

    python examples/audit_protocol.py runs/protocol/*-[0-9] --out benchmarks/audit/protocol.json

The data are the domain's validation split with the task's own rewards. Twenty seconds for each critic on one
core.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import qsteer
from qsteer.critics import Critic
from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.experiments.protocol import find_domain, read_results
from qsteer.files import write_json
from qsteer.policies import FlowPolicy

STATES = 128


def main() -> None:
    """Audit, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of qsteer protocol")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| domain, task | seed | verdict | fails | base | steered | gain |\n|---|---|---|---|---|---|---|")
    for run in args.runs:
        for row in audit_run(run):
            rows.append(row)
            print(
                f"| {row['domain']}, {row['task']} | {row['seed']} | {row['verdict']} | "
                f"{', '.join(row['fails'])} | {row['base']:.0%} | {row['steered']:.0%} | "
                f"{row['steered'] - row['base']:+.0%} |"
            )
    if args.out:
        print(f"report: {write_json({'states': STATES, 'critics': rows}, args.out)}")


def audit_run(run: Path) -> list[dict[str, Any]]:
    """Audit the offline critic of each seed."""
    results = read_results(run / "results.json")
    task = find_domain(results["domain"])
    environment = task.environment(results["task"])
    columns = ogbench.load(environment, task.data_path, sparse=task.sparse)[1]
    data = Episodes.from_ogbench(columns)
    draw = torch.Generator().manual_seed(0)
    states = data.observations[torch.randint(len(data), (STATES,), generator=draw)]
    offline = {arm["spec"]: arm["offline"] for arm in results["arms"] if "offline" in arm}
    steered = next(spec for spec in offline if spec.startswith("tweedie="))
    rows = []
    for i, seed in enumerate(results["seeds"]):
        found = qsteer.audit(
            FlowPolicy.from_pretrained(run / f"seed{seed}" / "policy"),
            Critic.from_pretrained(run / f"seed{seed}" / "critic"),
            [states],
            data,
            gamma=task.gamma,
        )
        rows.append(
            {
                "domain": results["domain"],
                "task": results["task"],
                "seed": seed,
                "verdict": found.verdict,
                "fails": [check.name for check in found.checks if check.verdict == "fail"],
                "rule": steered,
                "base": offline["base"][i],
                "steered": offline[steered][i],
                "findings": {check.name: check.finding for check in found.checks},
            }
        )
    return rows


if __name__ == "__main__":
    main()

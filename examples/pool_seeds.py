"""Pool reports of `qsteer evaluate` over training seeds into one table.

    python examples/pool_seeds.py benchmarks/cube-single/seed*.json

Prints Markdown: success for each training seed, pooled success with its 95 % Wilson interval, and the pooled
gain over the first arm with Tango's paired interval. Both intervals are of the episodes; the columns of
the seeds show how far training seeds differ. With --cost: evaluations per action (forwards + backwards of
policy, critic and learnt map, as passes and as rows of policy and map forwards) and time per action over the
first arm's, the median of the reports.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qsteer.statistics import paired_interval, wilson_interval


def main() -> None:
    """Read, pool, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "reports", nargs="+", type=Path, help="JSON of the same arms for several training seeds"
    )
    parser.add_argument("--cost", action="store_true", help="add what an action costs")
    args = parser.parse_args()
    reports = [json.loads(path.read_text())["arms"] for path in args.reports]
    base = [int(s) for arms in reports for s in arms[0]["successes"]]

    seeds = range(len(reports))
    head = ["arm", *(f"seed {i}" for i in seeds), "pooled", "95 %", "gain", "95 %"]
    head += ["policy", "rows", "critic", "map", "rows", "time"] if args.cost else []
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for arms in zip(*reports, strict=True):
        hits = [int(s) for arm in arms for s in arm["successes"]]
        low, high = wilson_interval(sum(hits), len(hits))
        gain, worst, best = paired_interval(hits, base)
        each = " | ".join(f"{arm['success']:.0%}" for arm in arms)
        against = "| |" if arms[0] is reports[0][0] else f"{gain:+.0%} | {worst:+.0%} to {best:+.0%} |"
        pooled = f"{sum(hits) / len(hits):.0%} | {low:.0%} to {high:.0%}"
        print(f"| {arms[0]['spec']} | {each} | {pooled} | {against}" + (cost(arms) if args.cost else ""))


def cost(arms: Sequence[Mapping[str, Any]]) -> str:
    """Return the columns of --cost."""
    policy, critic, learnt = (arms[0][f"{network}_passes"] for network in ("policy", "critic", "map"))
    passes = [f"{n['forwards']} + {n['backwards']}" for n in (policy, critic, learnt)]
    time = median(arm["time_ratio"] for arm in arms)
    rows = policy["forward_rows"], learnt["forward_rows"]
    return f" {passes[0]} | {rows[0]} | {passes[1]} | {passes[2]} | {rows[1]} | {time:.1f} |"


if __name__ == "__main__":
    main()

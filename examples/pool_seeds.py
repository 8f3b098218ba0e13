"""Pool reports of `qsteer evaluate` over training seeds into one table.

    python examples/pool_seeds.py benchmarks/cube-single/seed*.json

Prints Markdown: success for each training seed, pooled success with its 95 % Wilson interval, and the pooled
gain over the first arm with a paired bootstrap interval. Both intervals are of the episodes; the columns of
the seeds show how far training seeds differ.
"""

import argparse
import json
from pathlib import Path

from qsteer.evaluation.statistics import paired_bootstrap, wilson_interval


def main() -> None:
    """Read, pool, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "reports", nargs="+", type=Path, help="JSON of the same arms for several training seeds"
    )
    reports = [json.loads(path.read_text())["arms"] for path in parser.parse_args().reports]
    base = [int(s) for arms in reports for s in arms[0]["successes"]]

    seeds = range(len(reports))
    print("| arm | " + " | ".join(f"seed {i}" for i in seeds) + " | pooled | 95 % | gain | 95 % |")
    print("|---|" + "---|" * (len(reports) + 4))
    for arms in zip(*reports, strict=True):
        hits = [int(s) for arm in arms for s in arm["successes"]]
        low, high = wilson_interval(sum(hits), len(hits))
        gain, worst, best = paired_bootstrap(hits, base)
        each = " | ".join(f"{arm['success']:.0%}" for arm in arms)
        against = "| |" if arms[0] is reports[0][0] else f"{gain:+.0%} | {worst:+.0%} to {best:+.0%} |"
        pooled = f"{sum(hits) / len(hits):.0%} | {low:.0%} to {high:.0%}"
        print(f"| {arms[0]['spec']} | {each} | {pooled} | {against}")


if __name__ == "__main__":
    main()

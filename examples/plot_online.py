"""Compare online runs: a picture of success against environment steps, and where the time went.

    python examples/plot_online.py runs/cube-single/online/*-sarsa \
        --controls benchmarks/online/cube-single-tweedie=0.2-seed?.json --plot docs/online.png

``--controls``: reports of `qsteer evaluate`; the pooled success of their arms that do not learn (base, random
direction) is drawn as a level.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qsteer.evaluation.curves import plot_curves, read_curve, summary, table
from qsteer.files import write_json
from qsteer.training.loop import METRICS, SPEED


def main() -> None:
    """Read the runs; print tables, write a picture and the curves as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, with a seedN for each seed")
    parser.add_argument("--controls", nargs="*", default=[], type=Path, help="reports of qsteer evaluate")
    parser.add_argument("--until", type=int, help="leave out what comes after so many environment steps")
    parser.add_argument("--title", help="above the picture")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    groups = {run.name: sorted(run.glob(f"seed*/{METRICS}")) for run in args.runs}
    print(table(summary(groups, until=args.until)))
    times = {run.name: where_the_time_goes(run.glob(f"seed*/{SPEED}"), args.until) for run in args.runs}
    print("\n" + time_table(times))
    if args.plot:
        picture = plot_curves(
            groups, args.plot, levels=levels(args.controls), until=args.until, title=args.title
        )
        print(f"\nplot:   {picture}")
    if args.out:
        curves = {name: [points(path, args.until) for path in paths] for name, paths in groups.items()}
        print(f"curves: {write_json({'curves': curves, 'time': times}, args.out)}")


def points(path: Path, until: int | None) -> dict[str, list[float]]:
    """Return the evaluations of one seed."""
    curve = read_curve(path, until=until)
    return {"env_steps": curve.steps.tolist(), "success": curve.values.tolist()}


def levels(reports: Sequence[Path]) -> dict[str, float]:
    """Return the pooled success of the arms that do not learn."""
    hits: dict[str, list[int]] = defaultdict(list)
    for path in reports:
        for arm in json.loads(path.read_text())["arms"]:
            if arm["kind"] in ("base", "control"):
                hits[arm["spec"]] += [int(success) for success in arm["successes"]]
    return {name: float(np.mean(successes)) for name, successes in hits.items()}


def where_the_time_goes(paths: Iterable[Path], until: int | None) -> dict[str, float]:
    """Return the medians over a run's lines of speed, once the critic learns."""
    lines: dict[str, list[float]] = defaultdict(list)
    for path in paths:
        for line in map(json.loads, path.read_text().splitlines()):
            if line["updates/s"] > 0 and line["env_steps"] <= (until or np.inf):
                for name, value in line.items():
                    lines[name].append(value)
    parts = ("act", "learn", "wait", "store")
    kept = ("env_steps/s", "updates/s", *(f"time/{part}" for part in parts))
    return {name: round(float(np.median(lines[name])), 3) for name in kept}


def time_table(times: Mapping[str, Mapping[str, float]]) -> str:
    """Return the times of all runs as a Markdown table."""
    columns = list(next(iter(times.values())))
    rows = [["run", *(name.removeprefix("time/") for name in columns)], ["---"] * (len(columns) + 1)]
    for name, time in times.items():
        cells = (f"{time[c]:.0%}" if c.startswith("time/") else f"{time[c]:.1f}" for c in columns)
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()

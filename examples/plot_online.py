"""Compare online runs: a picture of success against environment steps, and where the time went.

    python examples/plot_online.py runs/cube-single/online/*-sarsa \
        --controls benchmarks/online/cube-single-tweedie=0.2-seed?.json --plot docs/online.png

A JSON file which an earlier call wrote with --out stands for its runs, to draw them again:

    python examples/plot_online.py benchmarks/online/cube-single.json --plot docs/online.png

``--controls``: reports of `qsteer evaluate`; the pooled success of their arms that do not learn (base, random
direction) is drawn as a level.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qsteer.evaluation.arms import describe_arm
from qsteer.evaluation.curves import Curve, format_summary, plot_curves, read_curve, summarize
from qsteer.files import write_json
from qsteer.training.loop import METRICS, SPEED

TARGETS = {"sarsa": "SARSA", "td": "TD", "monte_carlo": "Monte Carlo", "iql": "IQL", "fql": "FQL"}


def main() -> None:
    """Read the runs; print tables, write a picture and the curves as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run directories, with a seedN for each seed, or JSON"
    )
    parser.add_argument("--controls", nargs="*", default=[], type=Path, help="reports of qsteer evaluate")
    parser.add_argument("--until", type=int, help="leave out what comes after so many environment steps")
    parser.add_argument("--title", help="above the picture")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    curves: dict[str, list[Curve]] = {}
    times: dict[str, dict[str, float]] = {}
    for run in args.runs:
        if run.is_dir():
            curves[run.name] = [
                read_curve(path, until=args.until) for path in sorted(run.glob(f"seed*/{METRICS}"))
            ]
            times[run.name] = where_the_time_goes(run.glob(f"seed*/{SPEED}"), args.until)
        else:
            saved = json.loads(run.read_text())
            curves |= {name: [curve_of(seed) for seed in seeds] for name, seeds in saved["curves"].items()}
            times |= saved["time"]
    print(format_summary(summarize(curves, until=args.until)))
    print("\n" + time_table(times))
    if args.plot:
        words = describe_runs(curves)
        picture = plot_curves(
            {words[name]: seeds for name, seeds in curves.items()},
            args.plot,
            levels={describe_arm(spec): rate for spec, rate in levels(args.controls).items()},
            until=args.until,
            title=args.title,
        )
        print(f"\nplot:   {picture}")
    if args.out:
        points = {name: [points_of(curve) for curve in seeds] for name, seeds in curves.items()}
        print(f"curves: {write_json({'curves': points, 'time': times}, args.out)}")


def points_of(curve: Curve) -> dict[str, list[float]]:
    """Return the evaluations of one seed for JSON."""
    return {"env_steps": curve.steps.tolist(), "success": curve.values.tolist()}


def curve_of(points: Mapping[str, Sequence[float]]) -> Curve:
    """Return the evaluations of one seed from JSON."""
    return Curve(np.array(points["env_steps"]), np.array(points["success"]))


def describe_runs(names: Iterable[str]) -> dict[str, str]:
    """Return runs named ARM-TARGET in words: arm and target, of which one that all share is left out."""
    parts = {name: name.rpartition("-") for name in names if name.rpartition("-")[2] in TARGETS}
    parts = {name: (describe_arm(arm), TARGETS[target]) for name, (arm, _, target) in parts.items()}
    kinds = [len(set(column)) > 1 for column in zip(*parts.values(), strict=True)]
    words = {
        name: ", ".join(part for part, differs in zip(pair, kinds, strict=True) if differs) or ", ".join(pair)
        for name, pair in parts.items()
    }
    return {name: words.get(name, name) for name in names}


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

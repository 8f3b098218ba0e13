"""The OGBench protocol in one picture and one table: success while arms learn online, a panel a domain.

    python examples/plot_protocol.py runs/protocol/*/results.json --plot docs/protocol.png

Takes what `qsteer protocol` wrote. The table has each arm's success after the offline and the online phase,
in the mean over seeds, and in its last row the interquartile mean over domains and seeds with its 95 %
stratified bootstrap interval, of arms that were measured in all domains.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qsteer.evaluation.arms import describe_arm
from qsteer.evaluation.curves import COLOURS
from qsteer.experiments.protocol import PHASES, list_arms, read_results
from qsteer.plotting import BASE, STYLE, add_caption, add_title, load_pyplot, save
from qsteer.statistics import interquartile_mean, seed_bootstrap, stratified_bootstrap


def main() -> None:
    """Read the results; print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="results.json of qsteer protocol")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args()
    runs = [read_results(path) for path in args.results]
    print(format_table(runs))
    if args.plot:
        print(f"\nplot: {plot_protocol(runs, args.plot)}")


def format_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    arms = [list_arms(run) for run in runs]
    names = list(dict.fromkeys(name for each in arms for name in each))
    lines = [f"| domain, task | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run, each in zip(runs, arms, strict=True):
        lines.append(
            f"| {run['domain']}, {run['task']} | {' | '.join(describe(each.get(n, {})) for n in names)} |"
        )
    cells = [
        " → ".join(
            pool([each[name][phase] for each in arms])
            for phase in PHASES
            if all(phase in each.get(name, {}) for each in arms)
        )
        for name in names
    ]
    return "\n".join([*lines, f"| IQM, 95 % | {' | '.join(cells)} |"])


def describe(row: dict[str, Any]) -> str:
    """Return an arm's success in one domain, phase by phase."""
    return " → ".join(f"{100 * np.mean(row[phase]):.0f}" for phase in PHASES if phase in row) + " %" * bool(
        row
    )


def pool(scores: Sequence[Sequence[float]]) -> str:
    """Return the interquartile mean over domains and seeds, with its interval."""
    table = np.array(scores).T
    low, high = (100 * x for x in stratified_bootstrap(table)[-2:])
    return f"{100 * interquartile_mean(table):.0f} ({low:.0f} to {high:.0f})"


def plot_protocol(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the success of the episodes in which the arms learnt, tenth by tenth."""
    plt = load_pyplot()
    from matplotlib.ticker import EngFormatter

    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    learnt = (name for run in runs for name, row in list_arms(run).items() if "curve" in row)
    colours = dict(zip(dict.fromkeys(learnt), COLOURS, strict=False))
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            rows,
            columns,
            figsize=(3.2 * columns, 2.4 * rows + 0.9),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for ax, run in zip(axes.flat, runs, strict=False):
            arms = list_arms(run)
            base = 100 * np.mean(arms["base"]["offline"])
            ax.axhline(base, color=BASE, linewidth=1.4, label=describe_arm("base"))
            for name, colour in colours.items():
                if name in arms and "curve" in arms[name]:
                    draw(ax, arms[name], run["size"]["online_steps"], name, colour)
            add_title(ax, f"{run['domain']}, task {run['task']}")
            ax.set_ylim(0, 102)
            ax.set_yticks(range(0, 101, 25), ["0", "25", "50", "75", "100 %"])
            ax.grid(axis="y", color=STYLE["axes.edgecolor"], linewidth=0.6)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.xaxis.set_tick_params(labelbottom=True)
            ax.set_xlabel("environment steps", loc="left")
        for ax in axes.flat[len(runs) :]:
            ax.set_axis_off()
        lines = {
            label: line
            for ax in axes.flat
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        fig.legend(
            lines.values(),
            lines.keys(),
            loc="outside upper right",
            ncols=len(lines),
            frameon=False,
            fontsize=9,
        )
        add_caption(fig, "success while learning, by tenths of the run; mean and 95 % band over seeds")
        return save(fig, path)


def draw(ax: Any, row: dict[str, Any], steps: int, name: str, colour: str) -> None:
    """Draw the tenths in which every seed ended an episode."""
    table = np.array(row["curve"], float)
    whole = ~np.isnan(table).any(0)
    at = (np.arange(table.shape[1]) + 0.5)[whole] * steps / table.shape[1]
    band = seed_bootstrap(100 * table[:, whole])
    ax.fill_between(at, band.low, band.high, color=colour, alpha=0.14, linewidth=0)
    ax.plot(at, band.mean, color=colour, linewidth=2, label=describe_arm(name))


if __name__ == "__main__":
    main()

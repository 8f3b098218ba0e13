"""Learning curves: read from metrics, averaged over seeds with bootstrap bands, drawn and summed up."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from qsteer.plotting import BASE, CONTROL, STEERED, STYLE, add_caption, add_title, load_pyplot, save
from qsteer.statistics import Band, seed_bootstrap, time_weighted_ema

SUCCESS = "evaluation/success"
COLOURS = (STEERED, "#2a9d6f", "#8e5bd0", "#c9427f", "#8a6d1f", "#1a9bb5")
OTHER = "#c3c9d1"
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (2, 2)))


class Curve(NamedTuple):
    """One run's metric over its environment steps, which increase."""

    steps: Float[np.ndarray, "T"]
    values: Float[np.ndarray, "T"]


type Run = str | Path | Curve
"""One run: its ``metrics.jsonl``, or what was read from it."""


class Curves(NamedTuple):
    """One metric of several runs at common environment steps."""

    steps: Float[np.ndarray, "T"]
    values: Float[np.ndarray, "S T"]


class Summary(NamedTuple):
    """One method in numbers.

    Attributes:
        name: of the method.
        seeds: its runs.
        steps: environment steps after which ``final`` was measured.
        final: the metric there.
        area: its mean over the whole run: the area under the curve over its width, so of the metric's units.
    """

    name: str
    seeds: int
    steps: int
    final: Band
    area: Band


def read_curve(path: str | Path, key: str = SUCCESS, until: int | None = None) -> Curve:
    """Read one metric of a run from its ``metrics.jsonl``, against ``env_steps`` up to ``until`` (None: all).

    Left out are lines without the metric, or with NaN there (nothing to average yet), and a last line that is
    still being written. Of lines with the same ``env_steps`` (learning without acting) the last one counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no line has the metric.
    """
    points: dict[int, float] = {}
    known: set[str] = set()
    for line in Path(path).read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        metrics = json.loads(line)
        known |= set(metrics)
        if until is not None and metrics.get("env_steps", 0) > until:
            continue
        if "env_steps" in metrics and not np.isnan(metrics.get(key, np.nan)):
            points[metrics["env_steps"]] = metrics[key]
    if not points:
        raise ValueError(
            f"{path}: expected lines with 'env_steps' and {key!r}, got {sorted(known)}; choose another "
            "metric, or wait for the first evaluation"
        )
    steps = sorted(points)
    return Curve(np.array(steps, float), np.array([points[step] for step in steps], float))


def align(curves: Sequence[Curve]) -> Curves:
    """Put runs on common steps: all steps at which one of them was measured, within what all have covered.

    Between its own steps a run is interpolated linearly. Runs that were measured at the same steps, as seeds
    of one experiment are, stay as they are, but for the end: a run that is still short cuts all of them, so
    that a mean is always over all seeds.

    Raises:
        ValueError: there are no curves, or no step that all of them cover.
    """
    if not curves:
        raise ValueError("curves: expected at least one run, got none")
    start = max(curve.steps[0] for curve in curves)
    stop = min(curve.steps[-1] for curve in curves)
    if stop < start:
        raise ValueError(
            f"curves: expected runs that overlap, got one from {start:g} environment steps on and one up to "
            f"{stop:g}; wait for the slower one, or leave it out"
        )
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    steps = steps[(steps >= start) & (steps <= stop)]
    return Curves(steps, np.stack([np.interp(steps, *curve) for curve in curves]))


def measure_area(curves: Curves) -> Float[np.ndarray, "S"]:
    """Return each run's mean over the steps: the area under its curve (trapezoids) over the width."""
    width = curves.steps[-1] - curves.steps[0]
    if not width:
        return curves.values[:, 0]
    return np.trapezoid(curves.values, curves.steps) / width


def summarize(
    groups: Mapping[str, Sequence[Run]],
    *,
    key: str = SUCCESS,
    smoothing: float = 0.0,
    until: int | None = None,
) -> list[Summary]:
    """Return final value and area under the curve of each method, with 95 % seed-bootstrap intervals.

    Args:
        groups: each method's runs, one a seed.
        key: the metric.
        smoothing: ``alpha`` of :func:`~qsteer.statistics.time_weighted_ema`, applied to each run;
            QPILOTS reports LIBERO with 0.99.
        until: last environment step that counts; None: all.

    Raises:
        ValueError: see :func:`read_curve` and :func:`align`.
    """
    rows = []
    for name, paths in groups.items():
        curves = _read(paths, key, smoothing, until)
        rows.append(
            Summary(
                name,
                len(paths),
                int(curves.steps[-1]),
                seed_bootstrap(curves.values[:, -1]),
                seed_bootstrap(measure_area(curves)),
            )
        )
    return rows


def read_final_scores(
    tasks: Sequence[Sequence[Run]], *, key: str = SUCCESS, smoothing: float = 0.0
) -> Float[np.ndarray, "S T"]:
    """Return where each run of one method ends on each task.

    It is what :func:`~qsteer.statistics.interquartile_mean` and
    :func:`~qsteer.statistics.stratified_bootstrap` take.

    Args:
        tasks: each task's runs, one a seed.
        key: the metric.
        smoothing: see :func:`summarize`.

    Raises:
        ValueError: tasks differ in their number of seeds; see also :func:`read_curve` and :func:`align`.
    """
    if len({len(paths) for paths in tasks}) != 1:
        raise ValueError(
            f"tasks: expected equally many seeds of each, got {[len(paths) for paths in tasks]}; leave out "
            "seeds that other tasks lack"
        )
    return np.stack([_read(paths, key, smoothing).values[:, -1] for paths in tasks], axis=1)


def format_summary(rows: Iterable[Summary], *, percent: bool = True) -> str:
    """Return a summary as a Markdown table.

    Args:
        rows: of :func:`summarize`.
        percent: the metric is a rate; show it in percent.
    """
    lines = ["| method | seeds | env steps | final | area under the curve |", "|---|---|---|---|---|"]
    for row in rows:
        final, mean = (
            "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in band))
            if percent
            else "{:.3g} [{:.3g}, {:.3g}]".format(*band)
            for band in (row.final, row.area)
        )
        lines.append(f"| {row.name} | {row.seeds} | {row.steps} | {final} | {mean} |")
    return "\n".join(lines)


def plot_curves(
    groups: Mapping[str, Sequence[Run]],
    path: str | Path,
    *,
    key: str = SUCCESS,
    base: str | None = None,
    controls: Collection[str] = (),
    levels: Mapping[str, float] | None = None,
    smoothing: float = 0.0,
    until: int | None = None,
    title: str | None = None,
) -> Path:
    """Draw a metric against environment steps, one panel a method, in the order in which their curves end.

    A panel has the mean over seeds, its 95 % band (:func:`~qsteer.statistics.seed_bootstrap`), and the seeds,
    thin; the other methods' means, base, controls and levels are lines in every panel.

    Args:
        groups: each method's runs, one a seed.
        path: of the picture; its suffix says the format.
        key: the metric; one that ends in ``success`` is drawn in percent.
        base: the unsteered method, drawn in a colour of its own.
        controls: methods which should not gain, drawn dashed in grey.
        levels: what does not learn and was measured once, drawn across.
        smoothing: see :func:`summarize`.
        until: see :func:`summarize`.
        title: above the picture.

    Raises:
        ValueError: no methods, or ``base`` or ``controls`` are not among them; see also :func:`read_curve`.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not groups:
        raise ValueError("groups: expected at least one method, got none")
    if unknown := {*controls, *([base] if base else [])} - set(groups):
        raise ValueError(f"base, controls: expected names among {sorted(groups)}, got {sorted(unknown)}")
    rate = key.endswith("success")
    scale = 100 if rate else 1
    read = {name: _read(runs, key, smoothing, until) for name, runs in groups.items()}
    drawn = {name: Curves(curves.steps, scale * curves.values) for name, curves in read.items()}
    colours = dict(zip(groups, COLOURS * len(groups), strict=False))
    references = [name for name in groups if name == base or name in controls]
    ranked = sorted(groups, key=lambda name: -drawn[name].values[:, -1].mean())
    methods = [name for name in ranked if name not in references] or ranked
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    plt = load_pyplot()
    from matplotlib.ticker import EngFormatter

    with plt.rc_context(STYLE):
        size = (6.4, 3.6) if len(methods) == 1 else (max(8.0, 3.2 * columns), 2.4 * rows + 0.9)
        fig, axes = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        fig.get_layout_engine().set(w_pad=0.1)
        for ax, name in zip(axes.flat, methods, strict=False):
            dashes = iter(DASHES * len(groups))
            for other in (other for other in methods if other != name):
                ax.plot(drawn[other].steps, drawn[other].values.mean(0), color=OTHER, linewidth=1, zorder=1)
            for other in references:
                control = other in controls
                ax.plot(
                    drawn[other].steps,
                    drawn[other].values.mean(0),
                    color=CONTROL if control else BASE,
                    linewidth=1.4,
                    linestyle=next(dashes) if control else "-",
                    label=other,
                    zorder=2,
                )
            for level, height in (levels or {}).items():
                ax.axhline(
                    scale * height,
                    color=CONTROL,
                    linewidth=1.4,
                    linestyle=next(dashes),
                    label=level,
                    zorder=1,
                )
            _draw_method(ax, drawn[name], colours[name])
            add_title(ax, name)
            if rate:
                ax.set_ylim(0, 102)
                ax.set_yticks(range(0, 101, 25), ["0", "25", "50", "75", "100 %"])
            ax.grid(axis="y", color=STYLE["axes.edgecolor"], linewidth=0.6)
            ax.set_axisbelow(True)
            ax.margins(x=0.01)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.xaxis.set_tick_params(labelbottom=True)
            ax.set_xlabel("environment steps", loc="left")
        for ax in axes.flat[len(methods) :]:
            ax.set_axis_off()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        if labels:
            ncols = min(4, columns + 1)
            fig.legend(handles, labels, loc="outside upper right", ncols=ncols, frameon=False, fontsize=9)
        if title:
            fig.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize=11)
        metric = "success rate" if rate else key.removeprefix("evaluation/")
        others = "; grey: the other methods' means" if len(methods) > 1 else ""
        add_caption(fig, f"{metric}; {_describe_seeds(groups)}{others}")
        return save(fig, path)


def _draw_method(ax: Any, curves: Curves, colour: str) -> None:
    """Draw mean, band and seeds of one method."""
    band = seed_bootstrap(curves.values)
    for values in curves.values if len(curves.values) > 1 else ():
        ax.plot(curves.steps, values, color=colour, linewidth=0.6, alpha=0.5, zorder=2)
    ax.fill_between(curves.steps, band.low, band.high, color=colour, alpha=0.14, linewidth=0)
    marker = "o" if len(curves.steps) == 1 else None
    ax.plot(
        curves.steps,
        band.mean,
        color=colour,
        linewidth=2.2,
        marker=marker,
        markersize=5,
        zorder=3,
        solid_capstyle="round",
    )


def _read(runs: Sequence[Run], key: str, smoothing: float, until: int | None = None) -> Curves:
    curves = [_cut(run, until) if isinstance(run, Curve) else read_curve(run, key, until) for run in runs]
    return align([Curve(x, time_weighted_ema(x, y, smoothing)) for x, y in curves])


def _cut(curve: Curve, until: int | None) -> Curve:
    kept = curve.steps <= (np.inf if until is None else until)
    return Curve(curve.steps[kept], curve.values[kept])


def _describe_seeds(groups: Mapping[str, Sequence[Run]]) -> str:
    low, *_, high = sorted(2 * [len(runs) for runs in groups.values()])
    if high == 1:
        return "one seed"
    count = f"{high} seeds" if low == high else f"{low} to {high} seeds"
    return f"thick: mean of {count}; thin: each; band: 95 % bootstrap interval of the mean"

"""Pictures of results: success, distillation, adaptation, latency."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qsteer.evaluation.arms import describe_arm
from qsteer.plotting import (
    BASE,
    CONTROL,
    INK,
    MUTED,
    PARTS,
    STEERED,
    STYLE,
    add_caption,
    add_title,
    load_pyplot,
    save,
)
from qsteer.statistics import wilson_interval

METHODS = {
    "stock": "the policy's own code",
    "unsteered": "qsteer, not steered",
    "unsteered, static": "qsteer, not steered, static buffers",
    "unsteered, graph": "qsteer, not steered, CUDA graph",
    r"Posterior\(map\), N=(\d+)": "posterior, learnt map, {} samples",
    r"Posterior\(GLASS\), N=(\d+)": "posterior, GLASS, {} samples",
    r"BestOfN\((\d+)\)": "best of {}",
    r"BeamSearch\((\d+), (\d+), (\d+)\)": "beam search, {} × {}",
    "BeamSearch, flow map": "beam search, flow map",
    "ForwardTweedie(.*)": "forward Tweedie{}",
}
"""The latency benchmark's methods in words."""


def plot_success(
    arms: Mapping[str, ArrayLike],
    path: str | Path,
    *,
    base: str | None = None,
    controls: Collection[str] = (),
    title: str | None = None,
) -> Path:
    """Draw the success rate of each arm with its 95 % Wilson interval, from top to bottom in the given order.

    Args:
        arms: per-episode successes by name of the arm, for example ``{r.name: r.success for r in rollouts}``.
        path: of the picture; its suffix says the format.
        base: the unsteered arm, drawn in a colour of its own with a line to compare by.
        controls: arms which should not gain, drawn in grey.
        title: above the picture.

    Raises:
        ValueError: no arms, or ``base`` or ``controls`` are not among them.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not arms:
        raise ValueError("arms: expected at least one, got none")
    if unknown := {*controls, *([base] if base else [])} - set(arms):
        raise ValueError(f"base, controls: expected names among {sorted(arms)}, got {sorted(unknown)}")
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        height = 0.42 * len(arms) + (1.4 if title else 1.05)
        fig, ax = plt.subplots(figsize=(7.2, height), layout="constrained")
        for y, (name, successes) in enumerate(arms.items()):
            hits = np.asarray(successes, bool)
            rate, interval = 100 * hits.mean(), 100 * np.array(wilson_interval(int(hits.sum()), len(hits)))
            colour = BASE if name == base else CONTROL if name in controls else STEERED
            ax.barh(y, rate, height=0.62, color=colour, alpha=0.22, linewidth=0)
            ax.plot(interval, [y, y], color=colour, linewidth=2, solid_capstyle="round")
            ax.plot(rate, y, "o", color=colour, markersize=7, markeredgecolor="white", markeredgewidth=1.2)
            ax.annotate(
                f"{rate:.0f}",
                (interval[1], y),
                (6, 0),
                textcoords="offset points",
                va="center_baseline",
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
            if name == base:
                ax.axvline(rate, color=BASE, linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        ax.set(xlim=(0, 106), ylim=(len(arms) - 0.4, -0.6))
        ax.set_xticks(range(0, 101, 25), ["0", "25", "50", "75", "100 %"])
        ax.set_yticks(range(len(arms)), arms, color=INK)
        ax.set_xlabel("success rate", loc="left")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.spines["bottom"].set_bounds(0, 100)
        if title:
            ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
        notes = [f"dot: rate of {_describe_sizes(arms)} episodes; line: 95 % Wilson interval"]
        notes += ["dotted: the frozen policy"] * (base is not None) + ["grey: a control"] * bool(controls)
        add_caption(fig, "; ".join(notes))
        return save(fig, path)


def plot_distillation(runs: Mapping[str, Sequence[Mapping[str, float | int]]], path: str | Path) -> Path:
    """Draw how a meta flow map learnt: its two losses, and its posterior error against GLASS.

    Args:
        runs: lines of ``metrics.jsonl`` of each run, by name.
        path: of the picture; its suffix says the format.

    Raises:
        ValueError: no run was judged on held-out data.
        ModuleNotFoundError: matplotlib is not installed.
    """
    judged = {name: [m for m in lines if "posterior_error" in m] for name, lines in runs.items()}
    if not judged or not all(judged.values()):
        raise ValueError(
            "runs: expected lines with 'posterior_error', got a run without; distil with held_out"
        )
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        fig, (losses, error) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
        for lines in runs.values():
            steps = [m["step"] for m in lines]
            for name, colour in ("diagonal", BASE), ("semigroup", STEERED):
                losses.plot(steps, [m[name] for m in lines], color=colour, linewidth=1.4, alpha=0.75)
        for label, colour in (
            ("diagonal: the velocity is the policy's", BASE),
            ("semigroup: two jumps are one", STEERED),
        ):
            losses.plot([], [], color=colour, label=label)
        losses.set(yscale="log")
        add_title(losses, "loss per chunk")
        losses.legend(frameon=False, fontsize=9)
        top = max(m["posterior_error"] for lines in judged.values() for m in lines)
        for lines in judged.values():
            error.plot(
                [m["step"] for m in lines],
                [m["posterior_error"] for m in lines],
                color=STEERED,
                marker="o",
                ms=3,
            )
        for name, label in (
            ("tweedie", "the denoised action alone"),
            ("floor", "two sets of exact samples"),
        ):
            level = float(np.mean([lines[-1][name] for lines in judged.values()]))
            error.axhline(level, color=CONTROL, linewidth=1, linestyle=(0, (2, 3)))
            error.annotate(
                label,
                (1, level),
                (-2, 3),
                xycoords=("axes fraction", "data"),
                ha="right",
                textcoords="offset points",
                color=MUTED,
                fontsize=8.5,
            )
            top = max(top, level)
        error.set_ylim(0, 1.12 * top)
        add_title(error, "error of posterior samples, held out")
        for ax in (losses, error):
            ax.set_xlabel("gradient steps", loc="left")
            ax.locator_params(axis="x", nbins=4)
        error.locator_params(axis="y", nbins=4)
        losses.set_ylim(top=10 * losses.get_ylim()[1])  # for the legend
        add_caption(fig, "one line per training seed")
        return save(fig, path)


def plot_adaptation(metrics: str | Path, path: str | Path) -> Path:
    """Draw how far FMQ took a flow map from the offline one, within which radius, and to what use.

    Args:
        metrics: the ``metrics.jsonl`` of :func:`qsteer.online.fmq.adapt`.
        path: of the picture; its suffix says the format.

    Raises:
        ValueError: there are no metrics.
        ModuleNotFoundError: matplotlib is not installed.
    """
    lines = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    if not lines:
        raise ValueError(f"{metrics}: expected lines of metrics, got none; adapt a map first")

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(line["step"], line[name]) for line in lines if name in line]
        return [step for step, _ in points], [value for _, value in points]

    plt = load_pyplot()
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 3, figsize=(9.6, 2.6), layout="constrained")
        distance, cosine, gain = axes
        distance.plot(
            *curve("start_radius"), color=BASE, linestyle=(0, (4, 2)), label="radius of the trust region"
        )
        distance.plot(
            *curve("start_displacement"), color=STEERED, linewidth=2, label="of jumps from the noise"
        )
        distance.plot(*curve("displacement"), color=CONTROL, label="of jumps from anywhere")
        add_title(distance, "distance to the offline map")
        distance.legend(frameon=False, fontsize=8, loc="lower right")
        cosine.plot(*curve("start_cosine"), color=STEERED, linewidth=2)
        add_title(cosine, "cosine with the critic's gradient")
        gain.plot(*curve("q_gain"), color=STEERED, linewidth=2)
        add_title(gain, "critic's value gained")
        distance.set_ylim(bottom=0)
        add_caption(fig, "means over a batch of observations; cosine and value: of jumps from the noise")
        cosine.set_ylim(0, 1)
        for ax in axes:
            ax.set_xlabel("gradient steps", loc="left")
            ax.locator_params(nbins=4)
        return save(fig, path)


def plot_latency(report: Mapping[str, Any], path: str | Path) -> Path:
    """Draw what an action costs: p50 and p95 of each method, its roofline, and where its time goes.

    Args:
        report: of the latency benchmark, as its JSON file has it.
        path: of the picture; its suffix says the format.

    Raises:
        ValueError: there is no method but the stock host.
        ModuleNotFoundError: matplotlib is not installed.
    """
    methods = report["methods"]
    timed = [method for method in methods if method["parts"]]
    if not timed:
        raise ValueError("methods: expected at least one beside the stock host, got none; name arms")
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        height = 0.34 * len(methods) + 1.5
        fig, (whole, parts) = plt.subplots(1, 2, figsize=(10.4, height), sharey=True, layout="constrained")
        for y, method in enumerate(methods):
            digits = 0 if method["p50_ms"] >= 100 else 1
            colour = BASE if method["name"].startswith(("stock", "unsteered", "base")) else STEERED
            whole.barh(y, method["p50_ms"], height=0.62, color=colour, alpha=0.3, linewidth=0)
            whole.plot([method["p50_ms"], method["p95_ms"]], [y, y], color=colour, linewidth=2)
            whole.plot([method["roofline_ms"]] * 2, [y - 0.31, y + 0.31], color=INK, linewidth=1.2)
            whole.annotate(
                f"{method['p50_ms']:.{digits}f}  ×{method['ratio']['stock'][0]:.2f}",
                (method["p95_ms"], y),
                (6, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=8.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        whole.axvline(methods[0]["p50_ms"], color=BASE, linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        whole.set(
            xlim=(0, 1.35 * max(method["p95_ms"] for method in methods)), ylim=(len(methods) - 0.4, -0.6)
        )
        whole.set_yticks(range(len(methods)), [_describe_method(m["name"]) for m in methods], color=INK)
        names = [name for name in timed[0]["parts"] if name != "whole"]
        starts = np.zeros(len(methods))
        for name, colour in zip(names, PARTS, strict=True):
            spent = [method["parts"][name]["p50_ms"] if method["parts"] else 0.0 for method in methods]
            parts.barh(range(len(methods)), spent, left=starts, height=0.62, color=colour, label=name)
            starts += spent
        for ax, title in (whole, "milliseconds per action"), (parts, "where they go, without compilation"):
            add_title(ax, title)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        parts.legend(loc="lower right", frameon=False, fontsize=8.5)
        add_caption(
            fig,
            "bar: median; line: to the 95 % quantile; orange: not steered; dotted, ×: the policy's own code; "
            "tick: the least time that the device's measured best allows",
        )
        return save(fig, path)


def _describe_method(name: str) -> str:
    """Return a method of the latency benchmark in words."""
    for pattern, words in METHODS.items():
        if match := re.fullmatch(pattern, name):
            return words.format(*match.groups())
    return describe_arm(name)


def _describe_sizes(arms: Mapping[str, ArrayLike]) -> str:
    sizes = sorted({len(np.asarray(successes)) for successes in arms.values()})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"

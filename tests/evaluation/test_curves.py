"""Learning curves, read, aligned, summed up and drawn."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from qsteer.evaluation import curves
from qsteer.evaluation.curves import (
    Curve,
    align,
    format_summary,
    measure_area,
    plot_curves,
    read_curve,
    read_final_scores,
    summarize,
)
from qsteer.statistics import (
    time_weighted_ema,
)

KEY = "evaluation/success"


def write(path: Path, lines: list[Mapping[str, Any]], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + end)
    return path


def run(path: Path, values: Mapping[int, float], key: str = KEY) -> Path:
    return write(path, [{"step": s, "env_steps": s, key: v} for s, v in values.items()])


class TestCurves:
    def test_read(self, tmp_path: Path) -> None:
        lines = [
            {"step": 1, "env_steps": 0, KEY: 0.1},
            {"step": 2, "env_steps": 0, KEY: 0.2},  # no environment step since: this one counts
            {"step": 3, "env_steps": 10, "loss": 1.0},
            {"step": 4, "env_steps": 20, KEY: float("nan"), "success": 0.5},
            {"step": 5, KEY: 0.9},
            {"step": 6, "env_steps": 30, KEY: 0.4},
        ]
        path = write(tmp_path / "m.jsonl", lines, end='\n{"step": 7, "env_st')
        steps, values = read_curve(path)
        assert (steps.tolist(), values.tolist()) == ([0, 30], [0.2, 0.4])
        assert read_curve(path, "success").steps.tolist() == [20]
        assert read_curve(path, until=29).steps.tolist() == [0]
        with pytest.raises(ValueError, match=r"'env_steps' and 'reward', got \[.*'success'\]"):
            read_curve(path, "reward")

    def test_runs_are_aligned_where_all_have_been(self) -> None:
        short = Curve(np.array([0.0, 10.0, 20.0]), np.array([0.0, 1.0, 3.0]))
        long = Curve(np.array([5.0, 15.0, 25.0, 35.0]), np.array([2.0, 4.0, 0.0, 9.0]))
        steps, values = align([short, long])
        assert steps.tolist() == [5, 10, 15, 20]
        assert values.tolist() == [[0.5, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 2.0]]
        assert np.array_equal(align([long, long]).values, [long.values, long.values])
        with pytest.raises(ValueError, match="from 5 environment steps on and one up to 0"):
            align([Curve(np.zeros(1), np.ones(1)), long])
        with pytest.raises(ValueError, match="at least one run"):
            align([])

    def test_area(self) -> None:
        x = np.array([2.0, 3.0, 7.0, 12.0])
        assert measure_area(align([Curve(x, x), Curve(x, 0 * x + 4)])) == pytest.approx([7.0, 4.0])
        assert measure_area(align([Curve(x[:1], x[:1])])) == pytest.approx([2.0])

    def test_summary(self, tmp_path: Path) -> None:
        paths = [
            run(tmp_path / "0.jsonl", {0: 0.0, 10: 0.2, 20: 0.6}),
            run(tmp_path / "1.jsonl", {0: 0.0, 10: 0.4, 20: 0.4, 30: 1.0}),
        ]
        (row,) = summarize({"ours": paths})
        assert (row.name, row.seeds, row.steps) == ("ours", 2, 20)
        assert row.final == pytest.approx((0.5, 0.4, 0.6))
        assert row.area == pytest.approx((0.275, 0.25, 0.3))
        assert format_summary([row]).splitlines()[2] == "| ours | 2 | 20 | 50 [40, 60] | 28 [25, 30] |"
        assert "| 0.5 [0.4, 0.6] | 0.275 [" in format_summary([row], percent=False)
        (early,) = summarize({"ours": paths}, until=10)
        assert (early.steps, early.final.mean) == (10, pytest.approx(0.3))
        (smooth,) = summarize({"ours": paths[:1]}, smoothing=0.99)
        steps, values = read_curve(paths[0])
        assert smooth.final.mean == time_weighted_ema(steps, values, 0.99)[-1]

    def test_final_scores(self, tmp_path: Path) -> None:
        tasks = [
            [run(tmp_path / f"{t}-{s}.jsonl", {0: 9.0, 10 * (t + 1): t + s / 10}) for s in range(3)]
            for t in range(2)
        ]
        assert read_final_scores(tasks) == pytest.approx(np.array([[0, 1], [0.1, 1.1], [0.2, 1.2]]))
        with pytest.raises(ValueError, match=r"got \[3, 2\]"):
            read_final_scores([tasks[0], tasks[1][:2]])


class TestPlot:
    @pytest.fixture
    def groups(self, tmp_path: Path) -> dict[str, list[Path]]:
        tops = {"unsteered": (0.1, 0.2), "random": (0.3, 0.1), "steered": (0.6, 1.0), "other": (0.5, 0.4)}
        return {
            name: [run(tmp_path / f"{name}{i}.jsonl", {0: 0.0, 2000: t}) for i, t in enumerate(top)]
            for name, top in tops.items()
        }

    def test_what_is_drawn(
        self, groups: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures: list[Any] = []
        monkeypatch.setattr(curves, "save", lambda fig, path: figures.append(fig) or path)
        plot_curves(groups, tmp_path / "c.png", base="unsteered", controls=["random"], title="t")
        panels, legend = figures[0].axes, figures[0].legends[0]
        assert [ax.get_title(loc="left") for ax in panels] == ["steered", "other"]
        assert [text.get_text() for text in legend.get_texts()] == ["unsteered", "random"]
        assert [line.is_dashed() for line in legend.get_lines()] == [False, True]
        assert [line.get_color() for line in legend.get_lines()] == [curves.BASE, curves.CONTROL]
        colours = [ax.lines[-1].get_color() for ax in panels]
        assert len({*colours, curves.BASE, curves.CONTROL, curves.OTHER}) == 5
        lines = [line for line in panels[0].lines if line.get_color() == colours[0]]
        ends = sorted((line.get_linewidth(), line.get_ydata()[-1]) for line in lines)
        assert ends == [(0.6, 60), (0.6, 100), (2.2, 80)]
        (other,) = [line for line in panels[0].lines if line.get_color() == curves.OTHER]
        assert other.get_ydata()[-1] == 45, "the other method's mean is there to compare with"
        for ax, name in zip(panels, ("steered", "other"), strict=True):
            (band,) = [drawn for drawn in ax.collections if isinstance(drawn, PolyCollection)]
            top = {"steered": 100, "other": 50}[name]
            assert band.get_paths()[0].get_extents().bounds == pytest.approx((0, 0, 2000, top))
        assert panels[0].xaxis.get_major_formatter()(2000) == "2k"
        assert "95 % bootstrap interval" in figures[0].get_supxlabel()

    def test_base_and_controls_alone_have_panels(
        self, groups: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures: list[Any] = []
        monkeypatch.setattr(curves, "save", lambda fig, path: figures.append(fig) or path)
        chosen = {name: groups[name] for name in ("unsteered", "random")}
        plot_curves(chosen, tmp_path / "c.png", base="unsteered", controls=["random"])
        assert [ax.get_title(loc="left") for ax in figures[0].axes] == ["random", "unsteered"]

    def test_curves_that_were_read_before_are_drawn_alike(
        self, groups: dict[str, list[Path]], tmp_path: Path
    ) -> None:
        read = {name: [read_curve(path) for path in paths] for name, paths in groups.items()}
        assert summarize(read) == summarize(groups)
        assert summarize(read, until=500) == summarize(groups, until=500)
        ours, theirs = (plot_curves(g, tmp_path / f"{i}.png") for i, g in enumerate((read, groups)))
        assert ours.read_bytes() == theirs.read_bytes()

    def test_levels_are_drawn_across(
        self, groups: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures: list[Any] = []
        monkeypatch.setattr(curves, "save", lambda fig, path: figures.append(fig) or path)
        plot_curves({"steered": groups["steered"]}, tmp_path / "c.png", levels={"base": 0.06, "lucky": 0.9})
        (ax,) = figures[0].axes
        assert ax.get_title(loc="left") == "steered"
        assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["base", "lucky"]
        across = [list(line.get_ydata()) for line in ax.lines if line.is_dashed()]
        assert across == [[6, 6], [90, 90]]

    def test_files(self, groups: dict[str, list[Path]], tmp_path: Path) -> None:
        assert plot_curves(groups, tmp_path / "new" / "c.png").stat().st_size > 5_000
        drawn = plot_curves({"one": groups["steered"][:1]}, tmp_path / "c.svg").read_text()
        assert "success rate; one seed" in drawn

    def test_mistakes(self, groups: dict[str, list[Path]], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one method"):
            plot_curves({}, tmp_path / "c.png")
        with pytest.raises(ValueError, match=r"got \['bsae'\]"):
            plot_curves(groups, tmp_path / "c.png", base="bsae")
        with pytest.raises(ValueError, match="'evaluation/return'"):
            plot_curves(groups, tmp_path / "c.png", key="evaluation/return")


def test_online_runs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, top in (("ours", 0.8), ("theirs", 0.4)):
        for seed in range(2):
            where = tmp_path / name / f"seed{seed}"
            where.mkdir(parents=True)
            run(where / "metrics.jsonl", {0: 0.0, 10: top, 20: 1.0})
            shares = {"time/act": 0.25, "time/learn": 0.7, "time/wait": 0.04, "time/store": 0.01}
            speed = {"env_steps/s": 20.0, "updates/s": 5.0} | shares
            warmup = {"env_steps/s": 90.0, "updates/s": 0.0} | dict.fromkeys(shares, 0.0)
            lines = [{"env_steps": 5} | warmup, {"env_steps": 10} | speed, {"env_steps": 20} | warmup]
            write(where / "speed.jsonl", lines)
    report = tmp_path / "report.json"
    arms = (("base", "base", [True, False]), ("tweedie", "steered", [True, True]))
    report.write_text(
        json.dumps({"arms": [{"spec": s, "kind": kind, "successes": hits} for s, kind, hits in arms]})
    )
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    script = Path(__file__).parents[2] / "examples" / "plot_online.py"
    command = [str(script), str(tmp_path / "ours"), str(tmp_path / "theirs"), "--until", "10"]
    command += ["--controls", str(report), "--plot", str(picture), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    main = runpy.run_path(str(script))["main"]
    assert runpy.run_path(str(script))["levels"]([report]) == {"base": 0.5}
    main()
    printed = capsys.readouterr().out
    assert "| ours | 2 | 10 | 80 [80, 80] |" in printed
    assert "| theirs | 20.0 | 5.0 | 25% | 70% | 4% | 1% |" in printed, "the warm-up does not count"
    assert picture.stat().st_size > 5_000
    curves_ = json.loads(out.read_text())["curves"]
    assert curves_["theirs"] == 2 * [{"env_steps": [0.0, 10.0], "success": [0.0, 0.4]}]

    again = tmp_path / "again.json"  # from what was written, without the runs
    monkeypatch.setattr("sys.argv", [str(script), str(out), "--out", str(again)])
    main()
    assert again.read_bytes() == out.read_bytes()
    assert capsys.readouterr().out.splitlines()[:4] == printed.splitlines()[:4]


def test_online_runs_are_named_in_words() -> None:
    script = Path(__file__).parents[2] / "examples" / "plot_online.py"
    describe_runs = runpy.run_path(str(script))["describe_runs"]
    assert describe_runs(["tweedie=0.2-sarsa", "best-of-8-sarsa"]) == {
        "tweedie=0.2-sarsa": "Tweedie, strength 0.2",
        "best-of-8-sarsa": "best of 8",
    }
    assert describe_runs(["tweedie-iql", "tweedie-monte_carlo"]) == {
        "tweedie-iql": "IQL",
        "tweedie-monte_carlo": "Monte Carlo",
    }
    assert describe_runs(["tweedie=0.3-td"]) == {"tweedie=0.3-td": "Tweedie, strength 0.3, TD"}
    assert describe_runs(["ours"]) == {"ours": "ours"}

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
from qsteer.evaluation.curves import Curve, align, area, final_scores, plot_curves, read_curve, summary, table
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
        assert area(align([Curve(x, x), Curve(x, 0 * x + 4)])) == pytest.approx([7.0, 4.0])
        assert area(align([Curve(x[:1], x[:1])])) == pytest.approx([2.0])

    def test_summary(self, tmp_path: Path) -> None:
        paths = [
            run(tmp_path / "0.jsonl", {0: 0.0, 10: 0.2, 20: 0.6}),
            run(tmp_path / "1.jsonl", {0: 0.0, 10: 0.4, 20: 0.4, 30: 1.0}),
        ]
        (row,) = summary({"ours": paths})
        assert (row.name, row.seeds, row.steps) == ("ours", 2, 20)
        assert row.final == pytest.approx((0.5, 0.4, 0.6))
        assert row.area == pytest.approx((0.275, 0.25, 0.3))
        assert table([row]).splitlines()[2] == "| ours | 2 | 20 | 50 [40, 60] | 28 [25, 30] |"
        assert "| 0.5 [0.4, 0.6] | 0.275 [" in table([row], percent=False)
        (early,) = summary({"ours": paths}, until=10)
        assert (early.steps, early.final.mean) == (10, pytest.approx(0.3))
        (smooth,) = summary({"ours": paths[:1]}, smoothing=0.99)
        steps, values = read_curve(paths[0])
        assert smooth.final.mean == time_weighted_ema(steps, values, 0.99)[-1]

    def test_final_scores(self, tmp_path: Path) -> None:
        tasks = [
            [run(tmp_path / f"{t}-{s}.jsonl", {0: 9.0, 10 * (t + 1): t + s / 10}) for s in range(3)]
            for t in range(2)
        ]
        assert final_scores(tasks) == pytest.approx(np.array([[0, 1], [0.1, 1.1], [0.2, 1.2]]))
        with pytest.raises(ValueError, match=r"got \[3, 2\]"):
            final_scores([tasks[0], tasks[1][:2]])


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
        (ax,) = figures[0].axes
        drawn = dict(
            zip([t.get_text() for t in ax.get_legend().get_texts()], ax.get_legend().get_lines(), strict=True)
        )
        assert list(drawn) == ["steered", "other", "random", "unsteered"]
        assert [line.is_dashed() for line in drawn.values()] == [False, False, True, False]
        colours = [line.get_color() for line in drawn.values()]
        assert colours[2:] == [curves.CONTROL, curves.BASE]
        assert len(set(colours)) == 4
        lines = [line for line in ax.lines if line.get_color() == colours[0]]
        ends = sorted((line.get_linewidth(), line.get_ydata()[-1]) for line in lines)
        assert ends == [(0.6, 60), (0.6, 100), (2.2, 80)]
        bands = [band for band in ax.collections if isinstance(band, PolyCollection)]
        assert bands[2].get_paths()[0].get_extents().bounds == pytest.approx((0, 0, 2000, 100))
        assert ax.xaxis.get_major_formatter()(2000) == "2k"

    def test_levels_are_drawn_across(
        self, groups: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures: list[Any] = []
        monkeypatch.setattr(curves, "save", lambda fig, path: figures.append(fig) or path)
        plot_curves({"steered": groups["steered"]}, tmp_path / "c.png", levels={"base": 0.06, "lucky": 0.9})
        (ax,) = figures[0].axes
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["lucky", "steered", "base"]
        across = [list(line.get_ydata()) for line in ax.lines if line.is_dashed()]
        assert across == [[6, 6], [90, 90]]

    def test_files(self, groups: dict[str, list[Path]], tmp_path: Path) -> None:
        assert plot_curves(groups, tmp_path / "new" / "c.png").stat().st_size > 5_000
        drawn = plot_curves({"one": groups["steered"][:1]}, tmp_path / "c.svg").read_text()
        assert "success rate, one seed" in drawn

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

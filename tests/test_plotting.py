"""The picture of a trace."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qsteer import plotting
from qsteer.plotting import plot_trace


class TestTrace:
    def test_file(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        panels = [np.where(rng.random((20, 9)) < 0.1, np.nan, rng.random((20, 9))) for _ in range(3)]
        path = plot_trace(np.linspace(0.1, 0.9, 9), *panels, np.zeros((20, 9)), path=tmp_path / "t.png")
        assert Image.open(path).width > 1000

    def test_a_constant_strength_is_a_number_not_a_panel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures: list[Any] = []
        monkeypatch.setattr(plotting, "save", lambda fig, path: figures.append(fig) or path)
        others = [np.random.default_rng(0).random((20, 9)) for _ in range(3)]
        rising = np.linspace(0.1, 0.3, 9)[None].repeat(20, 0)
        for strength in (np.full((20, 9), 0.2), rising):
            plot_trace(np.linspace(0.1, 0.9, 9), strength, *others, path=tmp_path / "t.png")
        titles = [[ax.get_title(loc="left") for ax in figure.axes] for figure in figures]
        assert "guidance / velocity" not in titles[0] and len(titles[0]) == 3
        assert titles[1] == ["guidance / velocity", *titles[0]]
        captions = [figure.get_supxlabel() for figure in figures]
        assert captions[0].startswith("guidance = 0.2 × velocity at every step; line: median of 20 actions")
        assert captions[1] == "line: median of 20 actions; band: 10 to 90 % of them"

    def test_mistakes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected a guided action"):
            plot_trace(np.zeros(0), *[np.zeros((0, 0))] * 4, path=tmp_path / "a.png")

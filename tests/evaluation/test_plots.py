"""Pictures of made-up results."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsteer.evaluation.plots import plot_distillation, plot_success


class TestPlots:
    def test_success(self, tmp_path: Path) -> None:
        arms = {"base": np.arange(50) < 5, "steered": np.arange(50) < 30, "random": np.arange(40) < 4}
        path = plot_success(arms, tmp_path / "new" / "a.png", base="base", controls=["random"], title="t")
        assert Image.open(path).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert plot_success(arms, tmp_path / "a.svg").read_text().startswith("<?xml")

    def test_distillation(self, tmp_path: Path) -> None:
        lines = [{"step": s, "diagonal": 1 / s, "semigroup": 2 / s} for s in (1, 2, 4)]
        judged = {"posterior_error": 0.2, "floor": 0.1, "tweedie": 0.4}
        path = plot_distillation({"seed 0": [*lines, lines[-1] | judged]}, tmp_path / "d.png")
        assert path.stat().st_size > 5_000

    def test_mistakes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected at least one"):
            plot_success({}, tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"expected lines with 'posterior_error'.*held_out"):
            plot_distillation({"a": [{"step": 1, "diagonal": 1.0, "semigroup": 1.0}]}, tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"got \['bsae'\]"):
            plot_success({"base": [True]}, tmp_path / "a.png", base="bsae")

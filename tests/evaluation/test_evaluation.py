"""Plots and films of made-up arms with known outcomes."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from walks import SEED, H, Longer, Walk, follow

from qsteer.envs.rollouts import Rollouts, Simulators
from qsteer.evaluation.plots import plot_distillation, plot_success, plot_trace
from qsteer.evaluation.video import RenderError, _Film, find_gl_backend, side_by_side


@pytest.fixture(scope="module")
def simulators() -> Iterator[Simulators]:
    with Simulators(Walk, horizon=H, num_envs=3) as made:
        yield made


@pytest.fixture(scope="module")
def followed(simulators: Simulators) -> Rollouts:
    return simulators.rollout(follow, episodes=8, seed=SEED, record=True, progress=False)


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

    def test_trace(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        panels = [np.where(rng.random((20, 9)) < 0.1, np.nan, rng.random((20, 9))) for _ in range(3)]
        path = plot_trace(np.linspace(0.1, 0.9, 9), *panels, np.zeros((20, 9)), path=tmp_path / "t.png")
        assert Image.open(path).width > 1000

    def test_mistakes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected at least one"):
            plot_success({}, tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"expected lines with 'posterior_error'.*held_out"):
            plot_distillation({"a": [{"step": 1, "diagonal": 1.0, "semigroup": 1.0}]}, tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"got \['bsae'\]"):
            plot_success({"base": [True]}, tmp_path / "a.png", base="bsae")
        with pytest.raises(ValueError, match="expected a guided action"):
            plot_trace(np.zeros(0), *[np.zeros((0, 0))] * 4, path=tmp_path / "a.png")


class TestFilms:
    film = staticmethod(partial(side_by_side, size=40, stride=2, fps=10, backend="egl"))

    def test_gif_of_a_replay(self, followed: Rollouts, tmp_path: Path) -> None:
        path = tmp_path / "new" / "film.gif"
        assert self.film(Walk, [followed, followed], episodes=[0, 1], paths=[path]) == (path,)
        with Image.open(path) as gif:
            length = int(followed.length[:2].max())
            assert gif.n_frames == 1 + length // 2 + length % 2
            assert gif.size == (2 * 44, 2 * 48)

    def test_a_replay_that_ends_otherwise_is_an_error(self, followed: Rollouts, tmp_path: Path) -> None:
        for other in (partial(Walk, "success", 0.1), partial(Walk, None), Longer):
            film = _Film(other, (followed,), (0,), (tmp_path / "film.gif",), 40, 2, 10, None)
            with pytest.raises(RenderError, match="episode 0 of 'policy' did not end as recorded"):
                film.write()
        assert not list(tmp_path.iterdir())

    def test_where_nothing_can_draw(
        self, followed: Rollouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "executable", "false")  # every child fails
        arguments = {"episodes": [0], "paths": [tmp_path / "film.gif"]}
        assert find_gl_backend() is None
        with pytest.raises(RenderError, match="apt-get install libosmesa6"):
            side_by_side(Walk, [followed], **arguments)
        with pytest.raises(RenderError, match="MUJOCO_GL=osmesa failed"):
            side_by_side(Walk, [followed], **arguments, backend="osmesa")

    def test_mistakes(self, simulators: Simulators, followed: Rollouts, tmp_path: Path) -> None:
        path = tmp_path / "film.gif"
        silent = simulators.rollout(follow, episodes=8, seed=SEED, progress=False)
        other = simulators.rollout(follow, episodes=8, seed=8, record=True, progress=False)
        with pytest.raises(ValueError, match="record=True"):
            self.film(Walk, [followed, silent], episodes=[0], paths=[path])
        with pytest.raises(ValueError, match="different seeds"):
            self.film(Walk, [followed, other], episodes=[0], paths=[path])
        with pytest.raises(ValueError, match=r"some of 0 \.\. 7, got \[8\]"):
            self.film(Walk, [followed], episodes=[8], paths=[path])
        with pytest.raises(ValueError, match=r"film\.avi"):
            self.film(Walk, [followed], episodes=[0], paths=[tmp_path / "film.avi"])

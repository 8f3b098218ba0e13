"""Films of made-up arms with known outcomes."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from walk import Longer, Walk
from walks import SEED, H, follow

from qsteer.envs.rollouts import Rollouts, Simulators
from qsteer.evaluation.video import RenderError, _Film, find_gl_backend, side_by_side


@pytest.fixture(scope="module")
def simulators() -> Iterator[Simulators]:
    with Simulators(Walk, horizon=H, num_envs=3) as made:
        yield made


@pytest.fixture(scope="module")
def followed(simulators: Simulators) -> Rollouts:
    return simulators.rollout(follow, episodes=8, seed=SEED, record=True, progress=False)


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

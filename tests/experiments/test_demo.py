import json

import pytest

from qsteer.evaluation import compare, video
from qsteer.experiments.demo import demo


def test_the_demo_of_a_checkout(tmp_path, monkeypatch, capsys):
    """The README's first command, an episode per arm, on a machine without OpenGL."""
    monkeypatch.setattr(video, "find_gl_backend", lambda: None)
    monkeypatch.setattr(compare, "ROUNDS", 3)
    demo(out=tmp_path, episodes=1, num_envs=1)
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    names = ["base", "best-of-8", "qgf", "tweedie", "random-direction", "random-qgf"]
    assert [arm["name"] for arm in arms] == names
    assert all(arm["episodes"] == 1 and arm["ms_per_action"] > 0 for arm in arms)
    assert (tmp_path / "success.png").stat().st_size > 10_000
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    assert not (tmp_path / "rollout.gif").exists()
    assert "apt-get install" in capsys.readouterr().out


def test_a_demo_without_checkpoints_says_how_to_make_them():
    with pytest.raises(FileNotFoundError, match="--from-scratch"):
        demo("pointmaze-medium")


def test_a_folder_without_checkpoints_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path / 'cube-single'}, got none: a checkout"):
        demo(checkpoints=tmp_path)

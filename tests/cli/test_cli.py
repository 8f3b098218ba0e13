import json

import pytest

from qsteer.cli import main
from qsteer.evaluation import compare
from qsteer.policies import FlowPolicy


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(
        command in text for command in ("demo", "generate", "train-policy", "train-critic", "evaluate")
    )


def test_a_missing_data_set_ends_with_the_command_that_makes_it(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train-policy", "--task", "pointmaze-medium", "--data", str(tmp_path / "none.npz")])
    assert "generate" in capsys.readouterr().err


def test_from_nothing_to_a_comparison(tmp_path, capsys, monkeypatch):
    """The README's commands, in small: data, policy, critic, comparison."""
    monkeypatch.setattr(compare, "ROUNDS", 3)
    task, data = ["--task", "cube-single"], ["--data", str(tmp_path / "cube.npz")]  # episodes of 200 steps
    main(["generate", *task, *data, "--transitions", "400", "--workers", "1"])
    for kind, shape in ("policy", ["--residual-layers", "2", "--layer-norm"]), ("critic", []):
        main([f"train-{kind}", *task, *data, *shape, "--steps", "30", "--out", str(tmp_path / kind)])
    assert FlowPolicy.from_pretrained(tmp_path / "policy").config.layer_norm
    evaluate = ["evaluate", *task, "--policy", str(tmp_path / "policy"), "--critic", str(tmp_path / "critic")]
    options = ["--episodes", "2", "--num-envs", "2", "--out", str(tmp_path / "report.json")]
    options += ["--eval-info", str(tmp_path / "episodes")]
    main([*evaluate, "--arms", "base", "tweedie-last1=0.3", "best-of-3", *options])

    report = json.loads((tmp_path / "report.json").read_text())
    base, tweedie, best = report["arms"]
    assert [arm["name"] for arm in report["arms"]] == ["base", "tweedie-last1", "best-of-3"]
    assert all(
        arm["episodes"] == 2 and 0 <= arm["low"] <= arm["success"] <= arm["high"] <= 1
        for arm in report["arms"]
    )
    assert base["policy_passes"]["forwards"] == 10 and base["critic_passes"]["forwards"] == 0
    assert (tweedie["policy_passes"]["forwards"], tweedie["policy_passes"]["backwards"]) == (10, 9)
    assert best["policy_passes"]["forwards"] == 10 and best["policy_passes"]["forward_rows"] == 30
    episodes = json.loads((tmp_path / "episodes" / "tweedie-last1=0.3.json").read_text())
    assert len(episodes["per_episode"]) == 2
    assert episodes["aggregated"]["pc_success"] == 100 * tweedie["success"]
    assert "tweedie-last1=0.3" in capsys.readouterr().out

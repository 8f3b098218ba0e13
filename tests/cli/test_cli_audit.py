"""``qsteer audit`` in small: states of the simulator, states and returns of data, exit statuses."""

import json
from pathlib import Path

import pytest

from qsteer.cli import main
from qsteer.critics import Critic, CriticConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig

SMALL = ["--task", "pointmaze-medium", "--states", "16", "--samples", "4"]


@pytest.fixture
def networks(tmp_path: Path) -> list[str]:
    shape = {"obs_dim": 2, "action_dim": 2, "horizon": 5, "hidden": (8,)}
    FlowPolicy(FlowPolicyConfig(**shape)).save_pretrained(tmp_path / "policy")
    Critic(CriticConfig(**shape)).save_pretrained(tmp_path / "critic")
    return ["--policy", str(tmp_path / "policy"), "--critic", str(tmp_path / "critic")]


def leave(*argv: object) -> int:
    """Return the exit status of an audit."""
    with pytest.raises(SystemExit) as left:
        main(["audit", *map(str, argv)])
    return left.value.code


def test_untrained_networks_are_not_to_steer(networks, tmp_path, capsys):
    out, plot = tmp_path / "audit.json", tmp_path / "audit.png"
    assert leave(*SMALL, *networks, "--out", out, "--plot", plot) == 1
    assert "DO NOT STEER" in capsys.readouterr().out
    read = json.loads(out.read_text())
    assert read["states"] == 16 and "returns" not in read["checks"][5]["figures"] and plot.exists()


def test_data_gives_states_and_returns(networks, tmp_path):
    data, out = tmp_path / "maze.npz", tmp_path / "audit.json"
    main(["generate", *SMALL[:2], "--data", str(data), "--transitions", "600", "--workers", "1"])
    assert leave(*SMALL, *networks, "--data", data, "--out", out, "--other", networks[3]) == 1
    checks = {check["name"]: check["figures"] for check in json.loads(out.read_text())["checks"]}
    assert "returns" in checks["rank"] and checks["gradients"]["other"][0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "none.npz"], "none.npz"),
        (["--states", "4"], "at least 8 states in all, got 4"),
        (["--samples", "1"], "at least 4, got 1"),
        (["--out", "."], "directory"),
    ],
)
def test_misuse_is_one_line_and_status_2(networks, capsys, change, message):
    assert leave(*SMALL, *networks, *change) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qsteer audit: ") and message in line

"""The command that adapts a flow map."""

from pathlib import Path

import pytest

from qsteer.cli import main


def test_the_command_parses(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["adapt", "--help"])
    assert "--env-steps" in capsys.readouterr().out
    data = ["--data", str(tmp_path / "none.npz"), "--task", "pointmaze-medium"]
    with pytest.raises(SystemExit, match="2"):
        main(["adapt", *data, "--env-steps", "30"])
    assert "generate" in capsys.readouterr().err

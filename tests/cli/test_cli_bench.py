"""The command that measures what steering costs."""

import json
from pathlib import Path

import pytest
import torch

from qsteer.cli import main

torch.set_num_threads(1)


@pytest.mark.usefixtures("made_up_ceilings")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, plot, threads = tmp_path / "a.json", tmp_path / "a.png", torch.get_num_threads()
    command = ["bench", "latency", "--host", "mlp", "--size", "tiny", "--chunk", "4", "--repeats", "2"]
    options = ["--warmup", "0", "--cpu-time", "--arms", "base", "qgf=0.1", "beam-search-map=0.1"]
    main([*command, *options, "--out", str(out), "--plot", str(plot)])
    told = json.loads(out.read_text())
    assert [method["name"] for method in told["methods"]][-3:] == [
        "base",
        "qgf=0.1",
        "beam-search-map=0.1",
    ]
    assert plot.exists() and "ms per action" in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    with pytest.raises(SystemExit, match="2"):
        main([*command[:-4], "--chunk", "0"])
    assert "argument --chunk: expected a whole number of at least 1" in capsys.readouterr().err

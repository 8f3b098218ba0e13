"""The example that steers a pretrained policy."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
torch.set_num_threads(1)


def test_the_example_runs_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]):
    import wrap_pretrained

    wrap_pretrained.main([])
    out = capsys.readouterr().out
    assert "1 actions, 0 fallbacks" in out
    assert out.endswith("to the last bit: True\n")

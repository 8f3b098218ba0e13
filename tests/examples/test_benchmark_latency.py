"""The example that measures a policy of one's own."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
torch.set_num_threads(1)


@pytest.mark.usefixtures("made_up_ceilings")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    import benchmark_latency

    benchmark_latency.main(["--repeats", "2"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("PlainPolicy", "Tweedie", "QGF", "BestOfN(8)"))

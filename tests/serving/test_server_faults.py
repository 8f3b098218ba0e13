"""Faults of `benchmarks/serving/faults.py`, a few of each: floods, nonsense, kills, and a full disk."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks/serving/faults.py"
SCALES = {"malformed": 0.05, "kills": 0.1, "disconnects": 0.1, "divergence": 0.05, "disk": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALES)
def test_a_server_survives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("faults", FILE)
    assert spec is not None and spec.loader is not None
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    monkeypatch.chdir(FILE.parents[2])
    faults.FAULTS[name](SCALES[name])

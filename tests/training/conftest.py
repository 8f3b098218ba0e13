"""Pretrained policies to distil, by name, and stored batches of them."""

from pathlib import Path

import hosts
import pytest
from host_batches import batch

from qsteer.data import SafetensorsBatches, record


@pytest.fixture(params=["pi05", "smolvla"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stored(name: str, tmp_path: Path) -> SafetensorsBatches:
    record([batch(hosts.shared(name), 3, seed) for seed in range(2)], tmp_path / "data")
    return SafetensorsBatches(tmp_path / "data")

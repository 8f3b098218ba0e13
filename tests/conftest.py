"""Settings that must hold before anything is imported, the `gpu` marker, and a way around the shape checks."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per xdist worker, for torch and for numpy

import jaxtyping
import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns off the annotation checks, which users do not have: the test sees the errors that qsteer itself raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

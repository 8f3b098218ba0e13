"""Settings that must hold before anything is imported, the `gpu` marker, and what several files share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per xdist worker, for torch and for numpy

from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("histories")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def policy(name: str) -> Iterator[torch.nn.Module]:
    """The host of a name, of ten steps, and not steered afterwards."""
    import hosts

    import qsteer

    policy = hosts.shared(name)
    hosts.set_steps(policy, 10)
    yield policy
    qsteer.unsteer(policy)


@pytest.fixture
def made_up_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up device for the latency benchmark: measuring one takes seconds."""
    from qsteer.bench import latency
    from qsteer.bench.roofline import Ceilings

    ceilings = Ceilings({torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9)
    monkeypatch.setattr(latency, "measure_ceilings", lambda *_: ceilings)

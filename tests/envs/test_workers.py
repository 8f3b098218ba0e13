"""A simulator that fails is replaced; the others do not notice, and nothing is left of any of them."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breaking import SAYS, WAYS, Breaking
from torch import Tensor

from qsteer.envs.limits import Limits
from qsteer.envs.rollouts import Rollouts, Simulators

QUICK = Limits(step_s=3.0, reset_s=60.0)
EPISODES, SEED = 6, 100


def follow(obs: dict[str, Tensor], noise: Tensor) -> Tensor:
    assert obs["state"].isfinite().all()
    return torch.tanh(noise + 0.3 * obs["state"][:, None, :1])


def evaluate(make_env: Callable[[], Breaking], limits: Limits = QUICK, **options: Any) -> Rollouts:
    with Simulators(make_env, horizon=2, num_envs=3, limits=limits) as simulators:
        return simulators.rollout(
            follow, episodes=EPISODES, seed=SEED, record=True, progress=False, **options
        )


@pytest.fixture(scope="module")
def healthy() -> Rollouts:
    return evaluate(Breaking)


def same(a: Rollouts, b: Rollouts) -> bool:
    columns = ("success", "sum_reward", "max_reward", "length", "seed")
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in columns) and all(
        map(np.array_equal, a.actions or (), b.actions or ())
    )


@pytest.mark.parametrize("way", [*WAYS, "nan", "reward"])
def test_an_episode_whose_simulator_fails_is_begun_again(way: str, healthy: Rollouts, tmp_path: Path) -> None:
    once = tmp_path / "failed"
    with pytest.warns(RuntimeWarning, match=r"environment 1: .*" + SAYS[way].replace("3 s", "6 s")):
        run = evaluate(partial(Breaking, way, (SEED + 1,), 2, once))
    assert once.exists() and run.failed == 1
    assert same(run, healthy)
    assert run.to_dict()["aggregated"]["failed"] == 1 and healthy.failed == 0


@pytest.mark.parametrize("way", ["raise", "exit"])
def test_a_reset_that_fails_is_tried_again(way: str, healthy: Rollouts, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="environment 2"):
        run = evaluate(partial(Breaking, way, (SEED + 2,), 0, tmp_path / "failed"))
    assert run.failed == 1 and same(run, healthy)


def test_a_reset_that_hangs_is_ended(healthy: Rollouts, tmp_path: Path) -> None:
    make_env = partial(Breaking, "hang", (SEED + 2,), 0, tmp_path / "failed")
    with pytest.warns(RuntimeWarning, match="environment 2: expected an answer within 15 s"):
        run = evaluate(make_env, Limits(reset_s=15.0))
    assert run.failed == 1 and same(run, healthy)


@pytest.mark.filterwarnings("ignore:environment")
@pytest.mark.parametrize("way", ["raise", "exit", "nan"])
@pytest.mark.parametrize("at", [0, 2])
def test_an_episode_that_always_fails_is_neither_success_nor_failure(way: str, at: int) -> None:
    says = f"environment .: failed 3 times in a row, the last time in the episode of seed {SEED + 1}: "
    with pytest.raises(RuntimeError, match=says + SAYS[way]) as caught:
        evaluate(partial(Breaking, way, (SEED + 1,), at))
    if way == "raise":  # where it was raised is said too
        assert "breaking.py" in "".join(caught.value.__notes__)


def test_failures_that_end_a_run_can_be_set() -> None:
    with pytest.raises(RuntimeError, match="failed 1 times in a row"):
        evaluate(partial(Breaking, "raise", (SEED + 1,)), Limits(failures=1))
    for wrong in ({"step_s": 0.0}, {"reset_s": -1.0}, {"failures": 0}):
        with pytest.raises(ValueError, match=f"Limits.{next(iter(wrong))}: expected"):
            Limits(**wrong)


def test_simulators_go_on_after_a_run_that_ended(healthy: Rollouts) -> None:
    make_env = partial(Breaking, "raise", (SEED + 50,))
    with Simulators(make_env, horizon=2, num_envs=3, limits=Limits(failures=1)) as simulators:
        with pytest.raises(RuntimeError, match=f"seed {SEED + 50}"):
            simulators.rollout(follow, episodes=2, seed=SEED + 50, progress=False)
        again = simulators.rollout(follow, episodes=EPISODES, seed=SEED, record=True, progress=False)
    assert same(again, healthy)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def read_pids(path: Path) -> list[int]:
    """Return the processes of all environments that were made, and what each of them started."""
    return list(map(int, path.read_text().split()))


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")


@linux
@pytest.mark.filterwarnings("ignore:environment")
@pytest.mark.parametrize("ends", ["close", "exception", "failures"])
def test_nothing_is_left_of_simulators(ends: str, tmp_path: Path) -> None:
    """Neither of those that failed, nor of those that were closed, nor of what they had started."""
    pids, once = tmp_path / "pids", None if ends == "failures" else tmp_path / "failed"
    make_env = partial(Breaking, "hang", (SEED + 1,), 2, once, pids)

    def act(obs: dict[str, Tensor], noise: Tensor) -> Tensor:
        if ends == "exception" and once is not None and once.exists():
            raise LookupError("of the caller")
        return noise

    failing = {"close": nullcontext(), "exception": pytest.raises(LookupError)}
    with (
        failing.get(ends, pytest.raises(RuntimeError, match="failed 3 times")),
        Simulators(make_env, horizon=1, num_envs=2, limits=Limits(step_s=1.5)) as simulators,
    ):
        simulators.rollout(act, episodes=3, seed=SEED, progress=False)
    found = read_pids(pids)
    assert len(found) >= 2 * (1 + 2 + (1 if once else 2))  # the first, two, and those that replaced one
    assert wait_for(lambda: not any(map(alive, set(found) - {os.getpid()})))


@linux
def test_simulators_leave_no_open_files() -> None:
    def open_files() -> int:
        with Simulators(Breaking, horizon=1, num_envs=2) as simulators:
            simulators.rollout(lambda obs, noise: noise, episodes=2, seed=SEED, progress=False)
        del simulators
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    assert open_files() == open_files()


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from breaking import Breaking
from qsteer.envs.limits import Limits
from qsteer.envs.rollouts import Simulators

def act(obs, noise):
    Path(sys.argv[1]).with_name("acting").touch()
    return noise

if __name__ == "__main__":
    make_env = partial(Breaking, sys.argv[2], None, 2, None, Path(sys.argv[1]))
    with Simulators(make_env, horizon=1, num_envs=2, limits=Limits(step_s=None)) as simulators:
        while True:
            simulators.rollout(act, episodes=8, progress=False)
"""


@linux
@pytest.mark.parametrize(
    ("sent", "way"),
    [
        (signal.SIGINT, "hang"),
        pytest.param(signal.SIGINT, "never", marks=pytest.mark.slow),
        (signal.SIGKILL, "never"),
        pytest.param(signal.SIGKILL, "hang", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_after_an_interruption(sent: signal.Signals, way: str, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group of processes, a kill to the script alone."""
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(script), str(pids), way],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "said").open("w"),
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    try:
        assert wait_for(lambda: (tmp_path / "acting").exists() and len(read_pids(pids)) == 6)
        time.sleep(2.0)
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        assert process.wait(timeout=60) == -sent
    finally:
        process.kill()
    if sent == signal.SIGINT:  # one of the script, and none of its simulators
        assert (tmp_path / "said").read_text().count("Traceback") == 1
    assert wait_for(lambda: not any(map(alive, read_pids(pids))))
    assert not list(Path("/dev/shm").glob(f"pym-{process.pid}-*"))

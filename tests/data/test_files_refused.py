"""A replay's directory that is cut short, without room or strangely named: refused with figures, or used."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import histories
import numpy as np
import pytest
import torch
from histories import History, compare, layout

from qsteer.data.layout import Rows
from qsteer.data.replay import Replay


def made(path: Path) -> Path:
    history, replay = History(1, 3), Replay(layout(), directory=path)
    for _ in range(12):
        replay.add(history.row())
    return path


@pytest.mark.parametrize("column", ["rewards", "observations", "counters"])
@pytest.mark.parametrize("change", [-8, 8, "half", "header", "empty"])
def test_a_column_that_is_not_whole_is_refused(tmp_path: Path, column: str, change: int | str) -> None:
    file = made(tmp_path) / f"{column}.npy"
    size = file.stat().st_size
    shorter = {"half": size // 2, "header": 20, "empty": 0}.get(
        str(change), size + int(change if isinstance(change, int) else 0)
    )
    os.truncate(file, shorter)
    before = file.read_bytes()
    message = (
        f"{column}.npy: expected {size} bytes, got {shorter};" if shorter > 128 else f"{column}.npy: expected"
    )
    with pytest.raises(ValueError, match=message):
        Replay(layout(), directory=tmp_path)
    assert file.read_bytes() == before


def test_a_column_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    file = made(tmp_path) / "rewards.npy"
    column = np.load(file)
    np.save(file, column.astype(np.float64))
    with pytest.raises(ValueError, match=r"rewards\.npy: expected a column .* of float32, got .* of float64"):
        Replay(layout(), directory=tmp_path)
    np.save(file, column[:, 1:])
    with pytest.raises(ValueError, match=r"rewards\.npy: expected a column \(3, \d+\)"):
        Replay(layout(), directory=tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"rewards\.npy: expected a column of the replay, got no such file"):
        Replay(layout(), directory=tmp_path)


def test_rows_have_their_place_on_the_disk_from_the_beginning(tmp_path: Path) -> None:
    big = layout(capacity=100_000)
    replay = Replay(big, directory=tmp_path)
    for file in tmp_path.glob("*.npy"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size
    del replay
    sparse = tmp_path / "rewards.npy"  # as a copy makes it
    content = sparse.read_bytes()
    sparse.unlink()
    with sparse.open("wb") as written:
        written.write(content[:128])
        written.truncate(len(content))
    assert sparse.stat().st_blocks * 512 < len(content)
    Replay(big, directory=tmp_path)
    assert sparse.stat().st_blocks * 512 >= len(content) and sparse.read_bytes() == content


def test_a_disk_without_room_is_said_to_be_one_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=real(path).f_frsize))
    with pytest.raises(
        OSError, match=r"expected 0\.00\d+ GB free for the replay's rows, got 4\.1e-05 GB; lower"
    ):
        Replay(layout(capacity=100_000), directory=tmp_path)


LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from histories import layout
from qsteer.data.replay import Replay

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    Replay(layout(capacity=100_000), directory=sys.argv[1])
except OSError as error:
    print(error)
"""


def test_what_the_system_does_not_give_is_refused_before_the_first_row(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the kernel refuses, no store kills."""
    command = [sys.executable, "-c", LIMITED, tmp_path, Path(histories.__file__).parent]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "File too large" in run.stdout, (run.returncode, run.stdout, run.stderr)


def test_a_place_that_is_taken_while_it_is_reserved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"\.npy: expected to reserve .* GB for the replay's rows, got No space left"
    ):
        Replay(layout(), directory=tmp_path)


def test_a_file_system_that_does_not_reserve_is_used_and_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unsupported)
    history = History(1, 3)
    with pytest.warns(RuntimeWarning, match=r"expected a file system that reserves space.*GB free") as said:
        replay = Replay(layout(), directory=tmp_path)
    assert len(said) == 1
    for _ in range(20):
        replay.add(history.row())
    compare(replay, history)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_no_locks_are_told_apart_from_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def without(*_) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", without)
        with pytest.raises(RuntimeError, match="expected a file system that locks files, got"):
            Replay(layout(), directory=tmp_path)
    Replay(layout(), directory=tmp_path)


def test_names_of_columns_need_not_be_names_of_files(tmp_path: Path) -> None:
    keys = ("a/b", "a", "../c", "a b%2F", "")
    columns = {key: ((2,), "float32") for key in keys}
    shape = layout(observations=columns, lanes=1, horizon=1)
    values = {key: torch.full((1, 2), float(i)) for i, key in enumerate(keys)}
    none = torch.zeros(1, dtype=torch.bool)
    replay = Replay(shape, directory=tmp_path / "replay")
    replay.add(Rows(values, torch.zeros(1, 1, 3), torch.zeros(1), ~none, none))
    del replay
    (episode,) = Replay(shape, directory=tmp_path / "replay").trajectories()
    assert all(torch.equal(episode.observations[key], values[key]) for key in keys)
    assert [path.name for path in tmp_path.iterdir()] == ["replay"]

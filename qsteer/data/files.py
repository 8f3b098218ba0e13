"""A replay's columns on disk, from which a kill at any instruction loses nothing that was stored.

Each column is a memory-mapped ``.npy`` file. A new row is written to slots that nothing refers to; then the
lanes' counters to the one of two places that is not in force; then a single aligned number, which says which
place is. So what :meth:`Replay.add <qsteer.data.Replay.add>` has returned from outlives a process that is
killed, and a row for which it has not returned is there for all lanes or for none.
"""

import errno
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import numpy as np

from qsteer.checks import list_differences
from qsteer.data.layout import Layout
from qsteer.files import lock_directory, write_text

DESCRIPTION = "layout.json"
"""Written last of all: a directory that has it has whole columns."""

REMEDY = "copy the directory again, or delete it to start from the beginning"

UNRESERVABLE = errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV
"""What a file system says that does not reserve space."""


class ReplayFiles:
    """Columns of a replay in a directory, and the counters that say which of their slots are in use."""

    def __init__(self, path: Path, layout: Layout, slots: int) -> None:
        """Open the directory ``path``, or make it, with ``slots`` slots per lane.

        Raises:
            RuntimeError: another replay, of any process, has it open, or its file system does not lock.
            ValueError: it holds a replay of another layout, or a column that is not whole.
            OSError: the disk has no room for all rows, which is reserved here.
        """
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_directory(path, "replay")
        existing = _is_described(path, layout)
        sizes = {
            name: ((layout.lanes, slots, *shape), dtype) for name, (shape, dtype) in layout.columns.items()
        }
        sizes["counters"] = (1 + 2 * (layout.lanes + 1),), "int64"
        files = {name: path / f"{quote(name, safe='')}.npy" for name in sizes}  # "a/b" is a name, too
        for name, (shape, dtype) in sizes.items():
            if existing:
                _check_column(files[name], shape, dtype)
            else:
                files[name].unlink(missing_ok=True)
        _check_room(
            path,
            {
                files[name]: math.prod(shape) * np.dtype(dtype).itemsize
                for name, (shape, dtype) in sizes.items()
            },
        )
        self._maps = {name: _open_column(files[name], *sizes[name], existing) for name in sizes}
        _reserve(path, list(files.values()))
        if not existing:
            self.flush()
            write_text(path / DESCRIPTION, json.dumps(asdict(layout), indent=2))
        self.columns = {name: np.asarray(self._maps[name]) for name in layout.columns}
        numbers = np.asarray(self._maps["counters"])
        self._commits, self._blocks = numbers[:1], numbers[1:].reshape(2, -1)

    def committed(self) -> tuple[np.ndarray, int]:
        """Return the slots used in each lane and the rows added."""
        block = self._blocks[self._commits[0] % 2]
        return block[:-1].copy(), int(block[-1])

    def commit(self, used: np.ndarray, added: int) -> None:
        """Put what was written into force: the last store is of one aligned number."""
        commits = self._commits[0] + 1
        block = self._blocks[commits % 2]
        block[:-1], block[-1] = used, added
        self._commits[0] = commits

    def close(self) -> None:
        """Let others open the directory."""
        self._lock.close()

    def flush(self) -> None:
        """Write everything to the disk, the counters last."""
        for column in self._maps.values():
            column.flush()


def _is_described(path: Path, layout: Layout) -> bool:
    """Return whether the directory holds a replay, after a check that it is one of this layout."""
    if not (path / DESCRIPTION).exists():
        return False
    identity = json.loads(json.dumps(asdict(layout)))
    if differences := list_differences(identity, json.loads((path / DESCRIPTION).read_text())):
        expected, found = differences
        raise ValueError(
            f"{path}: expected a replay with {expected}, got one with {found}; go back to the former layout, "
            "or use another directory"
        )
    return True


def _check_column(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Check that a column is whole: numpy would fill up one that was cut short with zeros.

    Raises:
        ValueError: it is missing, has another shape or type, or another length.
    """
    if not path.exists():
        raise ValueError(f"{path}: expected a column of the replay, got no such file; {REMEDY}")
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            found, _, kind = np.lib.format.read_array_header_1_0(file)
            expected = file.tell() + math.prod(found) * kind.itemsize
    except ValueError as error:
        raise ValueError(f"{path}: expected a column of the replay, got {error}; {REMEDY}") from None
    if (found, kind) != (shape, np.dtype(dtype)):
        raise ValueError(f"{path}: expected a column {shape} of {dtype}, got {found} of {kind}; {REMEDY}")
    if expected != (size := path.stat().st_size):
        raise ValueError(f"{path}: expected {expected} bytes, got {size}; {REMEDY}")


def _open_column(path: Path, shape: tuple[int, ...], dtype: str, existing: bool) -> np.memmap:
    if existing:
        return np.lib.format.open_memmap(path, "r+")
    return np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)


def _check_room(path: Path, sizes: Mapping[Path, int]) -> None:
    """Check that the disk has room for files of these bytes; what they hold already counts as it is.

    Raises:
        OSError: it has not.
    """
    held = {file: file.stat().st_blocks * 512 if file.exists() else 0 for file in sizes}
    needed = sum(max(0, size - held[file]) for file, size in sizes.items())
    disk = os.statvfs(path)
    if needed > (free := disk.f_bavail * disk.f_frsize):
        raise OSError(
            errno.ENOSPC,
            f"{path}: expected {needed / 1e9:.3g} GB free for the replay's rows, got {free / 1e9:.3g} GB; "
            "lower the capacity, or use another disk",
        )


def _reserve(path: Path, files: Sequence[Path]) -> None:
    """Give files their place on the disk: where that is full, a store to one ends the process (SIGBUS).

    Raises:
        OSError: there is no room for them.
    """
    total = sum(file.stat().st_size for file in files)
    for file in files:
        try:
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno in UNRESERVABLE:
                warnings.warn(
                    f"{path}: expected a file system that reserves space, got {error}; keep "
                    f"{total / 1e9:.3g} GB free: a full disk would end the process without a message "
                    "(SIGBUS)",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            raise OSError(
                error.errno,
                f"{file}: expected to reserve {total / 1e9:.3g} GB for the replay's rows, got "
                f"{error.strerror}; lower the capacity, or use another disk",
            ) from None

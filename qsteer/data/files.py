"""A replay's columns on disk, from which a kill at any instruction loses nothing that was stored.

Each column is a memory-mapped ``.npy`` file. A new row is written to slots that nothing refers to; then the
lanes' counters to the one of two places that is not in force; then a single aligned number, which says which
place is. So what :meth:`Replay.add <qsteer.data.Replay.add>` has returned from outlives a process that is
killed, and a row for which it has not returned is there for all lanes or for none.
"""

import fcntl
import json
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np

from qsteer.checks import list_differences
from qsteer.data.layout import Layout
from qsteer.files import write_text

DESCRIPTION = "layout.json"
"""Written last of all: a directory that has it has whole columns."""


class ReplayFiles:
    """Columns of a replay in a directory, and the counters that say which of their slots are in use."""

    def __init__(self, path: Path, layout: Layout, slots: int) -> None:
        """Open the directory ``path``, or make it, with ``slots`` slots per lane.

        Raises:
            RuntimeError: another replay, of any process, has it open, or its file system does not lock.
            ValueError: it holds a replay of another layout.
        """
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        existing = _is_described(path, layout)
        sizes = {
            name: ((layout.lanes, slots, *shape), dtype) for name, (shape, dtype) in layout.columns.items()
        }
        counters = (1 + 2 * (layout.lanes + 1),), "int64"
        self._maps = {
            name: _open_column(path / f"{name}.npy", shape, dtype, existing)
            for name, (shape, dtype) in {**sizes, "counters": counters}.items()
        }
        if not existing:
            self.flush()
            write_text(path / DESCRIPTION, json.dumps(asdict(layout), indent=2))
        self.columns = {name: np.asarray(self._maps[name]) for name in sizes}
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

    def flush(self) -> None:
        """Write everything to the disk, the counters last."""
        for column in self._maps.values():
            column.flush()


def _lock(path: Path) -> TextIO:
    """Take the directory for one replay, as long as the returned file is open; other files do not matter."""
    file = (path / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"{path}: expected a replay that nothing else has open, got one that another replay, of this "
            "or of another process, has open; end that, or use another directory"
        ) from None
    except OSError as error:
        file.close()
        raise RuntimeError(
            f"{path}: expected a file system that locks files, got {error}; use a local directory"
        ) from None
    return file


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


def _open_column(path: Path, shape: tuple[int, ...], dtype: str, existing: bool) -> np.memmap:
    if existing:
        return np.lib.format.open_memmap(path, "r+")
    return np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)

"""Files and directories that are never found half-written, and checks before they are read or written."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

LFS = b"version https://git-lfs"
"""How the text begins that git leaves in the place of a large file."""

LOCK, TEMPORARY = "lock", ".tmp"

LOCKLESS = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS
"""What a file system that does not lock says."""


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file, atomically. Return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        temporary.write_text(text)
    return path


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give the path of a file to write, nobody else's, which takes the place of ``path`` after the block."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory to fill, which as a whole takes the place of ``path`` after the block.

    What was there stays until the new content is on the disk. A kill between the two renames that follow
    leaves nothing at ``path``, but both beside it: see :func:`mend_directory`.
    """
    mend_directory(path)
    fresh, former = _beside(path)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for file in [*fresh.rglob("*"), fresh]:
            sync(file)
        if path.exists():
            os.replace(path, former)
        os.replace(fresh, path)
        sync(path.parent)
    except BaseException:
        mend_directory(path)
        raise
    shutil.rmtree(former, ignore_errors=True)


def mend_directory(path: Path) -> None:
    """Finish, or undo, what a kill has interrupted in :func:`replacing_directory`."""
    fresh, former = _beside(path)
    if former.exists() and not path.exists():
        os.replace(fresh if fresh.exists() else former, path)  # moved away only when the new one is whole
    for left in (fresh, former):
        shutil.rmtree(left, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.former")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def lock_directory(path: Path, kind: str, *, needed: bool = True) -> TextIO:
    """Take a directory for oneself, as long as the returned file is open; other files do not matter.

    Args:
        path: of the directory.
        kind: what it holds, for messages.
        needed: refuse a file system that does not lock; else a warning says so.

    Raises:
        RuntimeError: it is taken, by this or by another process, or its file system does not lock.
    """
    file = (path / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"{path}: expected a {kind} that nothing else has open, got one that another {kind}, of this or "
            "of another process, has open; end that, or use another directory"
        ) from None
    except OSError as error:
        if error.errno not in LOCKLESS or needed:
            file.close()
        if error.errno not in LOCKLESS:
            raise
        if needed:
            raise RuntimeError(
                f"{path}: expected a file system that locks files, got {error}; use a local directory"
            ) from None
        warnings.warn(
            f"{path}: expected a file system that locks files, got {error}; see to it that no other {kind} "
            "uses the directory",
            RuntimeWarning,
            stacklevel=2,
        )
    return file


@contextmanager
def locked_run(path: Path) -> Iterator[None]:
    """Keep a second run out of a run directory, which is made, and remove what a killed one left unfinished.

    Raises:
        RuntimeError: another run, of this or of another process, has it open.
    """
    path.mkdir(parents=True, exist_ok=True)
    with lock_directory(path, "run", needed=False):
        for left in path.glob(f"*{TEMPORARY}"):
            left.unlink(missing_ok=True)
        yield


def write_json(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write a report as JSON, atomically, and return its path."""
    return write_text(path, json.dumps(report, indent=1) + "\n")


def append_json_line(path: Path, line: Mapping[str, float | int]) -> None:
    """Add one line of JSON to a file, which is made if need be; a full disk gets all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = (json.dumps(line) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


def trim_json_lines(path: Path, last_step: int | None = None, key: str = "step") -> None:
    """Drop a last line that was cut in the middle, and lines whose ``key`` is beyond ``last_step``.

    Args:
        path: the file; nothing happens where there is none.
        last_step: ``None``: every whole line is kept.
        key: of a line's number.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if last_step is not None:
        kept = [line for line in kept if json.loads(line)[key] <= last_step]
    write_text(path, "".join(kept))


def check_directory(path: Path) -> Path:
    """Check that a directory can be written to, or made; return it.

    Raises:
        NotADirectoryError: the path, or what lies above it, is a file.
        PermissionError: it cannot be written to.
    """
    above = path.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(
            f"{path}: expected a directory to write to, got the file {above}; name another"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{path}: expected a directory that can be written to, got none in {above}; name another"
        )
    return path


def check_output(path: Path, suffixes: Sequence[str] = ()) -> Path:
    """Check that a file can be written, before the work whose result it is to hold; return its path.

    Args:
        path: of the file; one that exists is replaced.
        suffixes: which the path may end in; any by default.

    Raises:
        IsADirectoryError: the path is a directory.
        OSError: as for :func:`check_directory`.
        ValueError: it ends in something else.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a directory; name a file in it")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(suffixes)}; name another")
    check_directory(path.parent)
    return path


def check_whole(path: Path) -> None:
    """Check that there is a file with something in it that is not git's stand-in for a large one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a directory, empty, or a stand-in.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file, got none; is the path right?")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got a directory; name the file in it")
    with path.open("rb") as file:
        head = file.read(len(LFS))
    if not head:
        raise ValueError(f"{path}: expected a whole file, got an empty one; make or download it again")
    if head == LFS:
        raise ValueError(
            f"{path}: expected a whole file, got a pointer of git LFS; run git lfs pull where it comes from"
        )


def read_json(path: Path) -> Any:
    """Read a whole file as JSON.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON.
    """
    check_whole(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error}); write it again") from None


def check_npz(path: Path, columns: Sequence[str]) -> None:
    """Check that a file holds columns of numbers with as many rows each.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no whole .npz file, or a column is missing, empty, no array of numbers, or shorter.
    """
    check_whole(path)
    try:
        with np.load(path) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            names = file.files
            found = {name: file[name] for name in columns if name in names}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole .npz file of numbers, got something else ({error}); make or download "
            "it again"
        ) from None
    if missing := [name for name in columns if name not in found]:
        raise ValueError(
            f"{path}: expected columns {', '.join(columns)}, got no {', '.join(missing)} among "
            f"{', '.join(names) or 'none at all'}; make or download a data set of this task"
        )
    rows = {name: len(column) if column.ndim else 0 for name, column in found.items()}
    if len(set(rows.values())) > 1 or not all(rows.values()):
        raise ValueError(
            f"{path}: expected as many rows in each column, at least one, got {rows}; mend the file"
        )
    if strange := [name for name, column in found.items() if column.dtype.kind not in "biuf"]:
        raise ValueError(
            f"{path}: expected numbers, got {found[strange[0]].dtype} in {strange[0]}; mend the file"
        )

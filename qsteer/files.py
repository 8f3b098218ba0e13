"""Small files that are never found half-written: JSON reports, and metrics as lines of JSON."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file, atomically: a temporary file beside it, then a rename. Return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path


def write_json(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write a report as JSON, atomically, and return its path."""
    return write_text(path, json.dumps(report, indent=1) + "\n")


def append_json_line(path: Path, line: Mapping[str, float | int]) -> None:
    """Add one line of JSON to a file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def trim_json_lines(path: Path, last_step: int | None = None) -> None:
    """Drop a last line that was cut in the middle, and lines whose ``"step"`` is beyond ``last_step``.

    Args:
        path: the file; nothing happens where there is none.
        last_step: ``None``: every whole line is kept.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if last_step is not None:
        kept = [line for line in kept if json.loads(line)["step"] <= last_step]
    write_text(path, "".join(kept))

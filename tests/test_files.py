"""Reports and metrics are never found half-written."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsteer.files import (
    append_json_line,
    mend_directory,
    replacing_directory,
    trim_json_lines,
    write_json,
    write_text,
)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = write_json({"a": 1}, tmp_path / "new" / "report.json")
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}


def test_lines_are_added_and_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    trim_json_lines(path, 3)
    assert not path.exists()
    for step in (2, 4, 6):
        append_json_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    trim_json_lines(path)
    assert [json.loads(line)["step"] for line in path.open()] == [2, 4, 6]
    trim_json_lines(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_disk_that_fills_up_gets_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 2})
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, former[1]))  # the next line fits in part
    try:
        with pytest.raises(OSError):
            append_json_line(path, {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    append_json_line(path, {"step": 6})
    assert path.read_text() == '{"step": 2}\n{"step": 6}\n'


def fill(path: Path, text: str) -> None:
    with replacing_directory(path) as fresh:
        for name in ("config.json", "model.safetensors"):
            (fresh / name).write_text(text)


def texts(path: Path) -> list[str]:
    return [(path / name).read_text() for name in ("config.json", "model.safetensors")]


def test_a_directory_is_whole_wherever_its_replacement_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill would leave, before each call to the file system, is mended to the old or the new whole."""
    path = tmp_path / "run" / "last"
    fill(path, "old")
    seen = tmp_path / "seen"
    copying = False

    def watch(module: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(module, name)

        def copy_first(*args: Any, **options: Any) -> Any:
            nonlocal copying
            if not copying:
                copying = True
                shutil.copytree(path.parent, seen / str(len(list(seen.glob("*")))))
                copying = False
            return call(*args, **options)

        monkeypatch.setattr(module, name, copy_first)

    seen.mkdir()
    for name in ("mkdir", "open", "fsync", "replace", "unlink", "rmdir"):
        watch(os, name)
    fill(path, "new")
    monkeypatch.undo()
    found = []
    for k in range(len(list(seen.glob("*")))):
        left = seen / str(k) / "last"
        torn = not left.exists()
        mend_directory(left)
        mend_directory(left)
        assert os.listdir(left.parent) == ["last"]
        assert texts(left) in (["old"] * 2, ["new"] * 2)
        found.append((torn, texts(left)[0]))
    assert found == sorted(found, key=lambda item: item[1] == "new"), "from some moment on it is the new one"
    assert {(False, "old"), (True, "new"), (False, "new")} == set(found), "every kind of moment was met"


def test_a_directory_whose_replacement_fails_is_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last"
    fill(path, "old")
    with pytest.raises(UnicodeEncodeError):
        fill(path, "\ud800")
    assert texts(path) == ["old"] * 2 and os.listdir(tmp_path) == ["last"]

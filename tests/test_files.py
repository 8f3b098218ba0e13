"""Reports and metrics are never found half-written."""

import json
from pathlib import Path

import pytest

from qsteer.files import append_json_line, trim_json_lines, write_json, write_text


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

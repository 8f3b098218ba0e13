"""The rooms of the house: imports only point down, and no file is too long to be read at a sitting."""

import ast
from itertools import chain
from pathlib import Path

import pytest

import qsteer

ROOT = Path(qsteer.__file__).parent
ORDER = (
    ("clock", "randomness"),
    ("types",),
    ("plotting", "statistics", "files", "fingerprints", "checks"),
    ("hub", "flow", "contract"),
    ("chunking", "renoising"),
    ("trace",),
    ("compiling",),
    ("critics",),
    ("maps",),
    ("rules",),
    ("samplers",),
    ("particles",),
    ("sampling",),
    ("hosts",),
    ("adapters",),
    ("steering",),
    ("policies",),
    ("data",),
    ("auditing",),
    ("training",),
    ("envs",),
    ("online",),
    ("testing",),
    ("bench",),
    ("evaluation",),
    ("experiments",),
    ("serving", "client"),
    ("cli",),
)
"""A room may use those above it, and itself."""
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(
    path
    for folder in (ROOT, *(ROOT / name for name in ("adapters", "critics")))
    for path in folder.rglob("*.py")
    if "lerobot_policy_qsteer" not in path.parts  # a distribution of its own
)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            parts = name.split(".")
            if parts[0] == "qsteer" and len(parts) > 1:
                found.add(parts[1])
            elif name == "qsteer" and isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names if alias.name in RANK}
    return found


def test_every_room_has_its_place():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(chain(*ORDER))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_point_down(path):
    room = room_of(path)
    if room != "__init__":
        above = {other for other in imported(path) - {room} if RANK[other] >= RANK[room]}
        assert not above, f"{path.name} in {room} imports {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_450_lines(path):
    assert len(path.read_text().splitlines()) <= 450

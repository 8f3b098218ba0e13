"""``--compile`` reaches the settings of a training command."""

from pathlib import Path
from typing import Any

import pytest

from qsteer import training
from qsteer.cli import main
from qsteer.data import Episodes


@pytest.mark.parametrize("what", ["policy", "critic"])
@pytest.mark.parametrize("options", [(), ("--compile",)])
def test_updates_are_compiled_if_asked_for(
    what: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ogbench")
    seen: list[Any] = []
    monkeypatch.setattr("qsteer.envs.ogbench.load", lambda *_: (None, None))
    monkeypatch.setattr(Episodes, "from_ogbench", lambda data: data)
    monkeypatch.setattr(training, f"train_{what}", lambda data, out, given, device: seen.append(given))
    main([f"train-{what}", *options, "--out", str(tmp_path / "run")])
    assert [given.compile for given in seen] == [bool(options)]

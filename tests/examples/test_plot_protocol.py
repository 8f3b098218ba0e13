"""The protocol's table and picture, of made-up results."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import plot_protocol


def result(domain: str, alpha: float, online: list[float]) -> dict[str, object]:
    curve = [[None, *[rate] * 9] for rate in online]
    arms = [
        {"spec": "base", "kind": "base", "offline": [0.1, 0.1]},
        {
            "spec": f"tweedie={alpha}",
            "kind": "steered",
            "offline": [0.2, 0.4],
            "online": online,
            "curve": curve,
        },
        {"spec": f"random-direction={alpha}", "kind": "control", "offline": [0.0, 0.1]},
    ]
    return {"domain": domain, "task": 2, "size": {"online_steps": 1000}, "seeds": [0, 1], "arms": arms}


def test_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    paths = []
    for domain, alpha, online in ("cube-single", 0.2, [0.6, 0.8]), ("cube-double", 0.3, [0.4, 0.4]):
        paths.append(str(tmp_path / f"{domain}.json"))
        Path(paths[-1]).write_text(json.dumps(result(domain, alpha, online)))
    picture = tmp_path / "protocol.png"
    monkeypatch.setattr(sys, "argv", ["plot_protocol.py", *paths, "--plot", str(picture)])
    plot_protocol.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| domain, task | base | tweedie | random-direction |"
    assert lines[2] == "| cube-single, 2 | 10 % | 30 → 70 % | 5 % |"
    assert lines[3] == "| cube-double, 2 | 10 % | 30 → 40 % | 5 % |"
    assert lines[4] == "| IQM, 95 % | 10 (10 to 10) | 30 (20 to 40) → 50 (50 to 60) | 5 (0 to 10) |"
    assert picture.stat().st_size > 10_000

"""The replay that an online critic learns from has the layout of what it sees."""

import json
from dataclasses import replace
from pathlib import Path

from online_runs import TRAINING, run


def test_the_replay_has_the_layout_of_the_critic(tmp_path: Path) -> None:
    run(tmp_path, replace(TRAINING, env_steps=48, warmup=20, evaluate_every=0))
    layout = json.loads((tmp_path / "replay" / "layout.json").read_text())
    assert (layout["lanes"], layout["horizon"], layout["steps"], layout["observations"]) == (4, 1, 1, 2)

"""A critic that learns online by compiled updates, and a map that is adapted by them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eager_lines import uncompiled
from online_runs import TRAINING, run
from test_fmq import OFFLINE, critic, data, flow_map, policy

from qsteer.online.fmq import adapt

SHORT = replace(TRAINING, env_steps=160, warmup=100, evaluate_every=0, log_every=40)


def test_a_critic_learns_online_by_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = run(tmp_path / "eager", SHORT, seeds=2)
    lines = uncompiled(monkeypatch)
    compiling = replace(SHORT, critic=replace(SHORT.critic, compile=True))
    found = run(tmp_path / "line", compiling, seeds=2)
    assert len(lines) == 1
    for a, b in zip(found.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"training.critic.compile=None.*training.critic.compile=True"):
        run(tmp_path / "line", SHORT, seeds=2)


def test_a_map_is_adapted_by_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = flow_map(hidden=(8,)), critic(), policy()
    eager, _ = adapt(*networks, data(), tmp_path / "eager", OFFLINE, progress=False)
    lines = uncompiled(monkeypatch)
    settings = replace(OFFLINE, compile=True)
    found, _ = adapt(*networks, data(), tmp_path / "line", settings, progress=False)
    assert len(lines) == 1
    for a, b in zip(found.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

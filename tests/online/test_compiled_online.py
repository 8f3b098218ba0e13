"""A critic that learns online by compiled updates, and a map that is adapted by them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bandit import ThreeSteps
from eager_lines import uncompiled
from online_runs import RULE, TRAINING, parts, policy, run
from test_fmq import OFFLINE, critic, data, flow_map
from test_fmq import policy as base

from qsteer.compiling.kept import KEPT
from qsteer.online.actors import StateActor
from qsteer.online.fmq import adapt
from qsteer.online.run import train_online

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


@pytest.mark.parametrize("seeds", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_actor_on_buffers_is_asked_for_all_environments(tmp_path: Path, seeds: int) -> None:
    """One kind of action, before the critic steers, and one after."""
    training = replace(SHORT, critic=replace(SHORT.critic, seed=0))
    _, live = parts(seeds, training.critic)
    actor = StateActor([policy()], live, compile="static")
    train_online(ThreeSteps, actor, live, tmp_path, training, rule=RULE, progress=False)
    assert actor.fast is not None
    assert len(actor.fast.states) <= KEPT
    eager = parts(seeds, training.critic)
    with pytest.raises(ValueError, match=r"actor=None.*actor='static'"):
        train_online(ThreeSteps, *eager, tmp_path, training, rule=RULE, progress=False)
    rows = {run.kind.inputs[2].shape[0] for run in actor.fast.kept.runs}
    assert rows == {seeds * training.num_envs}


def test_a_map_is_adapted_by_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = flow_map(hidden=(8,)), critic(), base()
    eager, _ = adapt(*networks, data(), tmp_path / "eager", OFFLINE, progress=False)
    lines = uncompiled(monkeypatch)
    settings = replace(OFFLINE, compile=True)
    found, _ = adapt(*networks, data(), tmp_path / "line", settings, progress=False)
    assert len(lines) == 1
    for a, b in zip(found.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

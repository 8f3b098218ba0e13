"""What sensors and simulators do wrong is left out, counted and said, and the run goes on."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bandit import Bandit, Blind, Dead, Faulty
from online_runs import TRAINING, metrics, run

from qsteer.online.actors import Decision
from qsteer.online.collect import Collector

SHORT = replace(TRAINING, env_steps=240, warmup=40, evaluate_every=0)


def test_what_is_not_finite_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learnt = run(tmp_path, SHORT, make_env=Faulty)
    lines = metrics(tmp_path)
    assert lines[-1]["env_steps"] == 240 and lines[-1]["step"] == 240
    assert lines[-1]["refused"] > 20 and lines[-1]["trips"] == 0 and lines[-1]["steered"] == 1
    assert [line["refused"] for line in lines] == sorted(line["refused"] for line in lines)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert all(tensor.isfinite().all() for tensor in learnt.state_dict().values())
    texts = {re.sub(r"\d+", "N", str(w.message).split(",")[0]) for w in said}
    names = ("reward", "observation", "first observation")
    assert {f"environment N: expected a finite {name}" for name in names} <= texts
    stored = np.load(tmp_path / "replay" / "observations.npy"), np.load(tmp_path / "replay" / "rewards.npy")
    assert all(np.isfinite(column).all() for column in stored)


def test_the_metrics_of_a_healthy_run_say_that_nothing_was_refused(tmp_path: Path) -> None:
    run(tmp_path, replace(SHORT, env_steps=48))
    assert all(line["refused"] == 0 for line in metrics(tmp_path))


@pytest.mark.filterwarnings("ignore:environment")
@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Dead, "expected finite rewards and observations, got none in 5 rounds in a row"),
        (Blind, "environment 0: expected a finite observation after a reset, got NaN or infinity 5 times"),
    ],
)
def test_where_nothing_is_finite_the_run_stops(tmp_path: Path, env: type, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, SHORT, make_env=env)


def test_actions_that_are_not_finite_are_not_sent() -> None:
    with Collector(Bandit, horizon=1, num_envs=1) as collector:
        nan = torch.full((1, 1, 1), torch.nan)
        with pytest.raises(ValueError, match="act: expected finite actions"):
            collector.send(lambda obs, lanes: Decision(nan, nan, obs), torch.Generator())

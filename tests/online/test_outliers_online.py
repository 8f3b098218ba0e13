"""A few rewards of -1e6 from a bad sensor: refused, listed, and the run ends steering well."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bandit import Spiked
from online_runs import TRAINING, metrics, offline, run

from qsteer.data import Chunks
from qsteer.data.outliers import RewardScale

LONG = replace(
    TRAINING, env_steps=1440, num_envs=12, warmup=480, updates_per_step=0.3, evaluate_every=0, log_every=72
)


@pytest.mark.filterwarnings("ignore:environment")
def test_a_run_with_outliers_ends_steering_well(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path, LONG, make_env=Spiked)
    lines = metrics(tmp_path)
    assert lines[-1]["steered"] == 1 and lines[-1]["trips"] == 0
    assert max(line["loss"] for line in lines if "loss" in line) < 100
    assert lines[-1]["return"] > np.mean([line["return"] for line in lines if line["env_steps"] <= 480]) + 0.5
    listed = [json.loads(line) for line in (tmp_path / "outliers.jsonl").open()]
    assert {line["reward"] for line in listed} == {-1e6} and all(line["limit"] < 1e6 for line in listed)
    late = [line for line in listed if "episode" in line]
    assert late and all(1 <= line["length"] <= 3 and line["episode"] > 0 for line in late)
    early = [line for line in listed if "row" in line]
    assert early and "it is taken out" in "".join(capsys.readouterr())
    assert lines[-1]["refused"] == len(late)


def test_where_it_is_turned_off_they_are_learnt_from(tmp_path: Path) -> None:
    run(tmp_path, replace(LONG, env_steps=640, refuse_outliers=False), make_env=Spiked)
    lines = metrics(tmp_path)
    assert not (tmp_path / "outliers.jsonl").exists() and lines[-1]["refused"] == 0
    assert lines[-1]["trips"] > 0  # the health still tells


def test_outliers_in_offline_data_are_refused_by_row(tmp_path: Path) -> None:
    data = offline()
    many = {n: torch.cat([getattr(data, n)] * 10) for n in vars(data)}
    many["rewards"][[70, 90]] = -1e6
    chunks = Chunks(type(data)(**many), 1, 0.9, "next_actions")
    with pytest.raises(
        ValueError, match=r"offline: .* got -1e\+06 in row 70 \(first of 2 such rows of 300\); drop"
    ):
        run(tmp_path, LONG, offline=chunks)


@pytest.mark.parametrize(
    ("step", "rare"), [(0.0, 1.0), (-1.0, 0.0), (-1.0, 1000.0), (-0.001, 1.0), (1.0, -1e3)]
)
def test_rare_successes_are_not_refused(step: float, rare: float) -> None:
    scale = RewardScale()
    for _ in range(50):
        scale.observe(torch.full((200,), step))
        assert not scale.sift(torch.tensor([rare, step])).any()


def test_what_is_suspected_and_let_in_is_counted_once() -> None:
    scale = RewardScale()
    scale.observe(torch.full((16,), -1.0))
    early = torch.tensor([-1e6, -1e6, -1.0, -1e6])
    assert not scale.sift(early).any(), "three of nineteen are no exception"
    scale.observe(early)
    scale.observe(torch.full((380,), -1.0))
    assert scale.find(early).tolist() == [True, True, False, True], "three of four hundred are"


def test_a_thing_that_keeps_coming_is_none() -> None:
    scale = RewardScale()
    scale.observe(torch.full((1000,), -1.0))
    refused = []
    for _ in range(30):
        refused.append(bool(scale.sift(torch.tensor([1e6]))[0]))
        if not refused[-1]:  # then it is stored, and taken in with the others
            scale.observe(torch.tensor([1e6]))
    assert refused == [True] * refused.index(False) + [False] * (30 - refused.index(False))
    assert 8 <= refused.index(False) <= 12
    assert not scale.find(torch.tensor([torch.nan, torch.inf, -1.0])).any()
    assert scale.outliers == 0 and scale.usual == (-1.0, 1e6)

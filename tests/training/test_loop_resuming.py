"""Runs that are interrupted resume to the bit; finished, foreign and broken ones are told apart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from play_data import episodes
from safetensors.torch import load_file
from training_runs import CRITIC, POLICY, killed_after, train

from qsteer.training import train_critic, train_policy
from qsteer.training.critic import LEARNERS


@pytest.mark.parametrize("what", ["policy", *LEARNERS])
@pytest.mark.parametrize("calls", [3, 9])  # before the first checkpoint, and past metrics after it
def test_a_killed_run_resumes_to_the_bit(
    what: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = episodes()
    train(what, data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(calls, patch, what)
        train(what, data, tmp_path / "parts")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # cut in the middle of a line
    torch.manual_seed(1234)  # the global generator has no say
    train(what, data, tmp_path / "parts")
    for name in ("model.safetensors", "metrics.jsonl", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    parts, whole = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in parts)  # optimiser and generator too
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").open()]
    assert steps == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("what", ["policy", "iql"])
def test_a_finished_run_is_returned_without_training(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(what, episodes(), tmp_path)
    killed_after(0, monkeypatch, what)
    again = train(what, episodes(), tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_seed_decides(tmp_path: Path) -> None:
    data = episodes()
    weights = [
        train_policy(data, tmp_path / str(i), replace(POLICY, seed=seed), progress=False).first.weight
        for i, seed in enumerate((0, 1))
    ]
    assert not torch.equal(*weights)
    state = torch.get_rng_state()
    train_policy(data, tmp_path / "2", POLICY, progress=False)
    assert torch.equal(state, torch.get_rng_state())


def test_another_configuration_or_other_data_is_refused(tmp_path: Path) -> None:
    data = episodes()
    train_critic(data, tmp_path, CRITIC, progress=False)
    with pytest.raises(ValueError, match=r"hidden=\[4\].*hidden=\[8\].*another directory"):
        train_critic(data, tmp_path, replace(CRITIC, hidden=(4,)), progress=False)
    with pytest.raises(ValueError, match="data="):
        train_critic(episodes(1), tmp_path, CRITIC, progress=False)


def test_a_crash_while_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = episodes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(5, patch, "policy")
        train("policy", data, tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(before[:100])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("qsteer.training.checkpoints.save_file", half)
        train("policy", data, tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    train("policy", data, tmp_path)


@pytest.mark.gpu
def test_training_on_the_gpu_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = episodes()
    whole = train_critic(data, tmp_path / "whole", CRITIC, device="cuda", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(9, patch, "iql")
        train_critic(data, tmp_path / "parts", CRITIC, device="cuda", progress=False)
    parts = train_critic(data, tmp_path / "parts", CRITIC, device="cuda", progress=False)
    assert torch.equal(whole.net.first.weight, parts.net.first.weight)

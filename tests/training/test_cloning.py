"""Cloning in memory: the batches of lerobot's own loader, the policy's own loss, a run that can be killed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lerobot.datasets")
pytest.importorskip("datasets")

from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from reach_runs import folder
from torch.utils.data import default_collate

from qsteer.data.lerobot import open_dataset, open_policy
from qsteer.testing.reach import ReachConfig
from qsteer.testing.reach.modeling_reach import ReachPolicy
from qsteer.training.cloning import CloningTraining, Frames, clone

KEYS = ["observation.state", "observation.image"]
SHORT = CloningTraining(steps=6, batch_size=8, log_every=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def dataset() -> Any:
    return open_dataset(folder(True) / "dataset")


def fresh(dataset: Any) -> tuple[Any, tuple[Any, Any]]:
    torch.manual_seed(0)
    config = ReachConfig(device="cpu", width=32)
    return ReachPolicy(config), make_pre_post_processors(config, dataset_stats=dataset.meta.stats)


def test_a_batch_is_lerobots_own(dataset: Any) -> None:
    length, starts = 6, torch.tensor([0, 3, 17, len(dataset) - 2])
    times = {"action": [i / dataset.fps for i in range(length)]}
    theirs = LeRobotDataset(dataset.repo_id, root=dataset.root, delta_timestamps=times)
    expected = default_collate([theirs[i] for i in starts.tolist()])
    found = Frames.read(dataset, KEYS).batch(starts, length)
    for key in (*KEYS, "action", "action_is_pad"):
        assert torch.equal(found[key], expected[key]), key
    assert found["action_is_pad"].any() and found["observation.image"].max() <= 1
    assert found["task"] == expected["task"] and len(set(found["task"])) == 2


def test_the_loss_falls_and_lerobot_reads_the_result(dataset: Any, tmp_path: Path) -> None:
    policy, processors = fresh(dataset)
    before = [p.detach().clone() for p in policy.parameters()]
    training = replace(SHORT, steps=150, batch_size=64, warmup=1, learning_rate=3e-3)
    clone(dataset, policy, processors, tmp_path, training, progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True) if a.ndim > 1)
    read, preprocessor, _ = open_policy(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), policy.parameters(), strict=True))
    losses = []
    frames = Frames.read(dataset, KEYS, progress=False)
    batch = preprocessor(frames.batch(torch.arange(128), policy.config.chunk_size))
    for learnt in (read, fresh(dataset)[0]):
        torch.manual_seed(1)
        losses.append(learnt(batch)[1]["loss"])
    assert losses[0] < 0.8 * losses[1]


def test_an_interrupted_run_goes_on_to_the_same_weights(dataset: Any, tmp_path: Path) -> None:
    whole, processors = fresh(dataset)
    clone(dataset, whole, processors, tmp_path / "whole", SHORT, progress=False)

    class KilledError(Exception):
        pass

    cut, _ = fresh(dataset)
    steps, forward = 0, cut.forward

    def dies(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KilledError
        return forward(batch)

    cut.forward = dies
    with pytest.raises(KilledError):
        clone(dataset, cut, processors, tmp_path / "cut", SHORT, progress=False)
    again, _ = fresh(dataset)
    clone(dataset, again, processors, tmp_path / "cut", SHORT, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_another_run_in_the_same_folder_is_refused(dataset: Any, tmp_path: Path) -> None:
    clone(dataset, *fresh(dataset), tmp_path, SHORT, progress=False)
    with pytest.raises(ValueError, match="learning_rate"):
        clone(dataset, *fresh(dataset), tmp_path, replace(SHORT, learning_rate=1e-3), progress=False)


def test_a_column_that_is_not_there_is_named(dataset: Any) -> None:
    with pytest.raises(KeyError, match=r"no \['observation.wrist'\] among"):
        Frames.read(dataset, ["observation.wrist"])


def test_half_precision_trains_whole_weights(dataset: Any, tmp_path: Path) -> None:
    policy, processors = fresh(dataset)
    clone(dataset, policy, processors, tmp_path, replace(SHORT, half=True), progress=False)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    other, _ = fresh(dataset)
    clone(dataset, other, processors, tmp_path / "whole", SHORT, progress=False)
    pairs = [(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True) if a.ndim > 1]
    assert all(not torch.equal(a, b) and torch.allclose(a, b, atol=2e-2) for a, b in pairs)

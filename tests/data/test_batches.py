"""Stored batches: rows in order, padding, and the frames of a LeRobotDataset."""

import importlib.util
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from host_batches import H
from safetensors.torch import save_file

from qsteer.training import (
    SafetensorsBatches,
    lerobot_batches,
    record,
)


def test_stored_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    values = torch.arange(10.0).view(5, 2)
    record([{"a": values[:2], "task": ["x", "y"]}, {"a": values[2:]}], tmp_path)
    stored = SafetensorsBatches(tmp_path)
    assert len(stored) == 5
    order = [4, 0, 2, 1, 2, 3]
    rows = stored.rows(order)
    assert rows.keys() == {"a"} and torch.equal(rows["a"], values[order])


def test_tokens_of_different_length_are_padded_behind_their_mask(tmp_path: Path) -> None:
    for length in 2, 4:
        tokens, mask = torch.full((1, length), length), torch.ones(1, length, dtype=torch.bool)
        record([{"tokens": tokens, "mask": mask, "s": torch.zeros(1, 3)}], tmp_path / str(length))
        (tmp_path / str(length) / "000000.safetensors").rename(tmp_path / f"{length}.safetensors")
    rows = SafetensorsBatches(tmp_path).rows([0, 1])
    assert rows["tokens"].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4]]
    assert rows["mask"].dtype == torch.bool and rows["mask"].sum(1).tolist() == [2, 4]
    assert rows["s"].shape == (2, 3)


def test_impossible_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected \*\.safetensors files.*record"):
        SafetensorsBatches(tmp_path)
    save_file({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="same number of rows under every key"):
        SafetensorsBatches(tmp_path)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("datasets", "av")), reason="needs lerobot[dataset]"
)
def test_a_lerobot_dataset_gives_action_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.datasets import LeRobotDataset
    from lerobot.policies import factory

    policy = hosts.shared("smolvla")
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (3,), "names": None},
    }
    dataset = LeRobotDataset.create(
        "me/tiny", fps=10, features=features, root=tmp_path / "d", use_videos=False
    )
    for episode in range(2):
        for i in range(8):
            step = 10.0 * episode + i
            dataset.add_frame(
                {"observation.state": torch.full((4,), step).numpy()}
                | {"action": torch.full((3,), step).numpy(), "task": "push"}
            )
        dataset.save_episode()
    dataset.finalize()
    seen: list[Any] = []
    monkeypatch.setattr(
        factory, "make_pre_post_processors", lambda *a, **k: seen.append((a, k)) or (lambda b: b, None)
    )
    batches = lerobot_batches(policy, "me/tiny", root=tmp_path / "d")
    assert len(batches) == 16 and seen[0][1]["dataset_stats"].keys() >= {"action", "observation.state"}
    rows = batches.rows([3, 12])
    assert rows["action"].shape == (2, H, 3) and rows["task"] == ["push"] * 2
    assert rows["action"][:, :, 0].tolist() == [[3, 4, 5, 6, 7, 7], [14, 15, 16, 17, 17, 17]]

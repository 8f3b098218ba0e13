"""Pretrained teachers: the actions that they give, shares of a batch, and fingerprints."""

from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from host_batches import A, H, batch
from torch import nn

from qsteer.training import (
    DatasetBatches,
    HostTeacher,
    SafetensorsBatches,
    record,
)
from qsteer.training.loop import Share


def test_the_policys_own_actions_are_what_it_would_do(name: str, stored: SafetensorsBatches) -> None:
    policy = hosts.shared(name)
    _, x1 = HostTeacher(policy, stored).batch(3, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(6, (3,), generator=generator).tolist()
    noise = torch.randn(3, H, A, generator=generator)
    torch.testing.assert_close(policy.predict_action_chunk(stored.rows(rows), noise=noise), x1[..., :3])


def test_stored_actions_are_padded_as_the_host_does_it(name: str, stored: SafetensorsBatches) -> None:
    policy = hosts.shared(name)
    _, x1 = HostTeacher(policy, stored, "data").batch(3, torch.Generator().manual_seed(4))
    rows = torch.randint(6, (3,), generator=torch.Generator().manual_seed(4)).tolist()
    assert torch.equal(x1[..., :3], stored.rows(rows)["action"])
    assert x1.shape == (3, H, A) and not x1[..., 3:].any()


@pytest.mark.parametrize("actions", ["policy", "data"])
def test_a_share_is_the_whole_batchs_rows(name: str, stored: SafetensorsBatches, actions: Any) -> None:
    teacher = HostTeacher(hosts.shared(name), stored, actions)
    field, x1 = teacher.batch(4, torch.Generator().manual_seed(4))
    parts = [teacher.batch(4, torch.Generator().manual_seed(4), Share(i, 2)) for i in range(2)]
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x1)
    x, t = torch.randn(4, H, A), torch.full((4,), 0.3)
    v = torch.cat([part[0](x[2 * i : 2 * i + 2], t[:2]) for i, part in enumerate(parts)])
    torch.testing.assert_close(v, field(x, t))


def test_other_data_other_weights_and_other_actions_have_other_fingerprints(
    name: str, stored: SafetensorsBatches, tmp_path: Path
) -> None:
    policy = hosts.shared(name)
    first = HostTeacher(policy, stored).fingerprint()
    assert HostTeacher(policy, SafetensorsBatches(stored.paths[0].parent)).fingerprint() == first
    record([batch(policy, 3, 7)], tmp_path / "other")
    others = {
        HostTeacher(policy, stored, "data").fingerprint(),
        HostTeacher(policy, SafetensorsBatches(tmp_path / "other")).fingerprint(),
        HostTeacher(hosts.build(name, seed=1), stored).fingerprint(),
    }
    assert len(others | {first}) == 4


def test_a_teacher_without_actions_to_take_says_so(name: str, tmp_path: Path) -> None:
    policy = hosts.shared(name)
    record([hosts.observe(policy, 2)], tmp_path / "observations")
    teacher = HostTeacher(policy, SafetensorsBatches(tmp_path / "observations"), "data")
    with pytest.raises(KeyError, match=r"expected the key 'action'.*actions='policy'"):
        teacher.batch(2, torch.Generator())


class Frames:
    """A dataset as lerobot's: frames by number, the prompt a string."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy, self.whole = policy, batch(policy, 5, 0)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {key: value[i] for key, value in self.whole.items()}


def test_a_dataset_goes_through_the_policys_preprocessor(name: str) -> None:
    policy = hosts.shared(name)

    def preprocessor(frames: dict[str, Any]) -> dict[str, Any]:
        assert frames["task"] == ["put it there"] * len(frames["action"])
        return frames | {"action": frames["action"] / 2}

    frames = Frames(policy)
    teacher = HostTeacher(policy, DatasetBatches(frames, preprocessor, "me/frames@v1"), "data")
    _, x1 = teacher.batch(3, torch.Generator().manual_seed(4))
    rows = torch.randint(5, (3,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(x1[..., :3], frames.whole["action"][rows] / 2)

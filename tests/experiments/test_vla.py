"""The committed SmolVLA: lerobot loads it, its critic fits and steers it; with MetaWorld, the demo."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lerobot.datasets")

import qsteer
from qsteer.cli.demo import VLA_TASKS
from qsteer.critics import Critic
from qsteer.data.lerobot import open_policy
from qsteer.evaluation import compare, video
from qsteer.experiments import vla

ROOT = Path(__file__).parents[2]
SOURCE = Path("examples/checkpoints/metaworld")
INSTRUCTIONS = ("Push the puck to a goal", "Pick and place a puck to a goal", "Open a drawer")


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Critic]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # its parts name each other from there
        policy, before, _ = open_policy(SOURCE / "policy")
        return policy, before, Critic.from_pretrained(SOURCE / "critic").requires_grad_(False).eval()


def seen(before: Any, instruction: str, rows: int = 8) -> Any:
    """States at the beginning of episodes: hand, open gripper, object, goal, in metres."""
    draw = torch.Generator().manual_seed(0)
    state = torch.tensor([0.0, 0.6, 0.2, 1.0, 0.0, 0.62, 0.02, 0.05, 0.85, 0.02]).repeat(rows, 1)
    state[:, [4, 5, 7, 8]] += 0.05 * (2 * torch.rand(rows, 4, generator=draw) - 1)
    pictures = torch.zeros(rows, 3, 32, 32)
    given = {"observation.state": state, "observation.image": pictures, "task": [instruction] * rows}
    return before(given)


def test_the_lists_are_the_same() -> None:
    assert VLA_TASKS == vla.TASKS


def test_it_does_what_it_is_told(trained: Any) -> None:
    """The same states under other instructions: other chunks, and for the drawer another way to go."""
    policy, before, _ = trained
    noise = torch.randn(8, 10, 4, generator=torch.Generator().manual_seed(1))
    push, place, drawer = (policy.predict_action_chunk(seen(before, i), noise) for i in INSTRUCTIONS)
    assert (push - drawer).abs().mean() > (push - place).abs().mean() > 0.1


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize("spec", vla.ARMS[1:4])
def test_every_arm_of_the_demo_finds_a_higher_value(spec: str, instruction: str, trained: Any) -> None:
    from qsteer.evaluation.arms import parse

    policy, before, critic = trained
    batch = seen(before, instruction)
    noise = torch.randn(8, 10, 4, generator=torch.Generator().manual_seed(2))
    value = qsteer.open_action(policy, batch, critic).value
    base = policy.predict_action_chunk(batch, noise)
    arm = parse(spec, clip=None)
    with qsteer.steer(policy, critic, arm.rule, sampler=arm.sampler):
        steered = policy.predict_action_chunk(batch, noise)
    assert torch.equal(policy.predict_action_chunk(batch, noise), base)
    gain = value(steered[:, :5]) - value(base[:, :5])
    assert gain.mean() > 0.1 and (gain >= 0).double().mean() >= 0.75


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}, got none: run it in a checkout"):
        vla.demo_vla(source=tmp_path)


@pytest.mark.skipif(find_spec("metaworld") is None, reason="needs the extra metaworld")
def test_the_demo_of_a_checkout_on_a_vla(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(video, "find_gl_backend", lambda: None)
    monkeypatch.setattr(compare, "ROUNDS", 1)
    vla.demo_vla("drawer-open-v3", out=tmp_path, episodes=2, num_envs=1)
    report = json.loads((tmp_path / "results.json").read_text())
    assert [arm["spec"] for arm in report["arms"]] == list(vla.ARMS)
    assert report["task"] == "MetaWorld drawer-open-v3"
    assert (tmp_path / "success.png").stat().st_size > 10_000
    assert "apt-get install" in capsys.readouterr().out

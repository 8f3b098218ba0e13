"""lerobot's own commands with the plugin: evaluation before and after, processors, asynchronous inference."""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lerobot_policy_qsteer")
pytest.importorskip("datasets")

from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot_policy_qsteer import QSteerConfig
from lerobot_policy_qsteer.modeling_qsteer import QSteerPolicy
from reach_runs import folder, opened

import qsteer
from qsteer.critics import Critic, CriticConfig
from qsteer.testing import checkpoints

STEPS = 200
"""Of cloning: some episodes succeed."""


@pytest.fixture(scope="module")
def critic() -> Critic:
    torch.manual_seed(0)
    return Critic(CriticConfig(2, action_dim=2, horizon=4, hidden=(16,)))


@pytest.fixture(scope="module")
def saved(critic: Critic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A steering of the cloned policy, and its critic beside it."""
    path = tmp_path_factory.mktemp("qsteer")
    policy = opened(steps=STEPS)[1]
    critic.save_pretrained(path / "critic")
    with qsteer.steer(policy, critic, qsteer.Tweedie(0.5)) as handle:
        return handle.save_pretrained(path / "saved")


REACH = ("--env.type=reach", "--env.discover_packages_path=qsteer.testing.reach")


def evaluate(out: Path, *options: str, env: tuple[str, ...] = REACH, episodes: int = 8) -> dict[str, Any]:
    """Run ``lerobot-eval`` as its command does, and return what it wrote."""
    from lerobot.scripts.lerobot_eval import main

    common = (
        *env,
        f"--eval.n_episodes={episodes}",
        f"--eval.batch_size={min(episodes, 4)}",
        "--policy.device=cpu",
        "--seed=3",
        f"--output_dir={out}",
    )
    kept, sys.argv = sys.argv, ["lerobot-eval", *options, *common]
    try:
        main()
    finally:
        sys.argv = kept
    return json.loads((out / "eval_info.json").read_text())


def rewards(info: dict[str, Any]) -> list[float]:
    return info["per_task"][0]["metrics"]["sum_rewards"]


def test_lerobot_eval_before_and_after(saved: Path, tmp_path: Path):
    base = evaluate(tmp_path / "base", f"--policy.path={folder(True, STEPS) / 'policy'}")
    same = evaluate(tmp_path / "same", f"--policy.path={saved}", "--policy.rule=base")
    steered = evaluate(tmp_path / "steered", f"--policy.path={saved}")
    typed = evaluate(
        tmp_path / "typed",
        "--policy.type=qsteer",
        f"--policy.base={folder(True, STEPS) / 'policy'}",
        f"--policy.critic={saved.parent / 'critic'}",
        "--policy.rule=tweedie=0.5",
    )
    assert rewards(same) == rewards(base), "nothing but the steering differs"
    assert rewards(typed) == rewards(steered) != rewards(base), "saved, or put together"
    assert len(set(rewards(base))) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lerobot_eval_on_metaworld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small random SmolVLA, which lerobot loads from the disk: an episode unsteered, and one steered."""
    pytest.importorskip("metaworld")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    vlm = checkpoints.write_vlm(tmp_path / "vlm", ["Push", "the", "puck", "to", "a", "goal"])
    numbers = {"mean": torch.zeros(4), "std": torch.ones(4)}
    stats = {"observation.state": numbers, "action": numbers}
    size = {"state": 4, "action": 4, "chunk": 50, "executed": 50}
    policy = checkpoints.smolvla(tmp_path / "policy", vlm, stats, **size)
    critic = Critic(CriticConfig(4, action_dim=4, horizon=50, hidden=(16,)))
    with qsteer.steer(policy, critic, qsteer.Tweedie(0.5)) as handle:
        handle.save_pretrained(tmp_path / "steered")
    env = ("--env.type=metaworld", "--env.task=push-v3", "--eval.use_async_envs=false")
    found = [
        evaluate(tmp_path / f"out-{name}", f"--policy.path={tmp_path / name}", env=env, episodes=1)
        for name in ("policy", "steered")
    ]
    assert rewards(found[0]) != rewards(found[1])


def test_a_chunk_is_the_steered_policys(saved: Path, critic: Critic):
    dataset, policy, before = opened(steps=STEPS)
    batch = before({key: v for key, v in dataset[0].items() if not key.startswith("next.")})
    loaded = QSteerPolicy.from_pretrained(saved)
    noise = torch.randn(1, 6, 2)
    with qsteer.steer(policy, critic, qsteer.Tweedie(0.5)):
        expected = policy.predict_action_chunk(batch, noise)
    assert torch.equal(loaded.predict_action_chunk(batch, noise=noise), expected)
    processors = make_pre_post_processors(PreTrainedConfig.from_pretrained(saved), pretrained_path=str(saved))
    again = processors[0]({key: v for key, v in dataset[0].items() if not key.startswith("next.")})
    assert torch.equal(again["observation.state"], batch["observation.state"])
    assert loaded.config.image_features.keys() == policy.config.image_features.keys()


def test_it_is_saved_again_as_a_steering(saved: Path, tmp_path: Path):
    loaded = QSteerPolicy.from_pretrained(saved)
    loaded.save_pretrained(tmp_path)
    first, second = (json.loads((at / "steering.json").read_text()) for at in (saved, tmp_path))
    assert first == second
    assert not (tmp_path / "model.safetensors").exists()


def test_misuse(saved: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected --policy.base and --policy.critic, got None and None"):
        QSteerPolicy(QSteerConfig(device="cpu"))
    config = PreTrainedConfig.from_pretrained(saved)
    config.critic = "other"
    with pytest.raises(ValueError, match=r"expected no critic beside a saved steering.*\['other'\]"):
        QSteerPolicy.from_pretrained(saved, config=config)
    with pytest.raises(TypeError, match="a steered one, whose policy is frozen"):
        QSteerPolicy.from_pretrained(saved).forward({})
    gone = json.loads((saved / "steering.json").read_text())
    gone["base"]["path"] = str(tmp_path / "gone")
    for file in saved.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "steering.json").write_text(json.dumps(gone))
    with pytest.raises(FileNotFoundError, match=r"gone: expected the folder of a policy, got nothing there"):
        QSteerPolicy.from_pretrained(tmp_path)


class TestPolicyServer:
    """lerobot's asynchronous server sends more steps than the policy executes."""

    @pytest.fixture(autouse=True)
    def away(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """It writes its log where it is started."""
        monkeypatch.chdir(tmp_path)

    def serve(self, saved: Path, steps: int) -> Any:
        pytest.importorskip("grpc")
        from lerobot.async_inference.configs import PolicyServerConfig
        from lerobot.async_inference.helpers import RemotePolicyConfig
        from lerobot_policy_qsteer.policy_server import SteeringServer

        server = SteeringServer(PolicyServerConfig())
        server.shutdown_event.clear()
        features = {"observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}}
        spec = RemotePolicyConfig("qsteer", str(saved), features, steps, "cpu")
        peer = SimpleNamespace(peer=lambda: "robot")
        server.SendPolicyInstructions(SimpleNamespace(data=pickle.dumps(spec)), peer)
        return server

    def test_all_that_is_sent_is_steered(self, tmp_path: Path):
        policy = opened(steps=STEPS)[1]
        torch.manual_seed(0)
        critic = Critic(CriticConfig(2, action_dim=2, horizon=6, hidden=(16,)))
        with qsteer.steer(policy, critic, qsteer.Tweedie(0.5, clip=None), executed=6) as handle:
            path = handle.save_pretrained(tmp_path / "saved")
        server = self.serve(path, 6)
        assert "steers the first 6 of 6 steps" in repr(server.policy.handle)
        batch = {"observation.state": torch.zeros(1, 2), "task": [policy.config.tasks[0]]}
        torch.manual_seed(1)
        chunk = server._get_action_chunk(batch)
        torch.manual_seed(1)
        base = policy.predict_action_chunk(batch)
        assert chunk.shape == (1, 6, 2)
        assert ((chunk - base).abs().amax(-1) > 0).all(), "every step that is sent"

    def test_a_critic_that_sees_fewer_steps_is_refused(self, saved: Path):
        with pytest.raises(ValueError, match=r"sees all 6 executed steps, got a horizon of 4"):
            self.serve(saved, 6)

"""Arms of a lerobot policy act as the steered policy does, in lerobot's environments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lerobot.datasets")
pytest.importorskip("datasets")

from reach_runs import folder

import qsteer
from qsteer.cli import main
from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.data.lerobot import open_policy
from qsteer.envs.lerobot import LerobotSimulator, env_config, flatten, unflatten
from qsteer.evaluation.arms import parse
from qsteer.evaluation.lerobot import LerobotPolicy, drive
from qsteer.testing.reach import TASKS
from qsteer.testing.reach.world import ReachEnv

SHAPE: dict[str, Any] = {"action_dim": 2, "horizon": 4, "hidden": (16,)}


@pytest.fixture(scope="module")
def critic() -> Critic:
    torch.manual_seed(0)
    return Critic(CriticConfig(2, features=4, **SHAPE))


@pytest.fixture(scope="module")
def whole(critic: Critic) -> LerobotPolicy:
    policy, *processors = open_policy(folder(True) / "policy")
    make, driver = drive(env_config("reach", TASKS[1]), None, policy, tuple(processors), critic)
    assert (driver.horizon, driver.noise_shape, make().instruction) == (4, (6, 2), TASKS[1])
    return driver.open.func.__self__


def seen(rows: int = 3) -> dict[str, Tensor]:
    env = LerobotSimulator(env_config("reach", TASKS[1]))
    met = [env.reset(seed=seed)[0] for seed in range(rows)]
    return {key: torch.stack([torch.as_tensor(obs[key]) for obs in met]) for key in met[0]}


@pytest.mark.parametrize("spec", ["base", "tweedie=0.4", "best-of-3"])
def test_an_arm_acts_as_the_steered_policy(spec: str, whole: LerobotPolicy, critic: Critic) -> None:
    arm, obs = parse(spec, clip=None), seen()
    noise = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    found = whole.act(arm, critic, None, obs, noise)
    batch = whole.batch(obs)
    assert batch["task"] == [TASKS[1]] * 3
    with qsteer.steer(whole.policy, critic, arm.rule, sampler=arm.sampler):
        torch.manual_seed(5)
        chunk = whole.policy.predict_action_chunk(batch, noise)
    assert torch.equal(found, torch.stack([whole.postprocessor(a) for a in chunk[:, :4].unbind(1)], 1))
    assert found.abs().max() > 5  # millimetres


def test_a_base_rollout_is_lerobots_own(whole: LerobotPolicy, critic: Critic) -> None:
    """Same seed and noise, lerobot's loop of `select_action` on its vector environment: the same states."""
    from lerobot.envs import make_env, preprocess_observation

    config = env_config("reach", TASKS[1])
    mine, theirs = LerobotSimulator(config), make_env(config)["reach"][0]
    obs, _ = mine.reset(seed=3)
    other, _ = theirs.reset(seed=[3])
    whole.policy.reset()
    for chunk in range(3):
        noise = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(chunk))
        act = whole.act(
            parse("base", clip=None),
            critic,
            None,
            {k: torch.as_tensor(v)[None] for k, v in obs.items()},
            noise,
        )
        for step in act[0]:
            batch = whole.preprocessor(preprocess_observation(other) | {"task": [TASKS[1]]})
            theirs_step = whole.postprocessor(whole.policy.select_action(batch, noise))
            other, *_ = theirs.step(theirs_step.numpy())
            obs, *_ = mine.step(step.numpy())
            assert (obs["agent_pos"] == other["agent_pos"][0]).all()


def test_the_limit_truncates_and_paths_come_back() -> None:
    env = LerobotSimulator(env_config("reach"))
    assert env.limit == 30  # which lerobot's rollouts keep, and LIBERO's environment does not
    env.limit = 7
    env.reset(seed=0)
    ends = [env.step(torch.zeros(2).numpy())[2:4] for _ in range(7)]
    assert ends == [(False, False)] * 6 + [(False, True)]
    nested = {"pixels": {"top": 1, "wrist": 2}, "agent_pos": 3}
    assert unflatten(dict(flatten(nested))) == nested and set(dict(flatten(nested))) == {
        "pixels/top",
        "pixels/wrist",
        "agent_pos",
    }


@pytest.mark.slow
def test_the_command_compares_arms(tmp_path: Path, critic: Critic, capsys: pytest.CaptureFixture) -> None:
    critic.save_pretrained(tmp_path / "critic")
    out = tmp_path / "report.json"
    command = ["evaluate", "--env", "reach", "--env-task", TASKS[1], "--plugin", "qsteer.testing.reach"]
    command += ["--policy", folder(True) / "policy", "--critic", tmp_path / "critic", "--episodes", 3]
    main([str(word) for word in [*command, "--num-envs", 1, "--arms", "base", "qgf=0.1", "--out", out]])
    report = json.loads(out.read_text())
    assert report["task"] == f"reach: {TASKS[1]}"
    base, steered = report["arms"]
    assert base["displacement"][0] == 0 < steered["displacement"][0]
    assert steered["critic_passes"]["backwards"] == 10 and base["episodes"] == 3
    assert "qgf=0.1" in capsys.readouterr().out


def test_the_command_audits(tmp_path: Path, critic: Critic) -> None:
    """An untrained critic does not pass, and foresight is asked of the dataset."""
    critic.save_pretrained(tmp_path / "critic")
    command = ["audit", "--dataset", folder(True) / "dataset", "--plugin", "qsteer.testing.reach"]
    command += ["--policy", folder(True) / "policy", "--critic", tmp_path / "critic"]
    with pytest.raises(SystemExit, match="1"):
        main([str(word) for word in [*command, "--states", 12, "--samples", 4, "--out", tmp_path / "a.json"]])
    report = json.loads((tmp_path / "a.json").read_text())
    (ranked,) = [check["figures"] for check in report["checks"] if check["name"] == "rank"]
    assert report["states"] == 12 and {"foresight", "returns", "data_over_noise"} <= set(ranked)


MISUSES = [
    (["evaluate", "--env-task", "x"], "--env-task: expected none without --env"),
    (["evaluate", "--env", "reach", "--task", "scene"], "--task: expected none beside --env"),
    (["evaluate", "--env", "reach", "--compile", "static"], "--compile: expected none beside --env"),
    (["evaluate", "--env", "nowhere"], "environment: expected one of "),
    (["audit", "--failures", "1"], "--failures: expected none without --dataset"),
    (["audit", "--dataset", "./d", "--data", "x"], "--data: expected none beside --dataset"),
    (["audit", "--dataset", "./d"], "./d: expected a LeRobotDataset"),
]


@pytest.mark.parametrize(("words", "line"), MISUSES)
def test_misuse_is_one_line(
    words: list[str],
    line: str,
    critic: Critic,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    critic.save_pretrained(tmp_path / "critic")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--policy", str(folder(True) / "policy"), "--critic", "critic"])
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert said.startswith(f"qsteer {words[0]}: {line}")


def test_an_environment_of_another_policy_is_refused(whole: LerobotPolicy, critic: Critic) -> None:
    class Blind(ReachEnv):
        def _observe(self) -> Any:
            return {"agent_pos": super()._observe()["agent_pos"]}

    config = env_config("reach")

    def create(n_envs: int, use_async_envs: bool = False) -> Any:
        import gymnasium

        def make() -> Blind:
            env = Blind()
            env.observation_space = gymnasium.spaces.Dict({"agent_pos": env.observation_space["agent_pos"]})
            return env

        return {"reach": {n: gymnasium.vector.SyncVectorEnv([make]) for n in range(several)}}

    config.create_envs = create
    several = 2
    with pytest.raises(ValueError, match="expected one task, got 2"):
        LerobotSimulator(config)
    with pytest.raises(ValueError, match="expected one task, got 0 for task_id=7"):
        LerobotSimulator(config, 7)
    with pytest.raises(KeyError, match=r"no \['observation.image'\]"):
        drive(config, 1, whole.policy, (whole.preprocessor, whole.postprocessor), critic)


def test_an_online_actor_acts_as_the_arm(whole: LerobotPolicy, critic: Critic) -> None:
    """While a critic learns and afterwards, the same observation and noise give the same actions."""
    arm, obs = parse("tweedie=0.4", clip=None), seen()
    noise = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1))
    actor = whole.actor(LiveCritic(critic), obs)
    try:
        assert actor.noise_shape == (6, 2)
        unsteered = actor.act(obs, noise).executed
        actor.steer(arm.rule, arm.sampler)
        decision = actor.act(obs, noise)
    finally:
        actor.handle.remove()
    assert torch.equal(unsteered, whole.act(parse("base", clip=None), critic, None, obs, noise))
    assert torch.equal(decision.executed, whole.act(arm, critic, None, obs, noise))
    assert not torch.equal(decision.executed, unsteered)
    assert torch.equal(decision.executed, whole.execute(decision.actions))
    assert decision.observations["observation.state"].shape == (3, 2)


@pytest.mark.slow
def test_a_critic_is_learnt_while_the_policy_acts(tmp_path: Path) -> None:
    command = ["train-online", "--env", "reach", "--env-task", TASKS[0], "--plugin", "qsteer.testing.reach"]
    command += ["--policy", folder(True) / "policy", "--features", "--arm", "qgf=0.1", "--num-envs", 2]
    command += ["--env-steps", 120, "--warmup", 40, "--evaluate-every", 0, "--out", tmp_path]
    main([str(word) for word in command])
    learnt = Critic.from_pretrained(tmp_path / "seed0" / "last")
    assert learnt.config.features == 4 and learnt.config.horizon == 4
    rows = [json.loads(line) for line in (tmp_path / "seed0" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["env_steps"] == 120 and rows[-1]["refused"] == rows[-1]["failed"] == 0

"""From a LeRobotDataset and a lerobot policy to a critic that steers this policy and no other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lerobot.datasets")
pytest.importorskip("datasets")

import hosts
from reach_runs import folder, opened

import qsteer
from qsteer.cli import main
from qsteer.critics import Critic, CriticConfig
from qsteer.critics.encoders import FEATURES
from qsteer.data.exchange import to_lerobot_dataset
from qsteer.data.layout import Layout, Rows, Trajectory
from qsteer.data.lerobot import Seen
from qsteer.data.replay import Replay
from qsteer.steering.opening import bind_critic, open_action
from qsteer.training import CriticTraining
from qsteer.training.dataset import hold_out, rank, train_from_dataset

SMALL = CriticTraining(horizon=4, steps=6, batch_size=16, hidden=(16,), checkpoint_every=3)
IMAGE = "observation.image"


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, Any]:
    return opened(True)


def train(world: tuple[Any, Any, Any], out: Path, training: CriticTraining = SMALL, **more: Any) -> Critic:
    return train_from_dataset(*world, out, training, **{"features": True, "progress": False, **more})[0]


def weights(critic: Critic) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in critic.state_dict().items()}


def test_the_critic_steers_its_policy_and_no_other(world: tuple[Any, Any, Any], tmp_path: Path) -> None:
    dataset, policy, before = world
    critic = train(world, tmp_path)
    again = Critic.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in weights(critic).items())
    assert again.config.contract.action_statistics and again.config.features == 4
    frame = {k: v[None] if isinstance(v, Tensor) else [v] for k, v in dataset[0].items()}
    batch = before(frame)
    with qsteer.steer(policy, again, qsteer.QGF(weight=1.0)):
        torch.manual_seed(0)
        steered = policy.predict_action_chunk(batch)
    torch.manual_seed(0)
    assert not torch.equal(steered, policy.predict_action_chunk(batch))
    contract = replace(again.config.contract, action_statistics="of another dataset")
    again.config = replace(again.config, contract=contract)
    with pytest.raises(ValueError, match="action_statistics"):
        qsteer.steer(policy, again, qsteer.QGF(weight=1.0))
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert ranking["episodes"] == 1 and ranking["chunks"] > 1


def test_an_interrupted_run_goes_on_to_the_same_weights(
    world: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data are read once; a run of other data in the same folder is refused."""
    whole = weights(train(world, tmp_path / "whole", features=False, views=(IMAGE,)))
    (tmp_path / "cut" / "data" / "train").mkdir(parents=True)  # a pass over the data that was interrupted
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        calls, draw = iter(range(5)), Replay.sample  # the checkpoint is of step 3
        patch.setattr(Replay, "sample", lambda *args: (next(calls), draw(*args))[1])
        train(world, tmp_path / "cut", features=False, views=(IMAGE,))
    monkeypatch.setattr(type(world[0]), "__getitem__", None)  # nothing is decoded again
    resumed = train(world, tmp_path / "cut", features=False, views=(IMAGE,))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(resumed).items())
    with pytest.raises(ValueError, match="another inputs"):
        train(world, tmp_path / "cut")


@pytest.mark.parametrize("target", ["sarsa", "monte_carlo"])
def test_each_target_learns_from_a_dataset(world: tuple[Any, Any, Any], tmp_path: Path, target: str) -> None:
    critic = train(world, tmp_path, replace(SMALL, target=target))
    assert critic.config.contract.target == target


def test_what_cannot_be_learnt_is_said(tmp_path: Path, world: tuple[Any, Any, Any]) -> None:
    with pytest.warns(UserWarning, match="2 tasks"):
        train(world, tmp_path / "tasks", features=False)
    with pytest.warns(UserWarning, match="episodes that fail"):
        train(opened(False), tmp_path / "successes")
    with pytest.raises(ValueError, match="target: expected one of"):
        train(world, tmp_path, replace(SMALL, target="td"))
    with pytest.raises(ValueError, match="executed: expected 1 to 6"):
        train(world, tmp_path, replace(SMALL, horizon=7))
    with pytest.raises(ValueError, match="expected episodes of more than 4 steps"):
        train((Short(world[0]), *world[1:]), tmp_path / "short")


class Short:
    """The first three frames of a dataset, a truncated episode."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.hf_dataset = dataset.hf_dataset.select(range(3))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return self.dataset[i]


@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_features_in_the_data_are_those_that_steering_gives(name: str, tmp_path: Path) -> None:
    """The replay of a pi0.5's or SmolVLA's dataset holds what `steer` will show the critic."""
    policy = hosts.shared(name)
    before, _ = qsteer.testing.hosts.processors(policy)
    top, state = "observation.images.top", "observation.state"
    draw = torch.Generator().manual_seed(0)
    seen = {
        state: torch.randn(5, 4, generator=draw),
        top: torch.randint(256, (5, 3, 64, 64), generator=draw).to(torch.uint8),
    }
    executed = torch.ones(5, dtype=torch.int32)
    episode = Trajectory(
        seen, torch.randn(5, 1, 3, generator=draw), torch.zeros(5), executed, True, False, None
    )
    dataset = to_lerobot_dataset([episode], "one", tmp_path / "data", 10, task="stack the cups")
    (found,) = Seen(dataset, policy, before, features=True, views=(top,), view_size=64).trajectories()
    frame = {k: v[None] if isinstance(v, Tensor) else [v] for k, v in dataset[3].items()}
    batch = before(frame)
    field = open_action(policy, batch).field
    shape = CriticConfig(4, 3, 4, (8,), views=(top,), features=found.observations[FEATURES].shape[1])
    critic = Critic(shape)
    stored = {key: column[3:4] for key, column in found.observations.items()}
    chunk = torch.randn(1, 4, 3, generator=draw)
    torch.testing.assert_close(critic.bind(stored)(chunk), bind_critic(critic, batch, None, field)(chunk))


def test_ranking_is_perfect_for_the_returns_themselves() -> None:
    layout = Layout(observations=1, action_dim=1, horizon=1, gamma=0.5, need="returns", capacity=100)
    held, step = Replay(layout), 20
    for i in range(step):
        held.add(
            Rows(
                observations=torch.tensor([[float(i)]]),
                actions=torch.zeros(1, 1, 1),
                rewards=torch.tensor([float(i == step - 1)]),
                terminals=torch.tensor([i == step - 1]),
                truncations=torch.tensor([False]),
            )
        )

    class Later(Critic):
        def __init__(self, sign: float) -> None:
            super().__init__(CriticConfig(1, 1, 1))
            self.sign = sign

        def bind(self, obs: Tensor) -> Any:
            return qsteer.value(lambda a, s: self.sign * s[:, 0] + a.sum((1, 2)), context=obs)

    for sign in (1.0, -1.0):
        found = rank(Later(sign), held)
        assert found.returns[0] == pytest.approx(sign) and found.preference == 0.5
        assert (found.episodes, found.chunks) == (1, step)


def test_a_tenth_is_held_out() -> None:
    assert [sum(hold_out(n)) for n in (1, 2, 12, 40)] == [0, 1, 1, 4]
    assert hold_out(40) == hold_out(40)


def test_the_command_trains_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    there, out = folder(True), tmp_path / "critic"
    command = ["train-critic", "--dataset", there / "dataset", "--policy", there / "policy", "--features"]
    command += [
        "--plugin",
        "qsteer.testing.reach",
        "--steps",
        2,
        "--members",
        3,
        "--gamma",
        0.9,
        "--out",
        out,
    ]
    main([str(word) for word in command])
    told = capsys.readouterr().out
    assert "rank correlation of values and returns" in told and f"critic: {out}" in told
    config = Critic.from_pretrained(out).config
    assert (config.members, config.horizon, config.contract.discount) == (3, 4, 0.9)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--policy", "p"], "--policy: expected none without --dataset"),
        (["--features"], "--features: expected none without --dataset"),
        (["--dataset", "d"], "--policy: expected it beside --dataset"),
        (["--dataset", "d", "--policy", "p"], "--out: expected it beside --dataset"),
        (["--dataset", "d", "--task", "scene"], "--task: expected none beside --dataset"),
        (
            ["--dataset", "./d", "--policy", "p", "--out", "o", "--plugin", "no.such"],
            "--plugin: expected a module",
        ),
        (["--dataset", "./d", "--policy", "p", "--out", "o"], "./d: expected a LeRobotDataset"),
        (
            ["--dataset", "no/such", "--policy", "p", "--out", "o"],
            "no/such: expected a LeRobotDataset on the hub",
        ),
    ],
)
def test_misuse_of_the_command_is_one_line(
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["train-critic", *words])
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert said.startswith(f"qsteer train-critic: {line}")

"""A LeRobotDataset as a policy's critic sees it: the policy's own preprocessor, rewards, ends."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lerobot.datasets")
pytest.importorskip("datasets")

from reach_runs import EPISODES, folder, opened

import qsteer
from qsteer.critics.encoders import FEATURES, to_unit_view
from qsteer.data.exchange import from_lerobot_dataset
from qsteer.data.lerobot import BLOCK, Seen, open_dataset, open_policy
from qsteer.testing.reach.world import GOALS, RADIUS

IMAGE = "observation.image"


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, Any]:
    return opened()


def raw(dataset: Any) -> dict[str, torch.Tensor]:
    rows = dataset.hf_dataset.with_format("numpy")
    keys = ("observation.state", "action", "episode_index", "next.success", "task_index")
    return {key: torch.as_tensor(rows[key][:]) for key in keys}


def test_states_and_actions_are_those_of_the_policys_preprocessor(world: tuple[Any, Any, Any]) -> None:
    dataset, policy, before = world
    given, found = raw(dataset), list(Seen(dataset, policy, before).trajectories())
    assert len(found) == EPISODES and len(dataset) > BLOCK  # several blocks, with episodes across them
    state, action = given["observation.state"], given["action"]
    std, mean = torch.std_mean(state.double(), dim=0, correction=0)  # in mm; the policy's statistics
    low, high = action.aminmax(dim=0)
    for number, trajectory in enumerate(found):
        rows = given["episode_index"] == number
        seen = trajectory.observations["observation.state"]
        torch.testing.assert_close(seen, ((state[rows] - mean) / std).float(), atol=1e-4, rtol=1e-4)
        expected = 2 * (action[rows] - low) / (high - low) - 1
        torch.testing.assert_close(trajectory.actions[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_relabelled_rewards_tell_success_from_a_time_limit(world: tuple[Any, Any, Any]) -> None:
    dataset, policy, before = world
    given = raw(dataset)
    found = list(Seen(dataset, policy, before).trajectories())
    succeeded = [bool(given["next.success"][given["episode_index"] == i].any()) for i in range(EPISODES)]
    assert 0 < sum(succeeded) < EPISODES
    for trajectory, success in zip(found, succeeded, strict=True):
        assert (trajectory.terminal, trajectory.truncated) == (success, not success)
        assert trajectory.rewards[-1] == success - 1 and (trajectory.rewards[:-1] == -1).all()
        assert trajectory.closing is None


def test_failures_that_are_named_are_failures() -> None:
    dataset, policy, before = opened(success=False)
    found = list(Seen(dataset, policy, before, failures=(2, 5)).trajectories())
    assert [i for i, trajectory in enumerate(found) if trajectory.truncated] == [2, 5]
    with pytest.raises(ValueError, match=r"failures: .*got \[99\]"):
        Seen(dataset, policy, before, failures=(99,))


def test_features_are_those_of_an_action_and_know_the_task(world: tuple[Any, Any, Any]) -> None:
    dataset, policy, before = world
    state = torch.get_rng_state()
    found = list(Seen(dataset, policy, before, features=True, views=(IMAGE,), view_size=12).trajectories())
    assert torch.equal(torch.get_rng_state(), state)
    frame = dict(dataset[0])
    batch = before({k: v[None] if isinstance(v, torch.Tensor) else [v] for k, v in frame.items()})
    field = qsteer.open_action(policy, batch).field
    first = found[0].observations
    torch.testing.assert_close(first[FEATURES][:1], field.features)
    assert not torch.equal(first[FEATURES][0, 2:], found[1].observations[FEATURES][0, 2:])  # the other task
    view = to_unit_view(frame[IMAGE][None], 12, torch.zeros(()))
    assert first[IMAGE].dtype == torch.uint8 and first[IMAGE].shape[1:] == (3, 12, 12)
    assert (first[IMAGE][:1] / 255 - view).abs().max() <= 0.5 / 255 + 1e-6


def test_a_datasets_own_rewards_are_kept(world: tuple[Any, Any, Any]) -> None:
    """As `from_lerobot_dataset` reads them, when the preprocessor changes nothing."""
    dataset, policy, _ = world
    rows = [dict(dataset[i]) for i in range(40)]
    episode = [int(row["episode_index"]) for row in rows]
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or episode[i + 1] != episode[i]
        row |= {"next.reward": torch.tensor(0.5 * i), "next.done": torch.tensor(last)}
    columns = {
        key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0] if key != "task"
    }

    class Table(list):
        features = dict.fromkeys(columns)
        meta = dataset.meta
        hf_dataset = SimpleNamespace(with_format=lambda _: {k: v.numpy() for k, v in columns.items()})

    table = Table(rows)
    seen = Seen(table, policy, lambda frames: frames, views=(IMAGE,), view_size=32)
    assert not seen.relabelled
    for mine, theirs in zip(seen.trajectories(), from_lerobot_dataset(table), strict=True):
        assert torch.equal(mine.rewards, theirs.rewards) and torch.equal(mine.actions, theirs.actions)
        assert (mine.terminal, mine.truncated) == (theirs.terminal, theirs.truncated)
        assert all(torch.equal(mine.observations[k], theirs.observations[k]) for k in mine.observations)
    assert Seen(table, policy, lambda frames: frames, rewards="sparse").relabelled
    del Table.features["next.done"]
    with pytest.raises(KeyError, match=r"expected next.done beside next.reward"):
        Seen(table, policy, lambda frames: frames)


def test_misuse_names_what_is_wrong(world: tuple[Any, Any, Any], tmp_path: Any) -> None:
    dataset, policy, before = world
    with pytest.raises(KeyError, match=r"no \['observation.images.top'\]"):
        Seen(dataset, policy, before, views=("observation.images.top",))
    with pytest.raises(KeyError, match=r"no \['next.reward', 'next.done'\]"):
        Seen(dataset, policy, before, rewards="dataset")
    with pytest.raises(ValueError, match="failures: expected none"):
        Seen(dataset, policy, before, failures=(1,))
    step = type("RelativeActionsProcessorStep", (), {"enabled": True})()
    with pytest.raises(ValueError, match="got relative actions"):
        Seen(dataset, policy, SimpleNamespace(steps=[step]))
    aloha = SimpleNamespace(config=SimpleNamespace(adapt_to_pi_aloha=True))
    with pytest.raises(ValueError, match="adapt_to_pi_aloha"):
        replace(Seen(dataset, policy, before), policy=aloha)
    with pytest.raises(FileNotFoundError, match=r"meta/info.json"):
        open_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        open_policy(tmp_path)


def test_the_policys_statistics_are_known(world: tuple[Any, Any, Any]) -> None:
    """Its contract has fingerprints of them, which `steer` compares."""
    contract = qsteer.adapters.contract_of(world[1])
    assert contract.action_statistics and contract.observation_normalisation
    assert (folder(True) / "policy" / "policy_preprocessor.json").is_file()


def test_the_demonstrator_is_recorded_in_millimetres(world: tuple[Any, Any, Any]) -> None:
    """A success is an episode whose last step ends within the goal."""
    dataset, given = world[0], raw(world[0])
    for number in range(EPISODES):
        rows = given["episode_index"] == number
        last = given["observation.state"][rows][-1] + given["action"][rows][-1]
        goal = torch.tensor(GOALS[dataset.meta.tasks.iloc[int(given["task_index"][rows][0])].name])
        assert bool((last - goal).norm() < RADIUS) == bool(given["next.success"][rows][-1])

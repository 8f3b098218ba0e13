"""What robots tell, paired with what they were sent: the rows that simulators would have given, or none."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import assert_same
from learning_robots import STATE, STEPS, TRAINING, Robot, Walk, learning, served
from robots import same

from qsteer.data.replay import Replay
from qsteer.online.actors import Decision as Acted
from qsteer.online.collect import Collector
from qsteer.online.sources import make_layout
from qsteer.serving import RobotLearning, Server
from qsteer.serving.options import OWN, Feedback, RequestError, Told
from qsteer.serving.requests import Request

ROUNDS = 14


@pytest.fixture
def learns(tmp_path: Path) -> Iterator[RobotLearning]:
    found = learning(tmp_path / "run")
    yield found
    found.close()


def seed_of(lane: int, round_: int) -> int:
    return 1000 * lane + round_


class Worker:
    """Does what a server's worker thread does with messages."""

    def __init__(self, learns: RobotLearning | None) -> None:
        self.server = Server(served(learns=False) if learns is None else learns.served, learning=learns)

    def send(self, robot: int, message: Any) -> Any:
        """The reply: an answer, a map, or the error."""
        read = self.server.served.interface.read(message, lambda: 0)
        if isinstance(read, Told):
            return self.server._teller(robot, read)()
        (reply,) = self.server._act([Request(read.observation, read.seed, key=read.key,
                                             feedback=read.feedback, robot=robot)])  # fmt: skip
        return reply

    def live(self, robot: int, body: Robot, decisions: int, seeds: Any = itertools.repeat(0)) -> list[Any]:  # noqa: B008
        replies = []
        for _, seed in zip(range(decisions), seeds, strict=False):
            answer = self.send(robot, body.ask(seed=seed))
            replies.append(answer.told)
            if (end := body.execute(answer.decision.actions)) is not None:
                replies.append(self.send(robot, end))
        return replies


def simulated(learns: RobotLearning) -> tuple[Replay, int]:
    """What simulators give for the same episodes, and the seed of those."""
    layout = make_layout(learns.learner.live.config, TRAINING)
    rounds = itertools.count()
    policy = learns.served

    def act(obs: Any, lanes: np.ndarray) -> Acted:
        round_ = next(rounds)
        decisions = [
            policy.act([Request({STATE: row.float().numpy()}, seed_of(lane, round_))])[0]
            for row, lane in zip(obs, lanes.tolist(), strict=True)
        ]
        observations, actions = (torch.cat(part) for part in zip(*(d.seen for d in decisions), strict=True))
        return Acted(torch.from_numpy(np.stack([d.actions for d in decisions])), actions, observations)

    replay, generator = Replay(layout), torch.Generator().manual_seed(0)
    options = {"horizon": STEPS, "row": STEPS, "num_envs": 2, "gamma": TRAINING.critic.gamma}
    with Collector(Walk, closing=False, **options) as collector:
        for _ in range(ROUNDS):
            replay.add(collector.step(act, generator))
        assert collector._seed is not None
        return replay, collector._seed


def test_rows_are_those_of_simulators_bit_for_bit(learns: RobotLearning) -> None:
    expected, first = simulated(learns)
    worker = Worker(learns)
    for lane in range(2):
        words = (
            np.random.SeedSequence((first, lane, n)).generate_state(1)[0] >> 1 for n in itertools.count(1)
        )
        body = Robot(f"robot{lane}", words)
        replies = worker.live(lane + 1, body, ROUNDS, map(seed_of, itertools.repeat(lane), range(ROUNDS)))
        assert replies[-1]["stored"] >= ROUNDS - 1
        if (last := body.ask()[OWN]).get("rewards"):  # of the last reply, alone
            worker.send(lane + 1, {OWN: last})
    got = learns.learner.replay
    assert got.added == expected.added == 2 * ROUNDS
    assert torch.equal(got.starts, expected.starts) and len(got.starts)
    assert_same(got.gather(got.starts), expected.gather(expected.starts), skip=())
    assert torch.equal(got.rewards(), expected.rewards())


def test_a_row_is_stored_before_its_robot_is_told(learns: RobotLearning, tmp_path: Path) -> None:
    worker, body = Worker(learns), Robot()
    first = worker.send(1, body.ask())
    assert first.told == {"stored": 0} and len(learns.learner.replay) == 0
    body.execute(first.decision.actions)
    assert worker.send(1, body.ask()).told == {"stored": 1}
    again = np.load(tmp_path / "run" / "replay" / "rewards.npy", mmap_mode="r")
    assert again[0, 0] == learns.learner.replay.rewards()[0] != 0


def test_a_call_that_is_made_again_stores_nothing_again(learns: RobotLearning) -> None:
    worker, body = Worker(learns), Robot()
    body.execute(worker.send(1, body.ask()).decision.actions)
    read = worker.server.served.interface.read(body.ask(), lambda: 0)
    assert isinstance(read, Request)
    request = Request(read.observation, 0, key=read.key, feedback=read.feedback, robot=1)
    for _ in range(2):
        (answer,) = worker.server._act([request])
        assert not isinstance(answer, Exception) and answer.told == {"stored": 1}
    assert len(learns.learner.replay) == 1


def play(worker: Worker, body: Robot, robot: int = 1) -> None:
    """One reply, executed in mid-episode."""
    assert body.execute(worker.send(robot, body.ask()).decision.actions) is None


def test_a_reply_that_was_executed_in_part_is_left_out_and_said_once(learns: RobotLearning) -> None:
    worker, body = Worker(learns), Robot()
    play(worker, body)
    body.told["rewards"] = body.told["rewards"][:1]
    told = worker.send(1, body.ask()).told
    assert told["stored"] == 0 and "rewards of all 2 steps" in str(told["note"])
    assert "note" not in worker.send(1, body.ask()).told or learns.lanes.refused.sum() == 2
    assert learns.lanes.refused[0] >= 1 and learns.learner.replay.size() == 0


def test_no_word_of_the_last_reply_cuts_the_episode_there(learns: RobotLearning) -> None:
    worker, body = Worker(learns), Robot()
    play(worker, body)
    play(worker, body)
    assert len(learns.learner.replay) == 1
    body.told = {}
    told = worker.send(1, body.ask()).told
    assert told["stored"] == 1 and "rewards of the last reply, got none" in str(told["note"])
    (episode,) = learns.learner.replay.trajectories()
    assert len(episode) == 1 and not episode.terminal and not episode.truncated


def test_another_episode_without_an_end_cuts_the_former(learns: RobotLearning) -> None:
    worker, body = Worker(learns), Robot()
    play(worker, body)
    play(worker, body)
    body.over, body.told = True, {}
    told = worker.send(1, body.ask()).told
    assert told["stored"] == 1 and "end of episode" in str(told["note"])
    play(worker, body)
    play(worker, body)
    first, second = learns.learner.replay.trajectories()
    assert len(first) == 1 and len(second) >= 1 and not learns.lanes.finished


def test_a_robot_that_goes_cuts_its_own_lane_and_frees_it(learns: RobotLearning) -> None:
    worker, bodies = Worker(learns), [Robot("a"), Robot("b")]
    for robot, body in enumerate(bodies, 1):
        play(worker, body, robot)
        play(worker, body, robot)
    with pytest.raises(RequestError, match="at most 2 robots to learn from, got one more"):
        raise worker.send(3, Robot("c").ask())
    learns.lanes.leave(1)
    replay = learns.learner.replay
    assert replay._host["codes"][0, 0] != 0 and replay._host["codes"][1, 0] == 0  # the other goes on
    play(worker, Robot("c"), 3)
    assert (learns.lanes.find(3).number, learns.lanes.find(1)) == (0, None)


def test_a_plain_client_takes_no_lane(learns: RobotLearning) -> None:
    worker = Worker(learns)
    answer = worker.send(1, {STATE: np.zeros(2, np.float32)})
    assert answer.told == {} and len(learns.lanes) == 0


def test_rewards_that_are_of_nothing_are_an_error(learns: RobotLearning) -> None:
    worker, body = Worker(learns), Robot()
    error = worker.send(1, body.ask(rewards=[0.0, 0.0]))
    assert isinstance(error, RequestError) and "expected none, for all replies" in str(error)
    with pytest.raises(RequestError, match="expected none"):
        worker.send(1, {OWN: {"episode": "x", "rewards": [0.0]}})


def test_a_sensors_mistake_is_refused_and_listed(learns: RobotLearning, tmp_path: Path) -> None:
    worker, body = Worker(learns), Robot()
    learns.learner.health.observe_rewards(torch.full((200,), -0.5))
    play(worker, body)
    body.told["rewards"][0] = -1e9
    told = worker.send(1, body.ask()).told
    assert told["stored"] == 0 and "usual size" in str(told["note"])
    assert (tmp_path / "run" / "outliers.jsonl").exists()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"rewards": [1.0]}, "episode: expected a whole number, or a text"),
        ({"episode": True}, "episode: expected a whole number, or a text"),
        ({"episode": "x" * 201}, "episode: expected a whole number, or a text"),
        ({"episode": 1, "rewards": [float("nan")]}, "rewards: expected finite numbers, got nan"),
        ({"episode": 1, "rewards": ["1"]}, "rewards: expected finite numbers"),
        ({"episode": 1, "rewards": [True]}, "rewards: expected finite numbers"),
        ({"episode": 1, "rewards": 1.0}, "rewards: expected a list of numbers"),
        ({"episode": 1, "rewards": [0.0] * 3}, "rewards: expected at most 2"),
        ({"episode": 1, "done": 1}, "done: expected true or false"),
        ({"episode": 1, "done": True}, "in a message of its own"),
        ({"command": "freeze"}, "in a message of its own"),
        ({"command": "stop"}, r"command: expected one of \('freeze'"),
        ({"command": "freeze", "seed": 1}, "command: expected one of"),
    ],
)
def test_misuse_is_named(own: dict[str, Any], expected: str) -> None:
    message = {STATE: np.zeros(2, np.float32), OWN: own}
    with pytest.raises(RequestError, match=expected):
        served().interface.read(message, lambda: 0)


def test_a_server_that_does_not_learn_counts_episodes() -> None:
    worker, body = Worker(None), Robot()
    replies = worker.live(1, body, 9)
    assert replies[-1]["stored"] == 0
    text = worker.server.metrics.text().decode()
    assert "qsteer_episodes_total 3.0" in text
    with pytest.raises(RequestError, match="in a message of its own"):
        worker.send(1, body.ask(done=True))


def test_numpy_numbers_are_numbers() -> None:
    found = Feedback.read({"episode": 3, "rewards": np.float32([1, 2]), "success": np.bool_(True)})
    assert found is not None and found.rewards == (1.0, 2.0) and found.success is True


def test_a_decisions_keeping_does_not_change_it(learns: RobotLearning) -> None:
    mine, plain = learns.served, served(learns=False)
    request = mine.interface.example(3)
    (a,), (b,) = mine.act([request]), plain.act([request])
    assert a.seen is not None and b.seen is None
    same(a._replace(seen=None), b, bits=True)
    assert "seen" not in a.message()

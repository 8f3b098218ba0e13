"""Robots' decisions, paired with what came of them: rows for a replay, one lane a robot."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from qsteer.data.layout import Rows
from qsteer.data.outliers import Outlier
from qsteer.online.learner import OnlineLearner
from qsteer.serving.options import OWN, Feedback, RequestError
from qsteer.serving.requests import Seen


@dataclass(eq=False)
class Lane:
    """A robot, from its first episode until it goes.

    Attributes:
        number: of the lane.
        stored: rows of this robot that are stored.
        episode: that is running; None: none is.
        waiting: whether nothing has been told yet of the last reply.
        pending: what a critic keeps of that; None: none learns.
        success: whether the episode's task was done.
        total: sum of the episode's rewards.
        length: steps of the episode.
        count: episodes that began.
        note: what the robot is to be told with the next reply; None: nothing.
        heard: the latest feedback, and why it was refused: a call that fails is made again.
    """

    number: int
    stored: int = 0
    episode: str | int | None = None
    waiting: bool = False
    pending: Seen | None = None
    success: bool = False
    total: float = 0.0
    length: int = 0
    count: int = 0
    note: str | None = None
    heard: tuple[Feedback, RequestError | None] | None = None


class Lanes:
    """Pairs what robots were sent with what they tell, in the thread that acts.

    A decision is a row once its rewards have come; it is stored before the robot is told so. What is not
    known whole is not stored: an episode of which a decision's rewards are missing, or are of fewer steps
    than were sent though it goes on, is cut there, and its robot told why. Its later rows are kept.

    Args:
        steps: H, of a reply.
        count: most robots that tell at once.
        learner: keeps the rows; None: episodes are counted, and nothing is kept.
        on_end: is given robot, success, sum of rewards and length of an episode that ended.

    Attributes:
        finished: ``(lane, success, sum of rewards, length)`` of episodes that ended since it was emptied.
        refused: rows of each lane that were refused: (N,).
        failed: as simulators have it: (N,), none fails.
    """

    def __init__(
        self,
        steps: int,
        count: int,
        learner: OnlineLearner | None = None,
        on_end: Callable[[int, bool, float, int], None] | None = None,
    ) -> None:
        self.steps, self.count, self.learner, self.on_end = steps, count, learner, on_end
        self.finished: list[tuple[int, bool, float, int]] = []
        self.refused: np.ndarray = np.zeros(count, int)
        self.failed: np.ndarray = np.zeros(count, int)
        self.gamma = 1.0 if learner is None else learner.training.critic.gamma
        self._robots: dict[int, Lane] = {}

    def __len__(self) -> int:
        """Return how many robots have a lane."""
        return len(self._robots)

    def hear(self, robot: int, told: Feedback) -> None:
        """Take in what a robot tells. When this returns, its rows are stored.

        Raises:
            RequestError: it cannot be: no lane is free, or there is no decision that the rewards are of.
        """
        lane = self._robots.get(robot) or self._enter(robot)
        if lane.heard is not None and lane.heard[0] is told:
            if lane.heard[1] is not None:
                raise lane.heard[1]
            return
        try:
            self._hear(robot, lane, told)
        except RequestError as error:
            lane.heard = told, error
            self._cut(lane)
            raise
        lane.heard = told, None

    def remember(self, robot: int, seen: Seen | None) -> None:
        """Keep what a robot was sent, until it tells what came of it."""
        if (lane := self._robots.get(robot)) is not None:
            lane.waiting, lane.pending = True, seen

    def reply(self, robot: int) -> dict[str, int | str]:
        """Return what a robot is told: how many of its rows are stored, and, once, what was not."""
        if (lane := self._robots.get(robot)) is None:
            return {}
        note, lane.note = lane.note, None
        return {"stored": lane.stored} | ({} if note is None else {"note": note})

    def leave(self, robot: int) -> None:
        """Cut the running episode of a robot that has gone, and free its lane."""
        if (lane := self._robots.get(robot)) is not None:
            self._cut(lane)
            del self._robots[robot]

    def find(self, robot: int) -> Lane | None:
        """Return a robot's lane; None: it has not named an episode."""
        return self._robots.get(robot)

    def _enter(self, robot: int) -> Lane:
        taken = {lane.number for lane in self._robots.values()}
        free = [number for number in range(self.count) if number not in taken]
        if not free:
            raise RequestError(
                f"{OWN}.episode: expected at most {self.count} robots to learn from, got one more; leave the "
                "episode out to be served alone, or start the server with a larger --robots"
            )
        self._robots[robot] = lane = Lane(free[0])
        return lane

    def _hear(self, robot: int, lane: Lane, told: Feedback) -> None:
        if told.episode != lane.episode:
            if lane.episode is not None:
                self._refuse(lane, f"the end of episode {lane.episode!r} before another began, got none")
            lane.episode, lane.success, lane.total, lane.length = told.episode, False, 0.0, 0
            lane.count += 1
        lane.success |= told.success
        if told.rewards:
            if not lane.waiting:
                raise RequestError(
                    f"{OWN}.rewards: expected none, for all replies of the episode have theirs, got "
                    f"{len(told.rewards)}; tell of each reply once, under its own episode"
                )
            self._store(lane, told)
        elif lane.waiting:
            self._refuse(lane, "the rewards of the last reply, got none")
        if told.ends:
            self.finished.append((lane.number, lane.success, lane.total, lane.length))
            if self.on_end is not None:
                self.on_end(robot, lane.success, lane.total, lane.length)
            lane.episode = None
            self._cut(lane)  # of one that told its end without rewards

    def _store(self, lane: Lane, told: Feedback) -> None:
        """Store the last decision with its rewards, or refuse it."""
        seen, executed, reward = lane.pending, len(told.rewards), 0.0
        lane.waiting, lane.pending = False, None
        for k, each in enumerate(told.rewards):
            lane.total, reward = lane.total + each, reward + self.gamma**k * each
        lane.length += executed
        if self.learner is None or seen is None:
            return
        if executed < self.steps and not told.ends:
            self._refuse(lane, f"the rewards of all {self.steps} steps of a reply, got {executed}")
        elif not all(bool(leaf.isfinite().all()) for leaf in tree_leaves(seen)):
            self._refuse(lane, "finite inputs of the critic, got NaN or infinity")
        elif self._is_outlier(lane, reward):
            limit = self.learner.health.scale.limit
            self._refuse(lane, f"a reward of the usual size, below {limit:.4g}, got {reward:.6g}")
        else:
            rows = Rows(
                observations=seen.observation,
                actions=seen.actions,
                rewards=torch.tensor([reward]),
                terminals=torch.tensor([told.done]),
                truncations=torch.tensor([told.truncated and not told.done]),
                executed=torch.tensor([executed]),
            )
            self.learner.store(rows, [lane.number])
            lane.stored += 1

    def _is_outlier(self, lane: Lane, reward: float) -> bool:
        """Return whether a reward is a sensor's mistake, and list it; a positive one of a success is none."""
        assert self.learner is not None
        scale = self.learner.health.scale
        if not self.learner.training.refuse_outliers or (reward > 0 and lane.success):
            return False
        if not bool(scale.sift(torch.tensor([reward]))):
            return False
        outlier = Outlier(lane.number, lane.count - 1, lane.length, reward, scale.limit)
        self.learner.rewards.list_outliers([outlier], self.learner.env_steps)
        return True

    def _refuse(self, lane: Lane, expected: str) -> None:
        """Count a row that is not stored, and say why."""
        self.refused[lane.number] += 1
        lane.note = f"expected {expected}; that reply is not learnt from, and its episode cut there"
        self._cut(lane)

    def _cut(self, lane: Lane) -> None:
        """End what is stored of a lane's running episode: how it went on is not known."""
        lane.waiting, lane.pending = False, None
        if self.learner is not None:
            self.learner.replay.cut(torch.arange(self.count) == lane.number)

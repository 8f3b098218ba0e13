"""Random histories of environments, and what a replay of them must have: Chunks over whole episodes."""

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from qsteer.data import Chunks, Episodes, Transitions
from qsteer.data.layout import Layout, Rows
from qsteer.data.replay import SPARE, Replay

GAMMA = 0.9
NEEDS = ("next_actions", "next_state", "returns")
CAPACITY = 29
SLOTS = CAPACITY + SPARE


class History:
    """Random episodes in N lanes: rows to add, and what a list of whole episodes would say of them."""

    def __init__(self, seed: int, lanes: int, *, steps: int = 1, longest: int = 9) -> None:
        self.rng = np.random.default_rng(seed)
        self.lanes, self.steps, self.longest = lanes, steps, longest
        self.state = self.rng.normal(size=(lanes, 2)).astype(np.float32)
        self.left = self.rng.integers(1, longest + 1, lanes)
        self.log: list[list[dict]] = [[] for _ in range(lanes)]

    def row(self) -> Rows:
        n, lanes, rng = self.steps, self.lanes, self.rng
        self.left -= 1
        ends = self.left == 0
        terminals = ends & (rng.random(lanes) < 0.5)
        executed = np.where(ends, rng.integers(1, n + 1, lanes), n)
        before = self.state.copy()
        after = rng.normal(size=before.shape).astype(np.float32)
        fresh = rng.normal(size=before.shape).astype(np.float32)
        self.state = np.where(ends[:, None], fresh, after)
        self.left = np.where(ends, rng.integers(1, self.longest + 1, lanes), self.left)
        rewards = rng.normal(size=(lanes, n)).astype(np.float32)
        actions = rng.normal(size=(lanes, n, 3)).astype(np.float32)
        k = np.arange(n)
        summed = (rewards * GAMMA**k * (k < executed[:, None])).sum(1).astype(np.float32)
        for i in range(lanes):
            self.log[i].append(
                {
                    "observation": before[i],
                    "next": after[i],
                    "actions": actions[i, : executed[i]],
                    "rewards": rewards[i, : executed[i]],
                    "reward": summed[i],
                    "terminal": terminals[i],
                    "end": ends[i],
                    "cut": False,
                }
            )
        columns = (before, actions, summed, terminals, ends & ~terminals, executed, after)
        return Rows(*map(torch.from_numpy, columns))

    def cut(self, lanes: np.ndarray) -> None:
        """The running episodes of these lanes end here, and others begin."""
        for i in lanes.nonzero()[0]:
            if self.log[i] and not self.log[i][-1]["end"]:
                self.log[i][-1] |= {"end": True, "cut": True}
            self.left[i] = self.rng.integers(1, self.longest + 1)
            self.state[i] = self.rng.normal(size=2)


def kept(history: History, lane: int, capacity: int) -> list[dict]:
    """The rows of a lane that are still stored: each takes a slot, and so does each closing observation."""
    taken, rows = 0, []
    for row in reversed(history.log[lane]):
        taken += 1 + (row["end"] and not row["cut"])
        if taken > capacity:
            break
        rows.append(row)
    return rows[::-1]


def episodes(rows: list[dict], need: str) -> Episodes | None:
    """Single-step rows as Episodes; of what still goes on or was cut, only what ``need`` can know."""
    rows = [dict(row) for row in rows]
    if rows:
        rows[-1] |= {"end": True, "cut": rows[-1]["cut"] or not rows[-1]["end"]}
    if need == "next_state":  # the observation behind the last row is not there
        ends = [row["end"] and row["cut"] for row in rows]
        rows = [
            row | {"end": row["end"] or following}
            for row, mine, following in zip(rows, ends, [*ends[1:], False], strict=True)
            if not mine
        ]
    if need == "returns":  # such an episode has none
        doomed, whole = False, []
        for row in reversed(rows):
            doomed = row["cut"] if row["end"] else doomed
            if not doomed:
                whole.append(row)
        rows = whole[::-1]
    if not rows:
        return None
    column = {name: np.stack([row[name] for row in rows]) for name in ("observation", "next", "reward")}
    return Episodes(
        observations=torch.from_numpy(column["observation"]),
        next_observations=torch.from_numpy(column["next"]),
        actions=torch.from_numpy(np.concatenate([row["actions"] for row in rows])),
        rewards=torch.from_numpy(column["reward"]),
        terminals=torch.tensor([bool(row["terminal"]) for row in rows]),
        ends=torch.tensor([bool(row["end"]) for row in rows]),
    )


def assert_same(a: Transitions, b: Transitions, skip: tuple[str, ...] = ("rows",)) -> None:
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name in skip:
            continue
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype, f.name
            assert torch.equal(x, y), f.name
        else:
            assert x == y, f.name


def compare(replay: Replay, history: History) -> int:
    """Whatever can be drawn is what Chunks has, lane by lane and in the same order; returns how much."""
    layout, starts, found = replay.layout, replay.starts, 0
    lanes = starts // (layout.capacity + SPARE)
    for lane in range(layout.lanes):
        mine = starts[lanes == lane]
        rows = kept(history, lane, layout.capacity)
        if (data := episodes(rows, layout.need)) is None:
            assert not len(mine)
            continue
        try:
            chunks = Chunks(data, layout.horizon, layout.gamma, layout.need)
        except ValueError:
            assert not len(mine)
            continue
        assert len(mine) == len(chunks), (lane, mine, chunks.starts)
        assert_same(replay.gather(mine), chunks.gather(chunks.starts))
        found += len(mine)
    assert found == len(replay.starts) == replay.size()
    stored = sum(len(kept(history, lane, layout.capacity)) for lane in range(layout.lanes))
    # A closing observation outlives its row by one step, a row never its closing observation.
    assert len(replay) == stored
    return found


def layout(**changes) -> Layout:
    values = {"observations": 2, "action_dim": 3, "horizon": 2, "gamma": GAMMA, "lanes": 3}
    return Layout(**values | {"capacity": CAPACITY} | changes)


def filled(layout: Layout, rows: int, seed: int = 0, **options) -> tuple[Replay, History]:
    history = History(seed, layout.lanes, steps=layout.steps)
    replay = Replay(layout, **options)
    for _ in range(rows):
        replay.add(history.row())
    return replay, history


def numbered(i: int) -> Rows:
    """Row i, all of which follows from i."""
    rng = np.random.default_rng(i)
    before, after = (np.random.default_rng(j).normal(size=(3, 2)).astype(np.float32) for j in (i, i + 1))
    actions, rewards = (rng.normal(size=size).astype(np.float32) for size in ((3, 1, 3), (3,)))
    ends = (i + np.arange(3)) % 7 == 6
    terminals = ends & (rng.random(3) < 0.5)
    columns = before, actions, rewards, terminals, ends & ~terminals, np.ones(3, int), after
    return Rows(*map(torch.from_numpy, columns))

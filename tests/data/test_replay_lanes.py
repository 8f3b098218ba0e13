"""Lanes that come one at a time, as robots do: what is stored is what whole rounds would have stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from histories import NEEDS, History, assert_same, layout

from qsteer.data.layout import Rows
from qsteer.data.replay import Replay


def of_lanes(row: Rows, lanes: list[int]) -> Rows:
    return Rows(*(None if column is None else column[lanes] for column in row))


@pytest.mark.parametrize("need", NEEDS)
def test_lanes_that_come_apart_store_what_whole_rounds_store(need: str, tmp_path: Path) -> None:
    history, rng = History(3, lanes=4), np.random.default_rng(4)
    whole = Replay(layout(need=need, lanes=4))
    apart = Replay(layout(need=need, lanes=4), directory=tmp_path)
    for _ in range(80):  # more than a lane holds
        row = history.row()
        if rng.random() < 0.2:  # a row that is not kept cuts its own lane and no other
            row = row._replace(kept=torch.from_numpy(rng.random(4) < 0.5))
        whole.add(row)
        order = rng.permutation(4).tolist()
        for lanes in (order[:1], order[1:3], order[3:]):
            apart.add(of_lanes(row, lanes), lanes)
        assert apart.added == whole.added and len(apart) == len(whole)
        assert torch.equal(apart.starts, whole.starts)
    assert_same(apart.gather(apart.starts), whole.gather(whole.starts), skip=())
    apart.close()
    again = Replay(layout(need=need, lanes=4), directory=tmp_path)
    whole.cut()
    assert torch.equal(again.starts, whole.starts)
    assert_same(again.gather(again.starts), whole.gather(whole.starts), skip=())


def test_a_lane_waits_without_being_cut() -> None:
    history = History(0, 2, longest=1000)
    history.left[:] = 1000
    rows = [history.row() for _ in range(6)]
    replay = Replay(layout(lanes=2))
    for row in rows[:2]:
        replay.add(of_lanes(row, [0]), [0])
    for row in rows:
        replay.add(of_lanes(row, [1]), [1])
    for row in rows[2:]:
        replay.add(of_lanes(row, [0]), [0])
    together = Replay(layout(lanes=2))
    for row in rows:
        together.add(row)
    assert replay.size() == together.size() > 0
    assert_same(replay.gather(replay.starts), together.gather(together.starts), skip=())


@pytest.mark.parametrize("lanes", [[0, 0], [2], [-1]])
def test_lanes_that_are_not_there_are_named(lanes: list[int]) -> None:
    row = of_lanes(History(0, 2).row(), [0] * len(lanes))
    with pytest.raises(ValueError, match="expected different lanes from 0 to 1"):
        Replay(layout(lanes=2)).add(row, lanes)


def test_rows_of_another_number_than_the_lanes_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected terminals \(1,\), got \(2,\)"):
        Replay(layout(lanes=2)).add(History(0, 2).row(), [0])

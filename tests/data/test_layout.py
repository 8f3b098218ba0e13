"""Rows and layouts that do not fit are refused."""

import pytest
import torch
from histories import History, layout

from qsteer.data.replay import Replay


def test_wrong_rows_are_refused() -> None:
    history, replay = History(0, 3), Replay(layout())
    row = history.row()
    for wrong, message in (
        ({"rewards": row.rewards[:, None]}, r"rewards \(3,\) of torch.float32, got \(3, 1\)"),
        ({"observations": row.observations[:1]}, r"observations \(3, 2\)"),
        ({"observations": row.observations.to(torch.uint8)}, "torch.uint8"),
        ({"observations": {"observation.state": row.observations}}, "expected a tensor of observations"),
        ({"terminals": row.terminals[:1]}, r"terminals \(3,\), got \(1,\)"),
        ({"executed": torch.tensor([1, 2])}, r"executed \(3,\), got \(2,\)"),
        ({"executed": torch.tensor([1, 2, 1])}, "expected 1 executed steps"),
        ({"executed": torch.tensor([1, 0, 1])}, "expected 1 executed steps"),
    ):
        with pytest.raises(ValueError, match=message):
            replay.add(row._replace(**wrong))
    assert (len(replay), replay.added) == (0, 0)
    with pytest.raises(ValueError, match=r"got no \['observation.state'\]"):
        Replay(layout(observations={"observation.state": ((2,), "float32")})).add(row)
    endless = Replay(layout(need="returns", gamma=1.0))
    with pytest.raises(ValueError, match="gamma < 1"):
        endless.add(row._replace(terminals=torch.zeros(3).bool(), truncations=torch.ones(3).bool()))
    with pytest.raises(ValueError, match=r"expected x of one of .* got 'bfloat16'"):
        layout(observations={"x": ((2,), "bfloat16")})
    for wrong in ({"lanes": 0}, {"gamma": 1.1}, {"need": "actions"}, {"capacity": 4}, {"horizon": 0}):
        with pytest.raises(ValueError, match=f"Layout.{next(iter(wrong))}"):
            layout(**wrong)

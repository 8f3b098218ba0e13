"""Mixed batches: the share that was asked for, or uniform over all transitions of both."""

from dataclasses import fields, replace

import pytest
import torch
from histories import GAMMA, SLOTS, assert_same, episodes, filled, layout
from torch import Tensor

from qsteer.data import Chunks, Transitions
from qsteer.data.mixed import Mixed
from qsteer.data.replay import Replay


def offline(gamma: float = GAMMA, horizon: int = 2) -> Chunks:
    data = episodes(filled(layout(lanes=1, capacity=200), 100, seed=5)[1].log[0], "next_actions")
    assert data is not None
    return Chunks(data, horizon, gamma, "next_actions")


def test_mixed_batches_have_the_share_that_was_asked_for() -> None:
    chunks, (replay, _) = offline(), filled(layout(), 60)
    data = len(chunks.episodes)
    for ratio, expected in ((0.0, 0), (0.25, 16), (0.5, 32), (1.0, 64)):
        mixed = Mixed(chunks, replay, ratio)
        batch = mixed.sample(64, torch.Generator().manual_seed(0))
        online = batch.rows >= data
        assert int(online.sum()) == expected
        assert_same(replay.gather(batch.rows[online] - data), part(batch, online))
        assert_same(chunks.gather(batch.rows[~online]), part(batch, ~online))
    lane = Mixed(chunks, replay, 1.0, range(1, 2)).sample(64, torch.Generator().manual_seed(0))
    assert ((lane.rows - data) // SLOTS == 1).all()


def test_mixed_is_uniform_over_all_transitions_of_both() -> None:
    chunks, (replay, _) = offline(), filled(layout(), 60)
    mixed = Mixed(chunks, replay)
    assert len(mixed) == len(chunks) + replay.size()
    rows = mixed.sample(len(mixed) * 1000, torch.Generator().manual_seed(0)).rows
    found, counts = rows.unique(return_counts=True)
    assert torch.equal(found, torch.cat([chunks.starts, replay.starts.sort().values + len(chunks.episodes)]))
    assert (counts - 1000).abs().max() < 5 * 1000**0.5  # five standard deviations of a binomial


def test_mixed_is_offline_alone_until_there_is_something_else() -> None:
    chunks, replay = offline(), Replay(layout())
    for ratio in (None, 0.5):
        draws = [
            source.sample(9, torch.Generator().manual_seed(1))
            for source in (chunks, Mixed(chunks, replay, ratio))
        ]
        assert_same(*draws, skip=())
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 2"):
        Mixed(chunks, replay, 2)
    with pytest.raises(ValueError, match="same horizon and gamma"):
        Mixed(offline(gamma=0.5), replay)
    with pytest.raises(
        ValueError, match=r"need='next_actions' of both, got need='returns' offline; .*need='n"
    ):
        Mixed(Chunks(chunks.episodes, 2, GAMMA, "returns"), replay)


def part(batch: Transitions, mask: Tensor) -> Transitions:
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: x[mask] for name, x in columns.items() if isinstance(x, Tensor)})

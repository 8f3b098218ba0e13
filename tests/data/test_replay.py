"""Replay: the transitions of ``Chunks`` over the same history, whatever was overwritten, cut or killed."""

import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import GAMMA, NEEDS, SLOTS, History, assert_same, compare, episodes, filled, layout
from torch import Tensor

from qsteer.data import Chunks
from qsteer.data.episodes import join_transitions
from qsteer.data.layout import Rows
from qsteer.data.replay import Replay


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_transitions_are_those_of_chunks_over_the_same_history(horizon: int, need: str) -> None:
    """Every admissible start and every field, bit for bit, while old rows are overwritten and lanes cut."""
    history = History(horizon, lanes=4)
    replay = Replay(layout(horizon=horizon, need=need, lanes=4))
    found = 0
    for step in range(100):
        replay.add(history.row())
        if history.rng.random() < 0.05:
            mask = history.rng.random(4) < 0.5
            replay.cut(torch.from_numpy(mask))
            history.cut(mask)
        if step % 4 == 0:
            found += compare(replay, history)
    assert found > 200
    assert replay.added == 400


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("horizon", [1, 2])
def test_rows_of_several_steps_are_what_their_steps_say(horizon: int, need: str) -> None:
    """Of all chunks of ``horizon * n`` primitive steps, exactly those that start with a row."""
    n = 3
    replay, history = filled(layout(steps=n, horizon=horizon, need=need, lanes=1, capacity=500), 60)
    if (
        need == "returns"
    ):  # the last step's reward goes on for ever, and so does the last row's: let them agree
        history, costs = History(0, 1, steps=n), Replay(replay.layout)
        for _ in range(60):
            row = history.row()
            sums = (GAMMA ** torch.arange(n) * (torch.arange(n) < row.executed[:, None])).sum(1)
            costs.add(row._replace(rewards=-sums.float()))
        replay = costs
    (rows,) = history.log
    steps, begins = [], []
    for row in rows:
        begins.append(len(steps))
        for k in range(count := len(row["actions"])):
            last = k == count - 1
            steps.append(
                {
                    "observation": row["observation"] if k == 0 else np.full(2, -99, np.float32),
                    "next": row["next"],
                    "actions": row["actions"][k : k + 1],
                    "reward": np.float32(-1) if need == "returns" else row["rewards"][k],
                    "terminal": row["terminal"] and last,
                    "end": row["end"] and last,
                    "cut": False,
                }
            )
    chunks = Chunks(episodes(steps, need), horizon * n, GAMMA, need)
    expected = [start for start in chunks.starts.tolist() if start in begins]
    batch, truth = replay.gather(replay.starts), chunks.gather(torch.tensor(expected))
    assert len(expected) == len(batch.rows) > 15
    assert_same(batch, truth, skip=("rows", "rewards", "returns"))
    torch.testing.assert_close(batch.rewards, truth.rewards)
    if need == "returns":
        torch.testing.assert_close(batch.returns, truth.returns)


def test_every_transition_is_drawn_by_exactly_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform, because the numbers drawn map one to one to the admissible starts."""
    replay, _ = filled(layout(), 60)
    lane = replay.starts // SLOTS
    generator = torch.Generator()
    for lanes, mask in (
        (None, lane >= 0),
        (slice(1, 3), lane >= 1),
        (range(0, 2), lane < 2),
        (slice(2, 3), lane == 2),
    ):
        total = int(mask.sum())
        assert replay.size(lanes) == total > 5

        def every(high: int, size: tuple[int, ...], *, total: int = total, **_) -> Tensor:
            assert (high, size) == (total, (total,))
            return torch.arange(total)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", every)
            rows = replay.sample(total, generator, lanes).rows
        assert torch.equal(rows, replay.starts[mask])
    whole = replay.sample(9, torch.Generator().manual_seed(0), [slice(0, 1), range(1, 3)])
    generator = torch.Generator().manual_seed(0)
    parts = [replay.sample(9, generator, lanes) for lanes in (range(0, 1), slice(1, 3))]
    assert_same(whole, join_transitions(parts), skip=())
    draws = [replay.sample(500, torch.Generator().manual_seed(s)).rows for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0].unique(), replay.starts.sort().values)


def test_nothing_can_be_drawn_before_a_transition_is_whole() -> None:
    history, replay = History(0, 2, longest=1000), Replay(layout(lanes=2))
    history.left[:] = 1000
    for ready in (False, False, False, True):  # SARSA with a horizon of two rows: the fourth completes one
        assert not replay.ready()
        with pytest.raises(RuntimeError, match="add rows until ready"):
            replay.sample(4, torch.Generator())
        replay.add(history.row())
        assert replay.ready() == replay.ready(slice(1, 2)) == ready


def test_images_are_stored_once_and_stay_bytes() -> None:
    shapes = {"observation.state": ((2,), "float32"), "observation.images.a": ((3, 4, 4), "uint8")}
    replay = Replay(layout(observations=shapes, need="next_state", horizon=1, lanes=1))
    plain = Replay(layout(need="next_state", horizon=1, lanes=1))
    history = History(0, 1)
    for _ in range(70):
        row = history.row()
        # The picture repeats the state: what one finds in a batch, one must find in the other.
        picture, after = (
            (x * 1000).to(torch.int32).view(torch.uint8)[..., :1, None].expand(1, 3, 4, 4).contiguous()
            for x in (row.observations[..., :1], row.next_observations[..., :1])
        )
        both = {"observation.state": row.observations, "observation.images.a": picture}
        behind = {"observation.state": row.next_observations, "observation.images.a": after}
        replay.add(row._replace(observations=both, next_observations=behind))
        plain.add(row)
    state = replay.state_dict()
    assert state["observations.observation.images.a"].numel() == SLOTS * 3 * 4 * 4
    batch, other = replay.gather(replay.starts), plain.gather(plain.starts)
    for seen, alone in (
        (batch.observations, other.observations),
        (batch.next_observations, other.next_observations),
    ):
        assert torch.equal(seen["observation.state"], alone)
        image = seen["observation.images.a"]
        assert image.dtype == torch.uint8
        assert torch.equal(image[:, 0, 0, 0], (alone[:, :1] * 1000).to(torch.int32).view(torch.uint8)[:, 0])


def test_without_the_observation_behind_a_truncation_its_last_chunk_is_not_drawn() -> None:
    """The next rows are those of another episode; a terminal needs nothing behind it."""
    kinds = {}
    for kind in ("terminals", "truncations"):
        replay = Replay(layout(observations=1, action_dim=1, horizon=1, need="next_state", lanes=1))
        for k in range(6):
            row = Rows(
                torch.tensor([[float(k)]]), torch.zeros(1, 1, 1), torch.zeros(1), *torch.zeros(2, 1).bool()
            )
            replay.add(row._replace(**{kind: torch.tensor([k == 2])}))
        batch = replay.gather(replay.starts)
        kinds[kind] = batch.observations.flatten().tolist()
        alive = batch.masks == 1
        assert torch.equal(batch.next_observations[alive], batch.observations[alive] + 1)
        assert (~alive).sum() == (kind == "terminals")
    assert kinds == {"terminals": [0, 1, 2, 3, 4], "truncations": [0, 1, 3, 4]}


@pytest.mark.parametrize("need", NEEDS)
def test_a_checkpoint_resumes_to_the_bit(need: str) -> None:
    for rows in (7, 60):
        replay, history = filled(layout(need=need), rows)
        other = Replay(layout(need=need))
        other.load_state_dict({name: tensor.clone() for name, tensor in replay.state_dict().items()})
        for _ in range(40):
            row = history.row()
            replay.add(row)
            other.add(row)
            assert (len(other), other.added) == (len(replay), replay.added)
            if replay.ready():
                draws = [r.sample(50, torch.Generator().manual_seed(3)) for r in (replay, other)]
                assert_same(*draws, skip=())
        assert replay.ready()


def test_one_thread_adds_while_another_draws() -> None:
    """Rows carry their episode and step: a torn or a mixed transition would show."""
    replay = Replay(layout(observations=2, action_dim=2, capacity=40, lanes=2))
    stop, failures = threading.Event(), []

    def collect() -> None:
        for i in range(1200):
            episode, step = divmod(i, 10)
            at = torch.tensor([[episode, step]] * 2).float()
            ends = torch.full((2,), step == 9)
            replay.add(
                Rows(at, at[:, None], at[:, 1], ends & bool(episode % 2), ends & bool(not episode % 2))
            )
        stop.set()

    thread = threading.Thread(target=collect)
    thread.start()
    generator, drawn = torch.Generator().manual_seed(0), 0
    while not stop.is_set():
        if not replay.ready():
            continue
        batch = replay.sample(32, generator)
        episode, step = batch.observations.T
        alive = batch.masks == 1
        steps = torch.stack([batch.actions[:, 0, 1], batch.actions[:, 1, 1]], 1)
        good = (batch.actions[..., 0] == episode[:, None]).all() and (
            batch.next_actions[..., 0] == episode[:, None]
        ).all()
        good &= (steps[:, 0] == step).all() and (steps[alive, 1] == step[alive] + 1).all()
        good &= (batch.next_observations[alive] == torch.stack([episode, step + 2], 1)[alive]).all()
        drawn += 1
        if not good:
            failures.append(batch)
    thread.join()
    assert not failures
    assert drawn > 20


@pytest.mark.gpu
@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("stored", ["memory", "directory"])
def test_on_a_gpu_it_is_the_same(tmp_path: Path, need: str, stored: str) -> None:
    directory = tmp_path if stored == "directory" else None
    here, there = (
        filled(layout(need=need), 90, directory=path, device=device)[0]
        for path, device in ((None, "cpu"), (directory, "cuda"))
    )
    assert torch.equal(here.starts, there.starts.cpu())
    for generator in (torch.Generator("cuda"), torch.Generator()):
        batch = there.sample(64, generator.manual_seed(0))
        assert batch.actions.is_cuda
        same = here.gather(batch.rows.cpu())
        for f in fields(batch):
            value = getattr(batch, f.name)
            if isinstance(value, Tensor):
                torch.testing.assert_close(value.cpu(), getattr(same, f.name))


@pytest.mark.parametrize("need", NEEDS)
def test_a_row_that_is_not_kept_leaves_nothing_and_cuts_its_episode(need: str) -> None:
    """What is drawn is what it would be, had the lane been cut and had only the others gone on."""
    history = History(5, lanes=3)
    replay = Replay(layout(need=need, lanes=3))
    left = 0
    for step in range(80):
        row = history.row()
        if step % 7 == 3:
            kept = np.array([step % 3 != lane for lane in range(3)])
            row.rewards[~kept], row.observations[~kept] = torch.nan, torch.inf
            row = row._replace(kept=torch.from_numpy(kept))
            for log, keep in zip(history.log, kept, strict=True):
                if not keep:
                    log.pop()
                    left += 1
            history.cut(~kept)
        replay.add(row)
        compare(replay, history)
    assert left == 11 and replay.added == 240
    for row in (replay.gather(replay.starts), replay.sample(256, torch.Generator().manual_seed(0))):
        assert row.rewards.isfinite().all() and row.observations.isfinite().all()


@pytest.mark.parametrize("column", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_by_name_and_lane(column: str, bad: float) -> None:
    history, replay = History(0, lanes=3), Replay(layout(lanes=3))
    replay.add(history.row())
    row = history.row()
    getattr(row, column)[1] = bad
    with pytest.raises(ValueError, match=rf"expected finite {column}, got NaN or infinity first in lane 1"):
        replay.add(row)
    assert replay.added == 3


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("horizon", [1, 3])
def test_dropped_rows_leave_what_is_left_when_their_episodes_are_cut_there(horizon: int, need: str) -> None:
    """Before and after them, bit for bit what Chunks has; and so in a replay that is opened again."""
    replay, history = filled(layout(lanes=1, capacity=200, horizon=horizon, need=need), 120, seed=7)
    rows = history.log[0]
    limit = sorted(abs(row["reward"]) for row in rows)[-6]
    wrong = [i for i, row in enumerate(rows) if abs(row["reward"]) >= limit]
    spared = [i for i in wrong if rows[i]["terminal"] and rows[i]["reward"] > 0]
    found = replay.drop(lambda rewards: rewards.abs() >= float(limit))
    expected = sorted(float(rows[i]["reward"]) for i in wrong if i not in spared)
    assert sorted(reward for _, _, reward in found) == expected
    assert replay.drop(lambda rewards: rewards.abs() >= float(limit)) == [], "they are gone"
    for i in reversed([i for i in wrong if i not in spared]):
        if i and not rows[i - 1]["end"]:
            rows[i - 1] |= {"end": True, "cut": True}
        del rows[i]
    data = episodes(rows, need)
    assert data is not None
    chunks = Chunks(data, horizon, GAMMA, need)
    assert len(replay.starts) == replay.size() == len(chunks)
    assert_same(replay.gather(replay.starts), chunks.gather(chunks.starts))

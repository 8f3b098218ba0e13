"""Replay: the transitions of ``Chunks`` over the same history, whatever was overwritten, cut or killed."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qsteer.data import Chunks, Episodes, Transitions
from qsteer.data.episodes import join_transitions
from qsteer.data.layout import Layout, Rows
from qsteer.data.mixed import Mixed
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
                    "observation": row["observation"] if k == 0 else np.full(2, np.nan, np.float32),
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


@pytest.mark.parametrize("need", NEEDS)
def test_a_directory_is_continued_where_it_was_left(tmp_path: Path, need: str) -> None:
    """Running episodes are cut there; all else is as it is in memory."""
    history, memory = History(1, 3), Replay(layout(need=need))
    for life in range(4):
        replay = Replay(layout(need=need), directory=tmp_path)
        assert (len(replay), replay.added) == (len(memory), memory.added)
        assert torch.equal(replay.starts, memory.starts)
        for _ in range(11 + life):
            row = history.row()
            replay.add(row)
            memory.add(row)
        compare(replay, history)
        assert_same(replay.gather(replay.starts), memory.gather(memory.starts), skip=())
        replay.flush()
        del replay
        memory.cut()
        history.cut(np.ones(3, bool))
    with pytest.raises(ValueError, match=r"replay with horizon=3, got one with horizon=2"):
        Replay(layout(need=need, horizon=3), directory=tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("need", NEEDS)
def test_a_row_that_was_not_acknowledged_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need: str
) -> None:
    """Stop between any two stores of a row: what was there before is there, in a lane that is full too."""
    history = History(2, 3)
    replay = Replay(layout(need=need), directory=tmp_path)
    stopped = 0
    for step in range(45):
        row = history.row()
        acknowledged = step < 36 or step % 3 == 0
        if not acknowledged:
            store, left = Replay._write, step % 4

            def dying(self: Replay, *args, store: Callable = store) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                store(self, *args)

            def dead(*_) -> None:
                raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(Replay, "_write", dying)
                patch.setattr("qsteer.data.files.ReplayFiles.commit", dead)
                with pytest.raises(Killed):
                    replay.add(row)
            del replay
            for log in history.log:
                log.pop()
            stopped += 1
            history.cut(np.ones(3, bool))
            replay = Replay(layout(need=need), directory=tmp_path)
        else:
            replay.add(row)
        compare(replay, history)
    assert stopped == 6


KILLS = """
import os, random, shutil, signal, sys, time
import torch
sys.path.insert(0, sys.argv[3])
from test_replay import layout, numbered
from qsteer.data.replay import Replay

torch.set_num_threads(1)
directory, kills = sys.argv[1], int(sys.argv[2])
for kill in range(kills):
    source, sink = os.pipe()
    if not (pid := os.fork()):
        replay = Replay(layout(), directory=directory)
        while True:
            i = replay.added // 3
            replay.add(numbered(i))
            os.write(sink, i.to_bytes(8))
    os.close(sink)
    for _ in range(20):
        last = os.read(source, 8)
    time.sleep(random.uniform(0.0, 0.08))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    acknowledged = last + b"".join(iter(lambda: os.read(source, 65536), b""))
    os.close(source)
    shutil.copytree(directory, f"{directory}-{kill}")
    print(int.from_bytes(acknowledged[-8:]), flush=True)
"""


def numbered(i: int) -> Rows:
    """Row i, all of which follows from i."""
    rng = np.random.default_rng(i)
    before, after = (np.random.default_rng(j).normal(size=(3, 2)).astype(np.float32) for j in (i, i + 1))
    actions, rewards = (rng.normal(size=size).astype(np.float32) for size in ((3, 1, 3), (3,)))
    ends = (i + np.arange(3)) % 7 == 6
    terminals = ends & (rng.random(3) < 0.5)
    columns = before, actions, rewards, terminals, ends & ~terminals, np.ones(3, int), after
    return Rows(*map(torch.from_numpy, columns))


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Five processes in turn continue one directory until each is killed: bit for bit what they have said."""
    kills, history, added = 5, History(0, 3), 0
    run = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "replay", str(kills), Path(__file__).parent],
        capture_output=True,
        text=True,
        check=True,
    )
    for kill, last in enumerate(map(int, run.stdout.split())):
        replay = Replay(layout(), directory=f"{tmp_path / 'replay'}-{kill}")
        rows = replay.added // 3
        assert rows in (last + 1, last + 2)  # the row on its way may have made it
        assert rows > added
        for i in range(added, rows):
            row = numbered(i)
            for lane, log in enumerate(history.log):
                end = bool(row.terminals[lane] | row.truncations[lane])
                log.append(
                    {
                        "observation": row.observations[lane].numpy(),
                        "next": row.next_observations[lane].numpy(),
                        "actions": row.actions[lane].numpy(),
                        "reward": row.rewards[lane].numpy(),
                        "terminal": bool(row.terminals[lane]),
                        "end": end,
                        "cut": False,
                    }
                )
        history.cut(np.ones(3, bool))
        assert compare(replay, history) > 10
        added = rows
    assert kill == kills - 1


def test_a_directory_has_one_process(tmp_path: Path) -> None:
    code = (
        "import sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, tmp_path / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match="another has open"):
            Replay(layout(), directory=tmp_path)
        other.kill()
    assert Replay(layout(), directory=tmp_path).added == 0


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


def part(batch: Transitions, mask: Tensor) -> Transitions:
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: x[mask] for name, x in columns.items() if isinstance(x, Tensor)})


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

"""Replay: what environments do, kept so that whole batches of chunk transitions can be drawn at any time.

Each environment has a *lane*, a ring of slots. A *row* is one acting step, n primitive steps long, and takes
a slot; the observation after an episode's last row takes one more. Hence the observation after a row is that
of the next slot, and no image is stored twice. Which rows may start a transition is found out once, when it
becomes true, and kept in a queue per lane: drawing is exactly uniform and costs the same however much is
stored.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qsteer.critics.targets import chunk_return
from qsteer.data.episodes import Transitions
from qsteer.data.files import ReplayFiles
from qsteer.data.layout import (
    CLOSED,
    CLOSING,
    CUT,
    DROPPED,
    END,
    SPARE,
    TERMINAL,
    TRUNCATED,
    Layout,
    Rows,
    Trajectory,
    check_finite,
    column_name,
    split_episodes,
    take,
    to_numpy,
    to_slice,
)
from qsteer.types import Observation


class Replay:
    """What N environments did, and chunk transitions of it; a source like :class:`~qsteer.data.Chunks`.

    The rules are those of ``Chunks``: no transition reaches across the end of an episode, a terminal stops
    bootstrapping, a truncation does not. Under ``"returns"`` rows wait until their episode has ended, at a
    terminal or a time limit; the return of one that was cut is not known.

    One thread may add while another draws; on CUDA, on streams of their own.

    Args:
        layout: shapes.
        directory: where the rows are kept, as memory-mapped files; one that has rows is continued, and
            episodes that were running there are cut. ``None``: in memory, on ``device``.
        device: of batches.

    Attributes:
        layout, device: as given.
        added: rows that were ever added, in all lanes together; those that were not kept count.

    Raises:
        ValueError: the directory holds a replay of another layout.
        RuntimeError: another replay, of any process, has the directory open, or it cannot be locked.
    """

    def __init__(
        self, layout: Layout, *, directory: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.layout, self.device = layout, torch.device(device)
        self._slots, self._lane = layout.capacity + SPARE, np.arange(layout.lanes)
        self._lock = threading.Lock()
        self._files = None if directory is None else ReplayFiles(Path(directory), layout, self._slots)
        if self._files is not None:
            self._columns = {name: torch.from_numpy(column) for name, column in self._files.columns.items()}
        else:
            self._columns = {  # memory of the CPU that is not needed yet is not taken
                name: torch.from_numpy(np.zeros((layout.lanes, self._slots, *shape), dtype)).to(self.device)
                for name, (shape, dtype) in layout.columns.items()
            }
        # Slots that may start a transition, numbered since the beginning, oldest first.
        like = self._columns["codes"]
        self._columns["queue"] = like.new_zeros(layout.lanes, layout.capacity, dtype=torch.int64)
        self._event = torch.cuda.Event() if like.is_cuda else None
        # The same memory, or on a GPU copies of what the bookkeeping reads.
        names = self._columns if self._event is None else ("codes", "queue")
        self._host = {name: self._columns[name].cpu().numpy() for name in names}

        # Slot i of a lane, counted since the beginning, lies at i modulo the number of slots.
        zeros: np.ndarray = np.zeros(layout.lanes, np.int64)
        self._used, self._rows, self.added = zeros.copy(), zeros.copy(), 0
        self._front, self._tail = zeros.copy(), zeros.copy()  # of the queue
        self._begin, self._next = zeros.copy(), zeros.copy()  # running episode, and what to queue of it next
        if self._files is not None:
            self._used, self.added = self._files.committed()
        self._rebuild()
        self.cut()

    def __len__(self) -> int:
        """Return the number of rows that are stored now, in all lanes together."""
        return int(self._rows.sum())

    def size(self, lanes: slice | range | None = None) -> int:
        """Return the number of transitions that can be drawn now from consecutive lanes (``None``: all)."""
        return int((self._tail - self._front)[to_slice(lanes)].sum())

    def ready(self, lanes: slice | range | None = None) -> bool:
        """Return whether :meth:`sample` has something to draw from."""
        return self.size(lanes) > 0

    @property
    def starts(self) -> Int[Tensor, "S"]:
        """All rows that may start a transition now, lane by lane, oldest first, as batches number them."""
        parts = [
            lane * self._slots
            + self._host["queue"][lane, np.arange(a, b) % self.layout.capacity] % self._slots
            for lane, a, b in zip(self._lane, self._front, self._tail, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def rewards(self) -> Float[Tensor, "R"]:
        """Return the rewards of all rows that are stored and not dropped, on the CPU."""
        return torch.cat([self._rewards(lane)[1] for lane in self._lane.tolist()])

    def _rewards(self, lane: int) -> tuple[np.ndarray, Tensor]:
        slots = self._window(lane)
        slots = slots[self._host["codes"][lane, slots % self._slots] & (CLOSING | DROPPED) == 0]
        column = self._columns["rewards"][lane]
        return slots, column[torch.from_numpy(slots % self._slots).to(column.device)].cpu()

    def drop(self, find: Callable[[Tensor], Tensor]) -> list[tuple[int, int, float]]:
        """Take out rows that should not have been added, as if their episodes had been cut before and after.

        Args:
            find: says of rewards which are wrong. A positive one at a terminal stays: a success.

        Returns lane, slot since the lane's beginning, and reward of each. Cost: a pass over what is stored.
        """
        dropped: list[tuple[int, int, float]] = []
        with self._exclusive():
            for lane in self._lane.tolist():
                slots, rewards = self._rewards(lane)
                codes = self._host["codes"][lane]
                success = (codes[slots % self._slots] & TERMINAL > 0) & (rewards > 0).numpy()
                for i in np.flatnonzero(find(rewards).numpy() & ~success):
                    for slot in slots[max(i - 1, 0) : i + 1]:  # the row before, which may be an end, and it
                        old = int(codes[slot % self._slots])
                        new = old & CLOSED | CUT | DROPPED if slot == slots[i] else old or CUT
                        self._write({"codes": np.array([new])}, self._lane[[lane]], np.array([slot]))
                    dropped.append((lane, int(slots[i]), float(rewards[i])))
            self._rebuild()
        return dropped

    def add(self, rows: Rows, lanes: Sequence[int] | None = None) -> None:
        """Append one row to every lane, or to some ``lanes``, while the others wait; then they are stored.

        Cost: their copy, and bookkeeping that does not grow with what is stored.

        Raises:
            ValueError: a column has another shape or type, or is not finite; a row in the middle of an
                episode was not executed to its end; a truncated episode has no return (``"returns"`` with
                gamma 1); or there is no such lane, or one twice.
        """
        layout = self.layout
        lane = self._lane if lanes is None else layout.find_lanes(lanes)
        over, timed_out, executed, kept = layout.read_ends(rows, len(lane))
        ends, whole = over | timed_out, executed == layout.steps
        closed = ends if rows.next_observations is not None else np.zeros_like(ends)
        codes = over * TERMINAL + timed_out * TRUNCATED + closed * CLOSED
        columns = layout.read(
            len(lane), rows.observations, {"actions": rows.actions, "rewards": rows.rewards}
        ) | {"executed": torch.from_numpy(executed), "codes": torch.from_numpy(codes)}
        behind = {} if rows.next_observations is None else layout.read(len(lane), rows.next_observations)
        (into,), (ending,) = kept.nonzero(), closed.nonzero()
        check_finite(columns, into)
        check_finite(behind, ending)
        with self._exclusive():
            before, slot = self._used, self._used[lane]
            if len(into) < len(lane):
                columns = {name: column[into] for name, column in columns.items()}
            self._write(columns, lane[into], slot[into])
            if len(ending):
                after = {name: column[ending] for name, column in behind.items()}
                self._write(after | {"codes": np.full(len(ending), CLOSING)}, lane[ending], slot[ending] + 1)
            if layout.need == "returns":
                for i in ends.nonzero()[0]:
                    self._fill_returns(int(lane[i]), int(slot[i]) + 1, bool(over[i]))
            used, added = before.copy(), self.added + len(lane)
            used[lane] = slot + kept + closed
            if self._files is not None:
                self._files.commit(used, added)
            self._used, self.added = used, added
            self._rows[lane] += kept
            self._expire(before)
            usable = np.zeros_like(used)
            usable[lane] = np.where(kept, layout.usable(slot + 1, over, timed_out, closed, whole), 0)
            self._admit(usable)
            self._begin[lane[ends]] = used[lane[ends]]
            self._next = np.maximum(self._next, self._begin)
            self._cut(np.isin(self._lane, lane[~kept]))

    def cut(self, lanes: Bool[Tensor, "N"] | None = None) -> None:
        """End the episodes that are running in these lanes (``None``: all); how they went on is not known.

        What can be drawn of them stays so; the next row starts an episode.
        """
        with self._exclusive():
            self._cut(True if lanes is None else to_numpy(lanes))

    def _cut(self, lanes: np.ndarray | bool) -> None:
        (lane,) = ((self._begin < self._used) & lanes).nonzero()
        self._write({"codes": np.full(len(lane), CUT)}, lane, self._used[lane] - 1)
        self._begin[lane] = self._next[lane] = self._used[lane]

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        lanes: slice | range | Sequence[slice | range] | None = None,
    ) -> Transitions:
        """Draw transitions uniformly, with replacement, from consecutive lanes (``None``: all).

        Several groups of lanes give ``batch_size`` transitions each, one group after the other: those that as
        many calls would give. All randomness comes from ``generator``, which may live on any device.

        Cost: gathers of the batch; nothing grows with what is stored.

        Raises:
            RuntimeError: nothing can be drawn yet; see :meth:`ready`.
        """
        groups = [lanes] if lanes is None or isinstance(lanes, slice | range) else lanes
        with self._exclusive():
            drawn = [self._draw(batch_size, generator, to_slice(group)) for group in groups]
            lane, start = drawn[0] if len(drawn) == 1 else map(torch.cat, zip(*drawn, strict=True))
            return self._gather(lane, start)

    def gather(self, rows: Int[Tensor, "B"]) -> Transitions:
        """Return the transitions that start at ``rows`` (entries of :attr:`starts`)."""
        with self._exclusive():
            rows = rows.to(self._columns["queue"].device)
            return self._gather(rows // self._slots, rows % self._slots)

    def trajectories(self) -> Iterator[Trajectory]:
        """Give what is stored, episode after episode, lane by lane, while nothing is added."""
        columns = {name: self._columns[name].flatten(0, 1) for name in self.layout.columns}

        def at(first: int, stop: int) -> Tensor:
            return (
                lane * self._slots + torch.arange(first, stop, device=columns["codes"].device) % self._slots
            )

        for lane in self._lane.tolist():
            for first, stop, code in zip(*(x.tolist() for x in self._episodes(lane)), strict=True):
                if code & DROPPED:
                    continue
                rows = at(first, stop)
                yield Trajectory(
                    observations=self._observations(columns, rows),
                    actions=self._out(columns["actions"][rows]),
                    rewards=self._out(columns["rewards"][rows]),
                    executed=self._out(columns["executed"][rows]),
                    terminal=bool(code & TERMINAL),
                    truncated=bool(code & TRUNCATED),
                    closing=self._observations(columns, at(stop, stop + 1)) if code & CLOSED else None,
                )

    def flush(self) -> None:
        """Wait until all that was added is on the disk: a power failure then leaves it there, too."""
        if self._files is not None:
            with self._exclusive():
                self._files.flush()

    def close(self) -> None:
        """Let others open the directory."""
        if self._files is not None:
            self._files.close()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs to resume to the bit; nothing if a directory keeps the rows."""
        if self._files is not None:
            return {}
        with self._exclusive():
            filled = min(int(self._used.max()), self._slots)
            columns = {name: self._columns[name][:, :filled].clone() for name in self.layout.columns}
            return columns | {"used": torch.from_numpy(self._used.copy()), "added": torch.tensor(self.added)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a checkpoint's rows; episodes that were running go on unless they are :meth:`cut`."""
        if self._files is not None:
            return
        with self._exclusive():
            for name in self.layout.columns:
                self._columns[name][:, : state[name].shape[1]] = state[name].to(self._columns[name].device)
            self._host["codes"][:] = self._columns["codes"].cpu().numpy()
            self._used, self.added = to_numpy(state["used"]).copy(), int(state["added"])
            self._rebuild()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other threads out, and on a GPU their streams' work in order."""
        with self._lock:
            if self._event is None:
                yield
                return
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._event)
            yield
            self._event.record(stream)

    def _draw(self, batch_size: int, generator: torch.Generator, lanes: slice) -> tuple[Tensor, Tensor]:
        """Draw lanes and slots where transitions start."""
        front, count = self._front[lanes], (self._tail - self._front)[lanes]
        if not (total := int(count.sum())):
            raise RuntimeError(
                f"Replay.sample: expected a transition to draw, got none in {int(self._rows[lanes].sum())} "
                f"rows (horizon {self.layout.horizon}, need={self.layout.need!r}); add rows until ready()"
            )
        queue, ends = self._columns["queue"], count.cumsum()
        draw = torch.randint(total, (batch_size,), generator=generator, device=generator.device)
        draw = draw.to(queue.device)
        stops, offsets = torch.from_numpy(np.stack([ends, front - (ends - count)])).to(queue.device)
        index = torch.searchsorted(stops, draw, right=True)
        place = (draw + offsets[index]) % self.layout.capacity
        lane = index + int(self._lane[lanes][0])
        return lane, queue[lane, place]

    def _gather(self, lane: Tensor, start: Tensor) -> Transitions:
        layout, n = self.layout, self.layout.steps
        columns = {name: self._columns[name].flatten(0, 1) for name in layout.columns}
        k = torch.arange(layout.span + 1, device=lane.device)
        slots = lane[:, None] * self._slots + (start[:, None] + k) % self._slots
        rows = slots[:, :-1]
        codes = take(columns["codes"], rows)
        # Everything after the last row that the episode has is clamped to it.
        ends = codes & END > 0
        ended = ends.any(1)
        count = torch.where(ended, ends.byte().argmax(1) + 1, layout.span)
        last = count[:, None] - 1
        steps = last * n + take(columns["executed"], rows.gather(1, last))
        unclosed = ended & (codes.gather(1, last)[:, 0] & CLOSED == 0)
        following = slots.gather(1, (count - unclosed.long()).clamp(max=layout.horizon)[:, None])[:, 0]

        head = rows[:, : layout.horizon]
        rewards, masks = chunk_return(
            take(columns["rewards"], head),
            codes[:, : layout.horizon] & TERMINAL > 0,
            k[: layout.horizon] < count[:, None],
            layout.gamma**n,
        )
        step = torch.arange(layout.span * n, device=lane.device)
        at = torch.minimum(step, steps - 1)
        place = rows.gather(1, at // n) * n + at % n
        actions = self._out(take(columns["actions"].flatten(0, 1), place))
        chunk = layout.horizon * n
        return Transitions(
            rows=self._out(rows[:, 0]),
            observations=self._observations(columns, rows[:, 0]),
            actions=actions[:, :chunk],
            rewards=self._out(rewards),
            discount=layout.gamma**chunk,
            masks=self._out(masks),
            next_observations=self._observations(columns, following),
            next_actions=actions[:, chunk:] if layout.need == "next_actions" else None,
            valid=self._out(step[:chunk] < steps),
            returns=self._out(take(columns["returns"], rows[:, 0])) if layout.need == "returns" else None,
        )

    def _observations(self, columns: Mapping[str, Tensor], rows: Tensor) -> Observation:
        if isinstance(self.layout.observations, int):
            return self._out(take(columns[column_name("")], rows))
        return {key: self._out(take(columns[column_name(key)], rows)) for key in self.layout.observations}

    def _out(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _write(self, columns: Mapping[str, Tensor | np.ndarray], lane: np.ndarray, slot: np.ndarray) -> None:
        """Write values to slots of the columns."""
        for name, value in columns.items():
            column = self._columns[name]
            at = slot % column.shape[1]
            if name in self._host:
                self._host[name][lane, at] = to_numpy(value)
            if column.is_cuda:
                index = torch.from_numpy(lane), torch.from_numpy(at)
                column[index] = torch.as_tensor(value).to(column.device, column.dtype)

    def _fill_returns(self, lane: int, stop: int, over: bool) -> None:
        """Fill in the returns of the episode whose rows end before slot ``stop``."""
        layout, column = self.layout, self._columns["returns"]
        slots = np.arange(max(self._begin[lane], stop - layout.capacity), stop) % self._slots
        at = lane, torch.from_numpy(slots).to(column.device)
        rewards, executed = self._columns["rewards"][at].cpu(), self._columns["executed"][lane, slots[-1]]
        returns = layout.sum_returns(rewards, int(executed), over)
        column[at] = returns.to(column.device)

    def _expire(self, before: np.ndarray) -> None:
        """Forget the slots which the step from ``before`` has pushed out of the lanes."""
        capacity = self.layout.capacity
        oldest = self._used - capacity
        if oldest.max() <= 0:
            return
        for slot in range(SPARE):
            lost = before - capacity + slot
            gone = (lost >= 0) & (lost < oldest)
            self._rows -= gone & (self._host["codes"][self._lane, lost % self._slots] != CLOSING)
            waiting = self._front < self._tail
            self._front += waiting & (self._host["queue"][self._lane, self._front % capacity] < oldest)

    def _admit(self, end: np.ndarray) -> None:
        """Queue the rows of the latest episodes before slot ``end`` that are not queued yet."""
        first = np.maximum(self._next, self._used - self.layout.capacity)
        count = np.maximum(end - first, 0)
        lane = self._lane.repeat(count)
        offset = np.arange(len(lane)) - (count.cumsum() - count).repeat(count)
        self._write({"queue": first[lane] + offset}, lane, self._tail[lane] + offset)
        self._next, self._tail = first + count, self._tail + count

    def _rebuild(self) -> None:
        """Recompute from the stored codes what :meth:`add` keeps track of."""
        layout = self.layout
        self._rows[:] = self._front[:] = self._tail[:] = 0
        self._begin[:] = self._next[:] = self._used
        for lane in self._lane.tolist():
            begin, stop, code = self._episodes(lane)
            slots = self._window(lane)
            self._rows[lane] = (self._host["codes"][lane, slots % self._slots] != CLOSING).sum()
            if not len(stop):
                continue
            executed = self._columns["executed"][lane, torch.from_numpy((stop - 1) % self._slots)]
            end = layout.usable_by_code(stop, code, executed.cpu().numpy())
            end = np.maximum(begin, end)
            starts = np.concatenate([np.arange(a, b) for a, b in zip(begin, end, strict=True)])
            self._tail[lane] = len(starts)
            self._write({"queue": starts}, np.full(len(starts), lane), np.arange(len(starts)))
            if not code[-1]:
                self._begin[lane], self._next[lane] = begin[-1], end[-1]

    def _window(self, lane: int) -> np.ndarray:
        """Return the slots of a lane that are still stored."""
        return np.arange(max(0, self._used[lane] - self.layout.capacity), self._used[lane])

    def _episodes(self, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return first slot, slot after the last row, and code of the last row of a lane's episodes."""
        slots = self._window(lane)
        codes = self._host["codes"][lane, slots % self._slots]
        return split_episodes(slots, codes)

"""What a replay takes, stores and gives: the shapes of its rows, a row of every lane, and whole episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qsteer.checks import check_at_least, check_choice, check_fraction
from qsteer.critics.targets import monte_carlo_target
from qsteer.data.episodes import Need
from qsteer.types import Observation

DTYPES = ("uint8", "int32", "int64", "float16", "float32", "float64")

# What a slot holds. A row's slot is 0 while its episode goes on after it.
TERMINAL, TRUNCATED, CUT, CLOSED, CLOSING, DROPPED = 1, 2, 4, 8, 16, 32
END = TERMINAL | TRUNCATED | CUT

SPARE = 2
"""Slots that one row may take: those which are written next are never part of what is stored."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shapes of a replay's rows, and what is drawn from them.

    Attributes:
        observations: O, for one float32 vector; or key -> (shape, dtype), such as
            ``{"observation.images.image": ((3, 64, 64), "uint8")}``.
        action_dim: A.
        steps: n, primitive steps per row.
        horizon: chunk length in rows; transitions have chunks of ``H = horizon * n`` actions.
        gamma: discount per primitive step.
        need: what the learner reads: ``"next_actions"`` (SARSA), ``"next_state"`` (TD, IQL) or ``"returns"``
            (Monte Carlo).
        lanes: N, environments.
        capacity: rows and ends of episodes that a lane holds; the oldest are overwritten.
    """

    observations: int | Mapping[str, tuple[tuple[int, ...], str]]
    action_dim: int
    steps: int = 1
    horizon: int = 5
    gamma: float = 0.99
    need: Need = "next_actions"
    lanes: int = 1
    capacity: int = 100_000

    def __post_init__(self) -> None:
        """Check the values."""
        check_at_least(self, 1, "action_dim", "steps", "horizon", "lanes")
        check_fraction(self, "gamma")
        check_choice(self, "need", ("next_actions", "next_state", "returns"))
        for key, (_, dtype) in {} if isinstance(self.observations, int) else self.observations.items():
            if dtype not in DTYPES:
                raise ValueError(f"Layout.observations: expected {key} of one of {DTYPES}, got {dtype!r}")
        if self.capacity <= self.span:
            raise ValueError(
                f"Layout.capacity: expected more than the {self.span} rows of a transition, got "
                f"{self.capacity}; raise it, or lower the horizon"
            )

    @property
    def span(self) -> int:
        """Rows of a transition: those of the chunk, and with SARSA those of the next."""
        return self.horizon * (2 if self.need == "next_actions" else 1)

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of a slot of each stored column."""
        columns: dict[str, tuple[tuple[int, ...], str]] = {}
        if isinstance(self.observations, int):
            columns[column_name("")] = (self.observations,), "float32"
        else:
            columns |= {
                column_name(key): (tuple(shape), dtype) for key, (shape, dtype) in self.observations.items()
            }
        columns |= {"actions": ((self.steps, self.action_dim), "float32"), "rewards": ((), "float32")}
        columns |= {"executed": ((), "int32"), "codes": ((), "uint8")}
        if self.need == "returns":
            columns["returns"] = ((), "float32")
        return columns

    def usable(
        self, stop: np.ndarray, over: np.ndarray, timed_out: np.ndarray, closed: np.ndarray, whole: np.ndarray
    ) -> np.ndarray:
        """Return the end of the rows of each episode that may start a transition: all before it may.

        Args:
            stop: slot after the episode's last row so far.
            over: it ended in a terminal, so nothing after it is needed.
            timed_out: it ended at a time limit.
            closed: the observation after the last row is stored.
            whole: all n steps of the last row were executed.
        """
        if self.need == "next_actions":
            end = stop - self.span + whole
        elif self.need == "next_state":
            end = stop - self.span + (closed & whole)
        else:
            end = np.where(timed_out, stop - self.span + whole, 0)
        return np.where(over, stop, end)

    def usable_by_code(self, stop: np.ndarray, code: np.ndarray, executed: np.ndarray) -> np.ndarray:
        """Return :meth:`usable` for stored episodes, by code and executed steps of their last rows."""
        closed = code & (CLOSED | DROPPED) == CLOSED
        return self.usable(stop, code & TERMINAL > 0, code & TRUNCATED > 0, closed, executed == self.steps)

    def sum_returns(self, rewards: Float[Tensor, "L"], executed: int, over: bool) -> Float[Tensor, "L"]:
        """Return the return from each row of an episode on, ``executed`` being the steps of its last row.

        Unless it is over, the last row's mean reward goes on for ever.
        """
        ends = torch.arange(len(rewards)) == len(rewards) - 1
        bootstrap = rewards
        if not over:
            bootstrap = rewards * self.gamma ** (executed - self.steps) / (1 - self.gamma**executed)
        return monte_carlo_target(rewards, ends & over, ends, self.gamma**self.steps, bootstrap=bootstrap)

    def find_lanes(self, lanes: Sequence[int]) -> Int[np.ndarray, "K"]:
        """Return the numbers of some lanes.

        Raises:
            ValueError: there is no such lane, or one twice.
        """
        found = np.asarray(lanes, np.int64)
        known = np.isin(found, np.arange(self.lanes)).all()
        if found.ndim != 1 or len(np.unique(found)) < len(found) or not known:
            raise ValueError(
                f"Replay.add: expected different lanes from 0 to {self.lanes - 1}, got {list(lanes)}"
            )
        return found

    def read(
        self, rows: int, observations: Observation, others: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return so many rows, checked, by the names and in the types of the columns.

        Raises:
            ValueError: observations are of another kind, or something is missing, of another shape, is
                floating point where its column is not, or the reverse, or lies beyond its column's type.
        """
        if isinstance(self.observations, int):
            if not isinstance(observations, Tensor):
                raise ValueError(
                    f"Replay.add: expected a tensor of observations, got {sorted(observations)}; name the "
                    "columns in Layout.observations"
                )
            given = {column_name(""): observations}
        else:
            got = {} if isinstance(observations, Tensor) else observations
            if missing := [key for key in self.observations if key not in got]:
                raise ValueError(
                    f"Replay.add: expected observations {sorted(self.observations)}, got no {missing}; give "
                    "a mapping with the columns of Layout.observations"
                )
            given = {column_name(key): got[key] for key in self.observations}
        columns, read = self.columns, {}
        for name, value in {**given, **(others or {})}.items():
            expected, dtype = (rows, *columns[name][0]), getattr(torch, columns[name][1])
            kinds = value.is_floating_point(), value.is_complex()
            if value.shape != expected or kinds != (dtype.is_floating_point, False):
                raise ValueError(
                    f"Replay.add: expected {name} {expected} of {dtype}, got {tuple(value.shape)} of "
                    f"{value.dtype}; give rows of the replay's Layout"
                )
            read[name] = _cast(name, value, dtype)
        return read

    def read_ends(self, rows: "Rows", count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return where the task is over, where a time limit ended it, the executed steps, and kept rows.

        All are (count,); a row that is not kept ends nothing.

        Raises:
            ValueError: a column has another shape, a row in the middle of an episode was not executed to its
                end, or a truncated episode has no return (``"returns"`` with gamma 1).
        """
        over = to_numpy(rows.terminals).astype(bool)
        timed_out = to_numpy(rows.truncations).astype(bool)
        executed = np.full(count, self.steps) if rows.executed is None else to_numpy(rows.executed)
        kept = np.ones(count, bool) if rows.kept is None else to_numpy(rows.kept).astype(bool)
        flags = {"terminals": over, "truncations": timed_out, "executed": executed, "kept": kept}
        for name, value in flags.items():
            if value.shape != (count,):
                raise ValueError(
                    f"Replay.add: expected {name} ({count},), got {value.shape}; give one a lane"
                )
        over, timed_out = over & kept, timed_out & ~over & kept
        executed = np.where(kept, executed, self.steps)
        ends, whole = over | timed_out, executed == self.steps
        if not (whole | ends).all() or executed.min() < 1 or executed.max() > self.steps:
            raise ValueError(
                f"Replay.add: expected {self.steps} executed steps, or 1 to {self.steps} where an episode "
                f"ends, got executed={executed.tolist()} with ends={ends.tolist()}; give rows of "
                f"{self.steps} steps"
            )
        if self.need == "returns" and self.gamma == 1 and timed_out.any():
            raise ValueError(
                "Replay.add: expected gamma < 1 for truncated episodes' returns, got 1; lower it"
            )
        return over, timed_out, executed, kept


class Rows(NamedTuple):
    """One row of every lane.

    Attributes:
        observations: before the row.
        actions: the executed ones; from ``executed`` on anything.
        rewards: ``sum_{k < executed} gamma^k r_k``.
        terminals: the task is over after the row; nothing follows.
        truncations: a time limit ended the episode; the world would go on.
        executed: primitive steps, fewer than n only where the episode ends; ``None``: n.
        next_observations: after the row; read where an episode ends, needed only by ``"next_state"`` after a
            truncation.
        kept: which rows to store; of the others nothing is read, and their episodes are cut. ``None``: all.
    """

    observations: Observation
    actions: Float[Tensor, "N n A"]
    rewards: Float[Tensor, "N"]
    terminals: Bool[Tensor, "N"]
    truncations: Bool[Tensor, "N"]
    executed: Int[Tensor, "N"] | None = None
    next_observations: Observation | None = None
    kept: Bool[Tensor, "N"] | None = None


class Trajectory(NamedTuple):
    """Consecutive rows of one episode, of which the first may be lost.

    Attributes:
        observations: before each of L rows.
        actions: of each row.
        rewards: of each row.
        executed: primitive steps of each row.
        terminal: the task is over after the last row.
        truncated: a time limit ended the episode after it; if neither, its end was not seen.
        closing: the observation after the last row, (1, ...), where it is stored.
    """

    observations: Observation
    actions: Float[Tensor, "L n A"]
    rewards: Float[Tensor, "L"]
    executed: Int[Tensor, "L"]
    terminal: bool
    truncated: bool
    closing: Observation | None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rewards)


def check_finite(columns: Mapping[str, Tensor], lanes: np.ndarray) -> None:
    """Check that the rows of some lanes hold numbers, and neither NaN nor infinity.

    Raises:
        ValueError: one does not.
    """
    for name, value in columns.items():
        if value.is_floating_point() and not (finite := find_finite(value))[lanes].all():
            lane = lanes[~finite[lanes]][0]
            raise ValueError(
                f"Replay.add: expected finite {name}, got NaN or infinity first in lane {lane}; mend it, or "
                "leave the row out (Rows.kept), which cuts its episode"
            )


def find_finite(value: Tensor) -> Bool[np.ndarray, "N"]:
    """Return which rows of a tensor hold numbers, and neither NaN nor infinity."""
    return to_numpy(value.flatten(1).isfinite().all(1) if value.ndim > 1 else value.isfinite())


def infer_columns(observations: Observation) -> int | dict[str, tuple[tuple[int, ...], str]]:
    """Return ``Layout.observations`` for observations like these (B, ...)."""
    if isinstance(observations, Tensor):
        return observations.shape[1]
    return {
        key: (tuple(value.shape[1:]), str(value.dtype).removeprefix("torch."))
        for key, value in observations.items()
    }


def column_name(key: str) -> str:
    """Return the column of an observation's entry; ``""`` stands for an observation that is one tensor."""
    return f"observations.{key}" if key else "observations"


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a value in its column's type, checked to fit; NaN and infinity stay what they are."""
    cast = value.to(dtype)
    if torch.promote_types(value.dtype, dtype) == dtype:
        return cast
    lost = value.isfinite() & ~cast.isfinite() if dtype.is_floating_point else cast.to(value.dtype) != value
    if value.dtype.is_signed and not dtype.is_signed:
        lost |= value < 0
    if lost.any():
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        lane = int(lost.nonzero()[0, 0])
        raise ValueError(
            f"Replay.add: expected {name} from {limits.min} to {limits.max}, which {dtype} holds, got "
            f"{value[lost][0].item()} in lane {lane}; give the column a wider type in Layout.observations"
        )
    return cast


def to_numpy(value: Tensor | np.ndarray) -> np.ndarray:
    """Return a tensor as an array on the CPU; an array is returned as it is."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def take(column: Tensor, rows: Tensor) -> Tensor:
    """Return ``column[rows]``, in a fraction of the time that indexing takes on a CPU."""
    return column.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def to_slice(lanes: slice | range | None) -> slice:
    """Return consecutive lanes as a slice; ``None`` means all."""
    if lanes is None:
        return slice(None)
    return slice(lanes.start, lanes.stop) if isinstance(lanes, range) else lanes


def split_episodes(slots: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first slot, slot after the last row, and code of the last row of the episodes in slots."""
    (last,) = (codes & END > 0).nonzero()
    if len(codes) and not codes[-1] & (END | CLOSING):  # an episode goes on
        last = np.append(last, len(codes) - 1)
    code, stop = codes[last], slots[last] + 1
    first = slots[:1] + (codes[:1] == CLOSING)
    return np.append(first, (stop + (code & CLOSED > 0))[:-1])[: len(stop)], stop, code

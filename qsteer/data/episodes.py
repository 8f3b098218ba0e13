"""Offline data: trajectories one after another, and chunk transitions that never cross a trajectory's end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from qsteer.checks import check_finite
from qsteer.contract import Contract
from qsteer.critics.targets import chunk_return, monte_carlo_target
from qsteer.fingerprints import fingerprint

type Need = Literal["actions", "next_state", "next_actions", "returns"]


@dataclass(frozen=True)
class Episodes:
    """N steps of trajectories, stored one after another.

    A *terminal* is an end of the task: nothing follows, so nothing is bootstrapped. An *end* is the last
    stored row of a trajectory, whether the task ended there or a time limit cut it. Play data goes on after a
    success, so a terminal need not be an end.

    What is unambiguous is converted: numpy arrays and lists to tensors, numbers of any real type to float32,
    flags of 0 and 1 to bool, (N, 1) rewards and flags to (N,).

    Attributes:
        observations: (N, O), state before the step.
        next_observations: (N, O), state after the step; at an end it is stored nowhere else.
        actions: (N, A), action of the step, in the units and bounds of the policy that is to be steered.
        rewards: (N,), reward of the step.
        terminals: (N,), bool: the task is over after this step.
        ends: (N,), bool: this row is the last of its trajectory.

    Raises:
        TypeError: a column holds no numbers.
        ValueError: a column has another shape or length, holds NaN or infinity, or flags other than 0 and 1;
            or the last row is no end. The message names the column.
    """

    # Tensors, once they are converted.
    observations: Any
    next_observations: Any
    actions: Any
    rewards: Any
    terminals: Any
    ends: Any

    def __post_init__(self) -> None:
        """Convert the columns and check them, and that the last trajectory ends."""
        for f in fields(self):
            read = _read_flags if f.name in ("terminals", "ends") else _read_numbers
            object.__setattr__(self, f.name, read(f"Episodes.{f.name}", getattr(self, f.name)))
        lengths = {f.name: len(getattr(self, f.name)) for f in fields(self)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Episodes: expected one row per step in every column, got lengths {lengths}")
        devices = {f.name: str(getattr(self, f.name).device) for f in fields(self)}
        if len(set(devices.values())) != 1:
            raise ValueError(f"Episodes: expected all columns on one device, got {devices}; move them")
        if self.next_observations.shape != self.observations.shape:
            raise ValueError(
                f"Episodes.next_observations: expected the shape of observations, "
                f"{tuple(self.observations.shape)}, got {tuple(self.next_observations.shape)}"
            )
        if not len(self.ends) or not bool(self.ends[-1]):
            raise ValueError(
                "Episodes.ends: expected True on the last row, got False; mark each trajectory's last"
            )

    @classmethod
    def from_ogbench(cls, data: Mapping[str, np.ndarray]) -> "Episodes":
        """Read an OGBench single-task dataset.

        There ``masks`` is 0 where the task is solved (our terminals) and ``terminals`` is 1 on a trajectory's
        last row (our ends).

        Raises:
            KeyError: a column is missing.
            ValueError: ``masks`` or ``terminals`` are not 0 and 1; and as the class says.
        """
        names = ("observations", "next_observations", "actions", "rewards", "masks", "terminals")
        if missing := [name for name in names if name not in data]:
            raise KeyError(f"OGBench data: expected {names}, got no {missing}; load a single-task dataset")
        columns = {name: data[name] for name in names}
        ends = _read_flags("OGBench data, terminals", columns.pop("terminals"))
        goes_on = _read_flags("OGBench data, masks", columns.pop("masks"))
        return cls(**{k: _to_tensor(k, v) for k, v in columns.items()}, terminals=~goes_on, ends=ends)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.actions)

    def to(self, device: torch.device | str) -> "Episodes":
        """Return the episodes on another device."""
        return Episodes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def contract(self) -> Contract:
        """Scale of the observations, and range of the actions.

        Cost: a pass over both.
        """
        std, mean = torch.std_mean(self.observations.double(), dim=0, correction=0)
        low, high = self.actions.aminmax(dim=0)
        return Contract(
            observation_mean=mean.tolist(),
            observation_std=std.clamp(min=0.01).tolist(),  # as the networks' normalisation
            action_dim=self.actions.shape[1],
            action_low=low.tolist(),
            action_high=high.tolist(),
        )

    def fingerprint(self) -> str:
        """Return a hash of the content: a resumed run must see the data that it started with."""
        return fingerprint(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Transitions:
    """A batch of chunk transitions ``(s, a[0:H], R, gamma^H, mask, s', a'[0:H], valid)``.

    Attributes:
        rows: row of the source where each chunk starts, (B,).
        observations: observation s at the start, an :data:`~qsteer.types.Observation`.
        actions: chunk; steps which the trajectory does not have repeat its last action.
        rewards: ``R = sum_k gamma^k r_k`` up to and including the first terminal.
        discount: gamma^H.
        masks: 0 when the chunk contains a terminal, else 1.
        next_observations: observation s' after the chunk; without meaning where the mask is 0.
        next_actions: the chunk after the chunk, without meaning where the mask is 0; ``None`` unless it was
            asked for.
        valid: step k of ``actions`` is stored in the trajectory.
        returns: discounted sum of the trajectory's rewards from the start of the chunk on; ``None`` unless it
            was asked for.
    """

    rows: Int[Tensor, "B"]
    observations: Any
    actions: Float[Tensor, "B H A"]
    rewards: Float[Tensor, "B"]
    discount: float
    masks: Float[Tensor, "B"]
    next_observations: Any
    next_actions: Float[Tensor, "B H A"] | None
    valid: Bool[Tensor, "B H"]
    returns: Float[Tensor, "B"] | None = None


@runtime_checkable
class Source(Protocol):
    """Where a learner's batches come from: :class:`Chunks` of a data set, or a replay."""

    def sample(self, batch_size: int, generator: torch.Generator, /) -> Transitions:
        """Draw transitions with replacement; all randomness comes from the generator."""
        ...


class Chunks:
    """All chunk transitions of some episodes, drawn in whole batches.

    Row numbers are clamped to the last row of the trajectory in which a chunk starts, so that no chunk and no
    pair of chunks can reach into another trajectory. Which rows may start a chunk depends on what the learner
    reads:

    * ``"actions"`` (behaviour cloning): all H steps are stored;
    * ``"next_state"`` (IQL, TD): as above, or the trajectory ends in a terminal before;
    * ``"returns"`` (Monte Carlo): the same;
    * ``"next_actions"`` (SARSA): moreover, unless the chunk contains a terminal, the same holds for the next
      chunk.
    """

    def __init__(self, episodes: Episodes, horizon: int, gamma: float, need: Need) -> None:
        """Find the admissible starts and sum their rewards once.

        Args:
            episodes: the data.
            horizon: H, actions per chunk.
            gamma: discount per step.
            need: what the learner reads, as the class says.

        Raises:
            ValueError: no trajectory is long enough.
        """
        self.episodes, self.horizon, self.discount = episodes, horizon, gamma**horizon
        self.need = need
        self.paired = need == "next_actions"
        row = torch.arange(len(episodes), device=episodes.ends.device)
        ends = row[episodes.ends]
        self.last = ends[torch.searchsorted(ends, row)]
        self.steps = torch.arange(horizon, device=row.device)

        rows = self._rows(row)
        self.valid = row[:, None] + self.steps <= self.last[:, None]
        self.rewards, self.masks = chunk_return(
            episodes.rewards[rows], episodes.terminals[rows], self.valid, gamma
        )
        self.returns = None
        if need == "returns":
            self.returns = monte_carlo_target(episodes.rewards, episodes.terminals, episodes.ends, gamma)
        stored, over = self.valid[:, -1], self.masks == 0
        usable = stored if need == "actions" else stored | over
        if self.paired:
            follower = row + horizon
            usable &= over | ((follower <= self.last) & usable[follower.clamp(max=len(row) - 1)])
        self.starts = row[usable]
        if not len(self.starts):
            raise ValueError(
                f"Chunks: expected trajectories of at least {horizon * (1 + self.paired)} steps for "
                f"need={need!r}, got at most {int((self.last - row).max()) + 1}; lower the horizon"
            )

    def __len__(self) -> int:
        """Return the number of admissible starts."""
        return len(self.starts)

    def sample(self, batch_size: int, generator: torch.Generator) -> Transitions:
        """Draw transitions uniformly, with replacement; the generator lives on the episodes' device."""
        draw = torch.randint(len(self.starts), (batch_size,), generator=generator, device=self.starts.device)
        return self.gather(self.starts[draw])

    def gather(self, rows: Int[Tensor, "B"]) -> Transitions:
        """Return the transitions that start at ``rows`` (entries of ``starts``)."""
        data = self.episodes
        chunk = self._rows(rows)
        following = self._rows(torch.minimum(rows + self.horizon, self.last[rows])) if self.paired else None
        return Transitions(
            rows=rows,
            observations=data.observations[rows],
            actions=data.actions[chunk],
            rewards=self.rewards[rows],
            discount=self.discount,
            masks=self.masks[rows],
            next_observations=data.next_observations[chunk[:, -1]],
            next_actions=None if following is None else data.actions[following],
            valid=self.valid[rows],
            returns=None if self.returns is None else self.returns[rows],
        )

    def _rows(self, start: Int[Tensor, "B"]) -> Int[Tensor, "B H"]:
        return torch.minimum(start[:, None] + self.steps, self.last[start, None])


def _to_tensor(name: str, column: Any) -> Tensor:
    """Return a column of numbers as a tensor, in its own type."""
    if not isinstance(column, Tensor):
        try:
            array = np.asarray(column)
        except ValueError as error:  # rows of different length
            raise TypeError(f"{name}: expected an array of numbers, got {error}") from None
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"{name}: expected a tensor or array of numbers, got {type(column).__name__} of "
                f"{array.dtype}; convert it"
            )
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.dtype.kind == "f" and array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        column = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if column.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {column.dtype}; convert it")
    return column


def _read_numbers(name: str, column: Any) -> Tensor:
    """Return observations or actions (N, K), or rewards (N,), as float32, checked."""
    given, single = _to_tensor(name, column), name.endswith("rewards")
    read = given[:, 0] if single and given.shape[1:] == (1,) else given
    if read.ndim != (1 if single else 2):
        raise ValueError(
            f"{name}: expected shape {'(N,)' if single else '(N, size)'}, got {tuple(given.shape)}; give one "
            f"{'number' if single else 'vector'} per step"
        )
    read = read.to(torch.float32)
    check_finite(name, read, "drop the trajectories that hold it, or repair them")
    return read


def _read_flags(name: str, column: Any) -> Tensor:
    """Return flags (N,) as bool, checked."""
    given = _to_tensor(name, column)
    flags = given[:, 0] if given.shape[1:] == (1,) else given
    if flags.ndim != 1:
        raise ValueError(f"{name}: expected shape (N,), got {tuple(given.shape)}; give one flag per step")
    if flags.dtype != torch.bool and (other := ((flags != 0) & (flags != 1)).nonzero()).numel():
        row = int(other[0])
        raise ValueError(f"{name}: expected flags 0 and 1, got {flags[row].item()} in row {row}; convert it")
    return flags.bool()


def join_transitions(batches: Sequence[Transitions]) -> Transitions:
    """Return several batches as one."""

    def column(name: str) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else tree_map(lambda *tensors: torch.cat(tensors), *parts)

    names = (f.name for f in fields(Transitions) if f.name != "discount")
    return Transitions(**{name: column(name) for name in names}, discount=batches[0].discount)

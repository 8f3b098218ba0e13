"""Simulators on the nodes of a Ray cluster: a node that dies costs the episodes that ran there, no more."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from qsteer.checks import check_at_least
from qsteer.envs.chunked import ChunkedAction, name_boxes
from qsteer.envs.limits import Limits
from qsteer.envs.workers import (
    CLOSING_S,
    Failure,
    Workers,
    build,
    describe_error,
    say_late,
    serve,
)

SETTLING_S = 3.0
"""Seconds in which a cluster notices that a core has become free."""

CORE, REST = 0.999, 0.0001
"""Of a core, what an actor asks Ray for, and one that replaces it: there is always room for that one, without
waiting until Ray knows which nodes are left, and never on a node that offers no core."""

FETCHING_S = 1.0
"""Seconds for an answer that is there, on another node."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Which Ray cluster simulators run on, and how they are dealt out.

    An actor is a process that asks Ray for one core and holds one or several environments, which it steps one
    after another. Actors are spread over the nodes. Every node needs the same qsteer and the same simulator.

    Attributes:
        address: ``"auto"``: the cluster that this machine is a node of; ``"HOST:PORT"``: that one, of which
            it is a node, too; ``"local"``: one of this machine's own, which ends with this process. Where the
            process is connected already, that connection is used.
        envs_per_actor: environments of an actor. With several, quick simulators save round trips and many
            need fewer cores; but where one hangs or ends the process, all of them are begun again.
    """

    address: str = "auto"
    envs_per_actor: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        check_at_least(self, 1, "envs_per_actor")
        if self.address not in ("auto", "local") and ":" not in self.address:
            raise ValueError(
                f"Cluster.address: expected auto, local or HOST:PORT, got {self.address!r}; "
                "`ray start --head` says the address"
            )


class Actors(Workers):
    """Workers on a Ray cluster; see :class:`Cluster`.

    An environment that raises is closed and built anew in its actor. An actor that dies, with its node or
    alone, or does not answer in time is killed and replaced on a node that is there, where it shares the
    cores of the others if none is free.

    Args:
        make_env: makes one environment; goes to the nodes by cloudpickle.
        num_envs: N.
        space: of the observations of one, a box or a mapping of them.
        cluster: which one.
        limits: of time and failures; an actor has the time of all its environments.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no such cluster.
        ValueError: too few of its cores are free, or this process is connected to another one.
    """

    def __init__(
        self,
        make_env: Callable[[], ChunkedAction],
        num_envs: int,
        space: gymnasium.Space,
        cluster: Cluster,
        limits: Limits,
    ) -> None:
        super().__init__(num_envs, space, limits)
        self._columns = {key: np.zeros((num_envs, *box.shape), box.dtype) for key, box in name_boxes(space)}
        self._ray = _connect(cluster.address)
        size = cluster.envs_per_actor
        self._lanes = [range(at, min(at + size, num_envs)) for at in range(0, num_envs, size)]
        self._size = size
        self._owed: dict[int, Any] = {}  # answers, by actor
        self._check_cores(num_envs)
        self._parts = self._ray.put((make_env, space))
        self._actors = [self._launch(CORE) for _ in self._lanes]

    def close(self, kill: bool = False) -> None:
        """End the actors, at once or after the environments have closed themselves."""
        if self._ray.is_initialized():
            if not kill:
                closing = [actor.close.remote() for actor in self._actors]
                self._ray.wait(closing, num_returns=len(closing), timeout=CLOSING_S)
            for actor in self._actors:
                self._ray.kill(actor)
        self._actors, self._owed, self._pending = [], {}, {}

    def __del__(self) -> None:
        """End the actors of workers that nobody closed."""
        if getattr(self, "_actors", None):
            self.close(kill=True)

    def _ask(self, command: str, arguments: Mapping[int, Any]) -> None:
        for number, lanes in enumerate(self._lanes):
            if asked := {lane: arguments[lane] for lane in lanes if lane in arguments}:
                self._owed[number] = self._actors[number].ask.remote(command, asked)

    def _hear_all(self) -> tuple[dict[int, Any], dict[int, Failure]]:
        answers: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        lost: dict[int, Failure] = {}  # by actor
        for number, owed in self._owed.items():
            lanes = self._lanes[number]
            limit = sum(self._pending.get(lane, 0.0) for lane in lanes)
            left = max(FETCHING_S, self._asked + limit - time.monotonic())
            try:
                columns, said = self._ray.get(owed, timeout=None if left == float("inf") else left)
            except self._ray.exceptions.GetTimeoutError:
                lost[number] = Failure(say_late(limit))
            except self._ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                others = f", of environments {lanes[0]} to {lanes[-1]}," if len(lanes) > 1 else ""
                lost[number] = Failure(f"its actor{others} ended: {lines[-1]}", str(error))
            else:
                good = [lane for lane, (well, _) in said.items() if well]
                for key, column in columns.items():
                    self._columns[key][good] = column
                answers |= {lane: said[lane][1] for lane in good}
                failures |= {lane: Failure(*why) for lane, (well, why) in said.items() if not well}
        self._owed = {}
        for number, failure in lost.items():
            self._restart(number)
            failures |= {lane: failure for lane in self._lanes[number] if lane in self._pending}
        return answers, failures

    def _replace(self, lane: int, failure: Failure) -> None:
        self._actors[lane // self._size].drop.remote(lane)

    def _restart(self, number: int) -> None:
        """Put a new actor in the place of one, on a node that is there, whatever its cores do."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actors[number])
        self._actors[number] = self._launch(REST)

    def _launch(self, cores: float) -> Any:
        kind = self._ray.remote(num_cpus=cores, max_restarts=0, scheduling_strategy="SPREAD")(Group)
        return kind.remote(self._parts)

    def _check_cores(self, num_envs: int) -> None:
        needed = len(self._lanes)
        if (free := self._count_free(needed)) < needed:
            total = int(self._ray.cluster_resources().get("CPU", 0))
            raise ValueError(
                f"cluster: expected {needed} free cores for {num_envs} environments, {self._size} to an "
                f"actor, got {free} free of {total}; add nodes, take fewer environments (--num-envs), or put "
                f"{-(-num_envs // max(free, 1))} into an actor (--envs-per-actor)"
            )

    def _count_free(self, needed: int) -> int:
        """Return how many cores are free; those that have just been given back are waited for."""
        until = time.monotonic() + SETTLING_S
        while (free := int(self._ray.available_resources().get("CPU", 0))) < needed:
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        return free


class Group:
    """The environments of one actor, each built when it is first reset.

    Args:
        parts: what makes an environment, and its observation space.
    """

    def __init__(self, parts: tuple[Callable[[], ChunkedAction], gymnasium.Space]) -> None:
        self._make_env, self._space = parts
        self._envs: dict[int, ChunkedAction] = {}

    def ask(
        self, command: str, arguments: Mapping[int, Any]
    ) -> tuple[dict[str, np.ndarray], dict[int, tuple[bool, Any]]]:
        """Return observations (n, ...) of the n environments that did well, and what each of all said."""
        seen, answers = [], {}
        for lane, argument in arguments.items():
            try:
                if lane not in self._envs:
                    if command != "reset":
                        raise RuntimeError(
                            "its episode was lost with its actor, when another was begun there"
                        )
                    self._envs[lane] = build(self._make_env, self._space)
                observation, said = serve(self._envs[lane], command, argument)
            except (Exception, SystemExit) as error:
                answers[lane] = False, describe_error(error)
                self.drop(lane)
            else:
                answers[lane] = True, said
                seen.append(observation)
        keys = seen[0] if seen else ()
        return {key: np.stack([observation[key] for observation in seen]) for key in keys}, answers

    def drop(self, lane: int) -> None:
        """Close an environment, if it is there, however that ends."""
        if (env := self._envs.pop(lane, None)) is not None:
            with suppress(Exception, SystemExit):
                env.close()

    def close(self) -> None:
        """Close all environments."""
        for lane in list(self._envs):
            self.drop(lane)


def _connect(address: str) -> Any:
    """Return Ray, connected."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('a cluster needs Ray: pip install "qsteer[ray]"', name="ray") from error
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if ":" in address and address != here:
            raise ValueError(
                f"cluster: expected {here}, to which this process is connected, got {address}; call "
                "ray.shutdown() first"
            )
        return ray
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray has one kind for each way in which there is none, and bare ones
        raise ConnectionError(
            f"cluster: expected a running Ray cluster at {address!r} with this machine as one of its nodes, "
            f"got {type(error).__name__}: {error}; start one with: ray start --head"
        ) from error
    return ray

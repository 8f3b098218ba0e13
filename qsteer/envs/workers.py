"""Simulators in processes of their own: one that raises, dies or hangs is restarted, the others go on."""

import abc
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper, clear_mpi_env_vars

from qsteer.envs.chunked import ChunkedAction, name_boxes
from qsteer.envs.limits import Limits

CLOSING_S = 10.0
"""Seconds that a simulator has to close itself, before its process is killed."""


class Failure(NamedTuple):
    """Why an environment failed, where it raised, and the seconds that it still has to close itself."""

    why: str
    trace: str = ""
    grace_s: float = 0.0


class Workers(abc.ABC):
    """Environments that are asked together and replaced one by one.

    An environment fails if it raises, gives what its spaces do not hold, if its process dies, or if it does
    not answer in time.

    Args:
        num_envs: N.
        space: of the observations of one, a box or a mapping of them.
        limits: of time and failures.

    Attributes:
        failed: failures of each environment so far: (N,).
        in_a_row: the same since the caller last set it to zero, where the environment has done well.
    """

    def __init__(self, num_envs: int, space: gymnasium.Space, limits: Limits) -> None:
        self.limits = limits
        self.failed: np.ndarray = np.zeros(num_envs, int)
        self.in_a_row: np.ndarray = np.zeros(num_envs, int)
        self._space = space
        self._columns: dict[str, np.ndarray] = {}  # observations (N, ...)
        self._seeds = np.zeros(num_envs, int)  # of the last resets
        self._pending: dict[int, float] = {}  # environments that owe an answer, and their seconds for it
        self._asked = 0.0

    @property
    def observations(self) -> Any:
        """The last observations of all environments, (N, ...), of their own types; one that failed: any."""
        copies = {key: column.copy() for key, column in self._columns.items()}
        return copies if isinstance(self._space, gymnasium.spaces.Dict) else copies[""]

    def start(self, command: str, arguments: Mapping[int, Any]) -> None:
        """Ask environments to ``"reset"`` with a seed, or to ``"step"`` with a chunk (n, A), and return.

        Raises:
            RuntimeError: answers are outstanding, after an interruption.
        """
        if self._pending:
            raise RuntimeError(
                "environments: expected answers to be waited for before something is asked again, got "
                f"{len(self._pending)} outstanding; after an interruption start other simulators"
            )
        self._asked = time.monotonic()
        for lane, argument in arguments.items():
            if command == "reset":
                self._seeds[lane], limit = argument, self.limits.reset_s
            else:
                limit = None if self.limits.step_s is None else len(argument) * self.limits.step_s
            self._pending[lane] = float("inf") if limit is None else limit
        self._ask(command, arguments)

    def finish(self) -> tuple[dict[int, Any], dict[int, Failure]]:
        """Wait for what was asked; return the answers, and the failures of the others.

        An answer is ``[reward, terminated, truncated, info]`` of a step and None of a reset. Environments
        that failed are new ones, and have to be reset.

        Raises:
            RuntimeError: an environment has failed too often in a row.
        """
        answers, failures = self._hear_all()
        self._pending = {}
        for lane, failure in failures.items():
            self.fail(lane, failure)
        return answers, failures

    def fail(self, lane: int, failure: Failure) -> None:
        """Replace an environment, count its failure and say it.

        Raises:
            RuntimeError: it has failed too often in a row.
        """
        self._replace(lane, failure)
        self.failed[lane] += 1
        self.in_a_row[lane] += 1
        if self.in_a_row[lane] >= self.limits.failures:
            self.in_a_row[lane] = 0
            error = RuntimeError(
                f"environment {lane}: failed {self.limits.failures} times in a row, the last time in the "
                f"episode of seed {self._seeds[lane]}: {failure.why}"
            )
            error.add_note(failure.trace)
            raise error
        warnings.warn(
            f"environment {lane}: {failure.why}: it is replaced and the episode cut (said once, counted as "
            "failed)",
            RuntimeWarning,
            skip_file_prefixes=(str(Path(__file__).parents[1]),),
        )

    @abc.abstractmethod
    def close(self, kill: bool = False) -> None:
        """End the environments, at once or after they have closed themselves."""

    @abc.abstractmethod
    def _ask(self, command: str, arguments: Mapping[int, Any]) -> None:
        """Send a command."""

    @abc.abstractmethod
    def _hear_all(self) -> tuple[dict[int, Any], dict[int, Failure]]:
        """Wait for the pending answers, no longer than allowed; put the observations into the columns."""

    @abc.abstractmethod
    def _replace(self, lane: int, failure: Failure) -> None:
        """Put a new environment in the place of one."""


class Processes(Workers):
    """Workers on this machine, each environment in a process of its own.

    A process whose environment fails is killed, with those that it started, and replaced. Processes are
    forked from a clean server process, never from this one, whose thread pools a fork would break; each uses
    one thread, and leaves Ctrl-C to this process.

    Args:
        make_env: makes one environment.
        num_envs: N.
        space: of the observations of one, a box or a mapping of them.
        modules: imported by the server process, so that no worker has to.
        limits: of time and failures.
    """

    def __init__(
        self,
        make_env: Callable[[], ChunkedAction],
        num_envs: int,
        space: gymnasium.Space,
        modules: Sequence[str],
        limits: Limits,
    ) -> None:
        super().__init__(num_envs, space, limits)
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        self._context.set_forkserver_preload([__name__, *modules])
        self._memory = {
            key: self._context.RawArray("b", num_envs * box.dtype.itemsize * prod(box.shape))
            for key, box in name_boxes(space)
        }
        self._columns = _view(self._memory, space)
        self._make_env = CloudpickleWrapper(make_env)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        try:
            for lane in range(num_envs):
                process, pipe = self._launch(lane)
                self._processes.append(process)
                self._pipes.append(pipe)
        except BaseException:
            self.close(kill=True)
            raise

    def close(self, kill: bool = False) -> None:
        """End the processes, at once or after the environments have closed themselves."""
        if not kill:
            for pipe in self._pipes:
                with suppress(OSError):
                    pipe.send(None)
        self._end(range(len(self._pipes)), 0.0 if kill else CLOSING_S)
        self._processes, self._pipes, self._pending = [], [], {}

    def __del__(self) -> None:
        """End the processes of workers that nobody closed."""
        if getattr(self, "_pipes", None):
            self.close(kill=True)

    def _ask(self, command: str, arguments: Mapping[int, Any]) -> None:
        for lane, argument in arguments.items():
            with suppress(OSError):  # its process has died, as _hear_all will find
                self._pipes[lane].send((command, argument))

    def _hear_all(self) -> tuple[dict[int, Any], dict[int, Failure]]:
        answers: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        for lane, limit in self._pending.items():
            try:
                good, said = self._hear(lane, self._asked + limit)
            except TimeoutError:
                failures[lane] = Failure(say_late(limit))
            except (EOFError, OSError):
                failures[lane] = Failure(f"its process ended with {_explain_exit(self._processes[lane])}")
            else:
                if good:
                    answers[lane] = said
                else:
                    why, trace = said
                    failures[lane] = Failure(why, trace, CLOSING_S)
        return answers, failures

    def _replace(self, lane: int, failure: Failure) -> None:
        self._end([lane], failure.grace_s)
        self._processes[lane], self._pipes[lane] = self._launch(lane)

    def _launch(self, lane: int) -> tuple[Any, Connection]:
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work,
            args=(self._make_env, theirs, self._memory, self._space, lane),
            name=f"environment {lane}",
            daemon=True,
        )
        with _limit_threads(), clear_mpi_env_vars():
            process.start()
        theirs.close()
        return process, pipe

    def _hear(self, lane: int, until: float) -> tuple[bool, Any]:
        pipe, process = self._pipes[lane], self._processes[lane]
        while not pipe.poll(min(1.0, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise TimeoutError
            if not process.is_alive() and not pipe.poll():  # a process that it started holds the pipe
                raise EOFError
        return pipe.recv()

    def _end(self, lanes: Sequence[int], grace: float) -> None:
        until = time.monotonic() + grace
        for lane in lanes:
            self._pipes[lane].close()
        for lane in lanes:
            process = self._processes[lane]
            process.join(max(0.0, until - time.monotonic()))
            if hasattr(os, "killpg"):
                with suppress(OSError):  # none is left of its group
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(CLOSING_S)


def _work(
    make_env: Callable[[], ChunkedAction],
    pipe: Connection,
    memory: Mapping[str, Any],
    space: gymnasium.Space,
    lane: int,
) -> None:
    """Serve one environment until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()  # what the environment starts ends with it
        threading.Thread(target=_follow_parent, daemon=True).start()
    columns, env = _view(memory, space), None
    try:
        env = build(make_env, space)
        while (asked := _receive(pipe)) is not None:
            observation, said = serve(env, *asked)
            for key, column in columns.items():
                column[lane] = observation[key]
            pipe.send((True, said))
    except (Exception, SystemExit) as error:
        with suppress(OSError):  # nobody listens any more
            pipe.send((False, describe_error(error)))
    finally:
        if env is not None:
            env.close()


def build(make_env: Callable[[], ChunkedAction], space: gymnasium.Space) -> ChunkedAction:
    """Return a new environment.

    Raises:
        ValueError: it is of another observation space.
    """
    env = make_env()
    if env.observation_space != space:
        raise ValueError(
            f"observation space: expected that of the first environment, {space}, got "
            f"{env.observation_space}; make equal environments"
        )
    return env


def serve(env: ChunkedAction, command: str, argument: Any) -> tuple[dict[str, Any], Any]:
    """Do what :meth:`Workers.start` asks for; return the parts of the observation, and the answer."""
    if command == "reset":
        (observation, _), said = env.reset(seed=argument), None
    else:
        observation, *said = env.step(argument)
    return {
        key: observation[key] if key else observation for key, _ in name_boxes(env.observation_space)
    }, said


def describe_error(error: BaseException) -> tuple[str, str]:
    """Return a line for an error that an environment raised, and where it was."""
    return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))


def say_late(limit: float) -> str:
    """Return why an environment failed that did not answer within so many seconds."""
    return f"expected an answer within {limit:g} s, got none; raise Limits for slow simulators"


def _follow_parent() -> None:
    """End this process and what it started soon after its parent, even if its environment hangs."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        time.sleep(CLOSING_S)
        os.killpg(0, signal.SIGKILL)


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _view(memory: Mapping[str, Any], space: gymnasium.Space) -> dict[str, np.ndarray]:
    """Return the observations (N, ...) that shared memory holds."""
    return {
        key: np.frombuffer(memory[key], np.uint8).view(box.dtype).reshape(-1, *box.shape)
        for key, box in name_boxes(space)
    }


def _explain_exit(process: Any) -> str:
    process.join(CLOSING_S)
    code = process.exitcode
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


@contextmanager
def _limit_threads() -> Iterator[None]:
    """Let processes started here use one thread each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)

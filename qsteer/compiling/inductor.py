"""Whole actions compiled by Inductor, while the eager ones go on.

A new kind of action is written down as one line of operators (:mod:`qsteer.compiling.lines`) in a thread of
its own, and compiled in a process of its own, one after another, at low priority. What was compiled is kept
in :func:`cache_directory`: the next run writes the line down and loads it.
"""

import atexit
import hashlib
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsteer.compiling.cuts import Part
from qsteer.compiling.lines import Draw, Line, Recorded, Replayed, trace
from qsteer.compiling.runs import EAGER, Captured, Kind, MismatchError, Run, check_alike, unlike, unmoved
from qsteer.trace import ActionRecord, Trace

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""How long the end of Python waits for an action that is being written down."""
TRIES = 3
"""Inputs of the check: where candidates have nearly the same value, rounding decides between them."""


class InductorRun(Run):
    """A :class:`Run` that is compiled while it runs eagerly; on CUDA it is captured as a graph then.

    Before the first compiled action it is compared with the eager one, on inputs like these. Where anything
    goes wrong the eager action goes on, and a warning says why.

    Args:
        kind: of the action.
        stream: for the graph, see :class:`~qsteer.compiling.runs.Captured`; None: none is captured.

    Raises:
        TypeError: as for :class:`Run`; or the action draws random numbers that depend on others.
    """

    def __init__(self, kind: Kind, stream: torch.cuda.Stream | None = None) -> None:
        self.draws: list[Draw] = []
        super().__init__(kind, stream)
        self.finished.clear()
        self.state = "waits to be compiled"
        self._line: Line | None = None
        self._compiled: list[Any] | None = None
        self._captured: Captured | None = None
        self._checked = False
        self._failed: str | None = None
        compiler.submit(self)

    def rehearse(self) -> None:
        """Run the action once, and note the random numbers that it draws."""
        with Recorded() as recorded:
            self.act()
        self.draws = recorded.draws

    def __call__(self, tensors: list[Tensor], trace: Trace) -> Float[Tensor, "B H A"]:
        """Return the action for these tensors in the buffers."""
        if self._failed is not None:
            self.give_up(self._failed)
        if self._compiled is None or not self.checked():
            return super().__call__(tensors, trace)
        self.fill(tensors)
        if self._captured is not None:
            return self._captured(trace)
        action, record = self.again()
        record.hand_over(trace)
        return action

    def again(self) -> tuple[Float[Tensor, "B H A"], ActionRecord]:
        """Return what the compiled action makes of what is in the buffers, and of new random numbers."""
        return self.compiled(self.buffers, [draw() for draw in self.draws])

    def compiled(
        self, buffers: Sequence[Tensor], drawn: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "B H A"], ActionRecord]:
        """Return what the compiled action makes of buffers and random numbers."""
        assert self._line is not None and self._compiled is not None
        made = self._line.run(self._compiled, [*buffers, *drawn])
        record = ActionRecord(*self.kind.wanted)
        action, record.displacement, record.steps, record.fell_back, record.gated = made
        return action, record

    def checked(self) -> bool:
        """Compare with the eager action, the first time; return whether the compiled one may act."""
        if not self._checked:
            self._checked = True
            try:
                self.check()
            except MismatchError as error:
                self.give_up(str(error))
            else:
                if self.stream is not None:
                    self._captured = Captured(self.again, self.kind.rule, self.kind.device, self.stream)
        return self._compiled is not None

    def check(self) -> None:
        """Compare the compiled action with the eager one on inputs that it was not traced on.

        Raises:
            MismatchError: they differ.
        """
        for left in reversed(range(TRIES)):
            with unmoved(self.kind.rule, self.kind.device):
                buffers = [unlike(buffer) for buffer in self.buffers]
                drawn = [draw() for draw in self.draws]
                with Replayed(drawn):
                    eager, _ = self.act(buffers)
                made, _ = self.compiled(buffers, drawn)
            try:
                check_alike("the compiled action", made, eager, self.buffers)
            except MismatchError:
                if not left:
                    raise
            else:
                return

    def compile(self) -> None:
        """Write the action down and compile it, or find it compiled; called from the compiler's thread."""
        began = time.perf_counter()
        try:
            self.state = "is being compiled"
            log.info("compiling an action: about a minute the first time")
            line = trace(self.act, [buffer.clone() for buffer in self.buffers], self.draws)
            written = time.perf_counter()
            paths, new = build(line.parts)
            self._line, self._compiled = line, [load(path, self.kind.device) for path in paths]
        except Exception as error:  # whatever the compiler says: the eager action goes on
            self._failed = f"{type(error).__name__}: {error}"
        else:
            took = time.perf_counter() - began
            how = "compiled" if new else "found on the disk"
            self.state = f"{how} in {took:.1f} s, {written - began:.1f} s of them to write it down"
            log.info("an action was %s", self.state)
        finally:
            self.finished.set()

    def give_up(self, why: str) -> None:
        """Let the eager action go on, and say why."""
        self._compiled, self._failed, self.state = None, None, f"{EAGER}: {why}"
        warnings.warn(
            f"compile: expected an action that Inductor compiles, got: {why}; the eager action goes on",
            RuntimeWarning,
            skip_file_prefixes=(os.path.dirname(os.path.dirname(__file__)),),
        )


class Compiler:
    """A thread that compiles one action after another; those that nobody keeps any more are left out."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[weakref.ref[InductorRun] | None] = queue.SimpleQueue()
        self._started = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.process: subprocess.Popen[str] | None = None

    def submit(self, run: InductorRun) -> None:
        """Compile an action when those before it are done."""
        self._waiting.put(weakref.ref(run))
        with self._started:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="qsteer compiles", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            if (run := waiting()) is not None and not self._stopped:
                run.compile()
            del run

    def run(self, directory: Path) -> None:
        """Compile the line in a directory.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        command = [sys.executable, "-m", "qsteer.compiling.compile_line", str(directory)]
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        _, said = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError(explain(said))

    def stop(self) -> None:
        """End what is being compiled, and wait for the thread: Python must not end in the middle of it."""
        self._stopped = True
        if self._thread is not None:
            self._waiting.put(None)
            if self.process is not None:
                self.process.kill()
            self._thread.join(PATIENCE_S)


compiler = Compiler()
atexit.register(compiler.stop)


def build(parts: Sequence[Part]) -> tuple[list[Path], int]:
    """Return the shared libraries of parts of a line, and how many of them were not on the disk.

    Raises:
        RuntimeError: one cannot be compiled.
    """
    devices = {x.device for part in parts for x in part.inputs if x.device.type == "cuda"}
    machine = torch.backends.cpu.get_cpu_capability(), *map(torch.cuda.get_device_name, devices)
    settings = torch.__version__, torch.get_num_threads(), machine
    words = [repr((part, settings)).encode() for part in parts]
    paths = [cache_directory() / f"{hashlib.sha256(word).hexdigest()}.so" for word in words]
    missing = {path: part for path, part in zip(paths, parts, strict=True) if not path.exists()}
    if missing:
        cache_directory().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_directory()) as directory:
            plain = [tuple(part) for part in missing.values()]
            torch.save((plain, torch.get_num_threads()), Path(directory) / "parts.pt")
            compiler.run(Path(directory))
            for i, path in enumerate(missing):
                os.replace(Path(directory) / f"{i}.so", path)
    return paths, len(missing)


def load(path: Path, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return a compiled part of a line."""
    runners: Any = torch._C._aoti
    if device.type == "cuda":  # in one thread: a graph captures no queries of events
        return runners.AOTIModelContainerRunnerCuda(str(path), 1, str(device), "", True).run
    return runners.AOTIModelContainerRunnerCpu(str(path), 1).run


def cache_directory() -> Path:
    """Return where compiled actions are kept: beside torch's hub, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()).parent / "qsteer" / "actions"


def explain(said: str) -> str:
    """Return what a process said last, in one line."""
    if "InvalidCxxCompiler" in said or "No working C++ compiler" in said:
        return "no working C++ compiler; install one (apt-get install g++), or name it in CXX"
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "no message")

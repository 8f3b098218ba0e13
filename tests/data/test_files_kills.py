"""A replay on disk: continued where it was left, and whole after a kill at any moment."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import histories
import numpy as np
import pytest
import torch
from histories import (
    NEEDS,
    History,
    assert_same,
    compare,
    layout,
    numbered,
)

from qsteer.data.replay import Replay


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
from histories import layout, numbered
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


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Five processes in turn continue one directory until each is killed: bit for bit what they have said."""
    kills, history, added = 5, History(0, 3), 0
    run = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "replay", str(kills), Path(histories.__file__).parent],
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


OPEN = """
import sys
sys.path.insert(0, sys.argv[2])
from histories import layout
from qsteer.data.replay import Replay

replay = Replay(layout(), directory=sys.argv[1])
print("held", flush=True)
input()
"""


def test_a_directory_has_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN, tmp_path, Path(histories.__file__).parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match="another process, has open"):
            Replay(layout(), directory=tmp_path)
        other.kill()
    assert Replay(layout(), directory=tmp_path).added == 0


def test_a_directory_has_one_replay_and_keeps_its_lock_when_a_second_is_refused(tmp_path: Path) -> None:
    replay = Replay(layout(), directory=tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected a replay that nothing else has open"):
            Replay(layout(), directory=tmp_path)
    with open(tmp_path / "lock"):  # nor does it go when any other file of it is closed
        pass
    command = [sys.executable, "-c", OPEN, tmp_path, Path(histories.__file__).parent]
    other = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert other.returncode and "expected a replay that nothing else has open" in other.stderr
    del replay
    assert Replay(layout(), directory=tmp_path).added == 0


def test_a_file_system_without_locks_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(RuntimeError, match=r"expected a file system that locks files, got .*not supported"):
        Replay(layout(), directory=tmp_path)

"""One process at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest

from zipeval.errors import UsageError
from zipeval.results.lock import holder, locked

HOLDING = """
import sys, time
from pathlib import Path
from zipeval.results.lock import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""
COUNTING = """
import sys
from pathlib import Path
from zipeval.errors import UsageError
from zipeval.results.lock import locked
path, done = Path(sys.argv[1]), 0
while done < 50:
    try:
        with locked(path):
            inside = Path(sys.argv[2])
            inside.mkdir()  # fails where somebody else is in here
            inside.rmdir()
            done += 1
    except UsageError:
        pass
"""


@pytest.fixture
def holding(tmp_path):
    path = tmp_path / "run" / "task.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, path], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield path, process
        process.kill()


def test_who_holds_it(holding):
    path, process = holding
    with (
        pytest.raises(
            UsageError,
            match=rf"process {process.pid} on {socket.gethostname()} .*tasks=\[task\] since 20",
        ),
        locked(path),
    ):
        pass
    assert holder(path)["pid"] == process.pid
    assert holder(path)["job"] is None


def test_what_a_killed_process_left_locks_nothing(holding):
    path, process = holding
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    assert holder(path) is None
    with locked(path):
        assert str(os.getpid()) in path.read_text()
    assert not path.exists()


def test_workers_that_outlive_their_owner_do_not_hold_it(tmp_path):
    """As those of a data loader do for some seconds."""
    path = tmp_path / "run" / "task.lock"
    context = multiprocessing.get_context("fork")
    stay = context.Event()

    def own():
        with locked(path):
            context.Process(target=stay.wait).start()
            os.kill(os.getpid(), signal.SIGKILL)

    owner = context.Process(target=own)
    owner.start()
    owner.join()
    try:
        assert holder(path) is None
    finally:
        stay.set()


def test_what_cannot_be_opened_for_writing(holding, tmp_path, monkeypatch):
    """As another user's: who holds it is told, that nothing can be locked is a refusal."""
    path, process = holding
    opened = os.open

    def for_reading(file, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(file, flags, *mode)

    monkeypatch.setattr(os, "open", for_reading)
    assert holder(path)["pid"] == process.pid
    with (
        pytest.raises(UsageError, match=r"cannot be locked \(Permission denied\)"),
        locked(path),
    ):
        pass


def test_many_at_once(tmp_path):
    """Of processes that take and leave it all the time never two are inside, though its file comes and goes."""
    arguments = [
        sys.executable,
        "-c",
        COUNTING,
        tmp_path / "run" / "task.lock",
        tmp_path / "inside",
    ]
    processes = [subprocess.Popen(arguments) for _ in range(3)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]

"""One process at a time answers a task of a run; others are told which.

    RUN_DIR/TASK.lock       JSON: host, pid, since, job

The operating system holds the lock and drops it when the process ends, however it ends, so that a file that was left
behind locks nothing (on NFS, of a machine that died, once its lease is over). It is a POSIX record lock: forked workers
do not inherit it, and file systems of clusters know it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zipeval.errors import TaskLockedError, UsageError
from zipeval.results.records import now

JOBS = ("SLURM_JOB_ID", "RAY_JOB_ID")
TRIES, PAUSE = 5, 0.1  # seconds; `holder` has a free lock for an instant
NO_LOCKS = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
)  # of a file system that has none


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block in which no other process is in such a block.

    Raises:
        TaskLockedError: if one is. It names it.
        UsageError: where nothing can be locked.
    """
    file = _locked(path)
    try:
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": now(),
            "job": _job(),
        }
        with suppress(OSError):  # no room; that it is locked needs none
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(me).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is free, or the next one's would be
        os.close(file)


def holder(path: Path) -> dict | None:
    """Return who is in the block now, {} where that is not told; not to be asked by the one who is."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:  # somebody else's, perhaps
        return {}
    try:
        return None if _taken(file, fcntl.LOCK_SH) else _said(file)
    finally:
        os.close(file)


def _locked(path: Path) -> int:
    """A descriptor of the file, locked."""
    tries = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be locked ({error.strerror}). Choose another results=DIR."
            ) from error
        taken = _taken(file, fcntl.LOCK_EX)
        if taken and os.fstat(file).st_nlink:
            return file
        by = _said(file)
        os.close(file)
        if not taken:
            tries += 1
            if tries == TRIES:
                raise TaskLockedError(_refusal(path, by))
            time.sleep(PAUSE)


def _taken(file: int, kind: int) -> bool:
    """Return whether the lock is this process's now."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return False
        print(
            "zipeval: results= is on a file system without locks: start nothing twice.",
            file=sys.stderr,
        )
    return True


def _refusal(path: Path, by: dict) -> str:
    process = f"process {by.get('pid', '?')} on {by.get('host', 'some host')}"
    job = f" (job {by['job']})" if by.get("job") else ""
    return (
        f"{path.parent}: {process}{job} has been answering tasks=[{path.stem}] since {by.get('since', 'just now')}. "
        "Wait until it is done, or end it: what it has answered is kept, and this command goes on from there."
    )


def _said(file: int) -> dict:
    try:
        return json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}


def _job() -> str | None:
    """A scheduler's number of this process's job."""
    return next((os.environ[name] for name in JOBS if name in os.environ), None)

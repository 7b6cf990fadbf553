"""Answers on disk while their task is being answered: a process that dies loses the batch that it was at, and no other.

    RUN_DIR/TASK.journal.jsonl      of torchrun's second process TASK.journal.1.jsonl, and so on

One line for an answer, behind a checksum, and one for every process that went on with the task before its answers. The
lines of a batch are written and synced together. The task's record takes its place.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from zipeval.errors import RunError, UsageError
from zipeval.results.records import atomic_write, changes
from zipeval.utils import ranks


class Journal:
    """A task's answers so far, and the file that this process adds to.

    Attributes:
        done: (doc_id, number) of what was answered before: of the requests about a document, those with these numbers.
        answers: likewise what `append` was given; in the first rank, as the rest.
        sessions: of every process that worked on the task, this one the last; of others also `seconds`, until their
            last answer.

    Args:
        directory: of the run.
        made_with: what answers depend on beyond the run's own identity, as `records.changes` compares it.
        session: what else to keep of this process.

    Raises:
        UsageError: if what is there was made with something else.
    """

    def __init__(self, directory: Path, task: str, made_with: dict, session: dict):
        self.task, self.first = task, directory / f"{task}.journal.jsonl"
        rank = ranks.here().rank
        self.path = directory / f"{task}.journal.{rank}.jsonl" if rank else self.first
        self.answers: dict[tuple[int, int], dict] = {}
        self.sessions: list[dict] = []
        if ranks.first():
            self._read(made_with)
            directory.mkdir(parents=True, exist_ok=True)
            self.sessions.append(session)
        self.done: set[tuple[int, int]] = ranks.exchange({*self.answers})[0]
        self._write([{"session": session, "made_with": made_with}])

    def _read(self, made_with: dict) -> None:
        for path in _paths(self.first.parent, self.task):
            lines, damaged = _read(path)
            if damaged:  # most likely the process died while it wrote them
                print(
                    f"{path}: {damaged} damaged line(s), to be answered again.",
                    file=sys.stderr,
                )
                atomic_write(path, "".join(map(_line, lines)))
            for line in lines:
                if "session" in line:
                    changed = changes(line["made_with"], made_with)
                    if changed:
                        raise UsageError(
                            f"{path}: begun with {', '.join(changed)}. Go back to that, or delete "
                            f"{self.task}.journal*.jsonl there to answer the questions anew."
                        )
                    if path == self.first:  # of several ranks one tells of the session
                        self.sessions.append({**line["session"], "seconds": 0.0})
                else:
                    if path == self.first:
                        self.sessions[-1]["seconds"] = line["at"]
                    self.answers[line["doc_id"], line.get("number", 0)] = line

    def append(self, answers: list[dict]) -> None:
        """Keep a batch: when this returns, its answers are on the disk.

        Args:
            answers: each with its `doc_id` and, but for the first about a document, its `number`, and with `at`, the
                seconds since this process began with the task.

        Raises:
            RunError: if it cannot be written; what was kept before stays.
        """
        self._write(answers)

    def _write(self, lines: list[dict]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write("".join(map(_line, lines)).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise RunError(
                f"{self.path}: {reason}. Make room and run this again: it goes on from there."
            ) from error


def remove(directory: Path, task: str) -> None:
    """Delete a journal where a record has taken its place, or what it holds is wrong."""
    for path in _paths(directory, task):
        path.unlink(missing_ok=True)


def answered(directory: Path, task: str) -> int:
    """Return of how many documents answers are on the disk, while their task has no record."""
    documents = set()
    for path in _paths(directory, task):
        lines, *_ = _read(path)
        documents |= {line["doc_id"] for line in lines if "doc_id" in line}
    return len(documents)


def _paths(directory: Path, task: str) -> list[Path]:
    """The first process's file is the first of them."""
    return sorted(
        [
            *directory.glob(f"{task}.journal.jsonl"),
            *directory.glob(f"{task}.journal.*.jsonl"),
        ],
        key=_rank,
    )


def _rank(path: Path) -> int:
    number = path.name.removesuffix(".jsonl").rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def _line(held: dict) -> str:
    body = json.dumps(held)
    return f"{crc32(body.encode()):08x} {body}\n"


def _read(path: Path) -> tuple[list[dict], int]:
    """The intact lines, and how many others there are."""
    lines = path.read_bytes().split(b"\n")
    intact = [*_intact(lines[:-1])]  # the last one has no end: it is empty, or torn
    while intact and "session" not in intact[0]:  # nothing tells what it was made with
        del intact[0]
    return intact, len(lines) - 1 - len(intact) + bool(lines[-1])


def _intact(lines: list[bytes]) -> Iterator[dict]:
    for line in lines:
        checksum, _, body = line.partition(b" ")
        if checksum == b"%08x" % crc32(body):
            yield json.loads(body)

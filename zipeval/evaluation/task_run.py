"""One task of a run: where its record is, and everything that its answers depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zipeval import methods
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.checkpoints.placement import machine
from zipeval.errors import UsageError
from zipeval.inference.session import Session
from zipeval.results import journal, records
from zipeval.results.identity import recorded
from zipeval.utils import ranks


@dataclass(frozen=True)
class TaskRun:
    """A task of a run.

    Attributes:
        session: the run's.
        task: the name.
        folder: where the task is defined.
        results: directory of all records.
    """

    session: Session
    task: str
    folder: Path
    results: Path

    @cached_property
    def directory(self) -> Path:
        """Return the directory of the task's record."""
        return self.results / self.session.record_id(self.task)

    @property
    def path(self) -> Path:
        """Return the file of the task's record."""
        return self.directory / f"{self.task}.json"

    @property
    def lock_path(self) -> Path:
        """Return the file that says which process is at the task."""
        return self.directory / f"{self.task}.lock"

    @property
    def label(self) -> str:
        """Return the run and the task, as messages name them."""
        return f"{self.directory.name} {self.task}"

    @property
    def is_judged(self) -> bool:
        """Return whether a judge model scores the answers."""
        return self.task in PROTOCOLS

    @cached_property
    def task_hash(self) -> str:
        """Return the hash of the task's definition and of its questions."""
        return self.session.task_hash(self.task, self.folder)

    def made_with(self, data_hash: str | None) -> dict[str, Any]:
        """Return all that the answers depend on beyond the run's identity.

        Args:
            data_hash: None for data that lies beside the task, and so is in the task's hash.
        """
        return {
            "task_hash": self.task_hash,
            "data_hash": data_hash,
            "code": records.code(methods.modules(self.session.config.method)),
            "versions": records.versions(),
        }

    def find_record(self) -> dict[str, Any] | None:
        """Return the record of an earlier run, if there is one.

        Raises:
            UsageError: if it is of another version of the task, or of other data.
        """
        if not self.path.exists():
            return None
        record = records.read(self.path)
        # Other questions, prompts or scoring: its number is that of another benchmark.
        if record["task_hash"] != self.task_hash:
            raise UsageError(
                f"{self.path} is of another version of tasks=[{self.task}]. Move it away and run this again."
            )
        # None where the data is not on this machine: a finished record needs no download.
        identity = self.session.known_data_identity(self.task, self.folder)
        if identity and identity.data_hash != record["data_hash"]:
            hashes = f"data_hash {record['data_hash']}, now {identity.data_hash}"
            raise UsageError(
                f"{identity.setting}: {self.path} is of other data ({hashes}). "
                "Move it away and run this again, or choose another results=DIR."
            )
        return record

    def open_journal(self) -> journal.Journal:
        """Open the task's journal, in all ranks; the first one says what its answers are made with."""
        made_with = None
        # To hash all data is the work of minutes, and gives the same in every rank.
        if ranks.first():
            identity = self.session.data_identity(self.task, self.folder)
            made_with = self.made_with(identity.data_hash)
        # What the first rank has.
        made_with = ranks.exchange(made_with)[0]
        session = describe_process(self.session)
        return journal.Journal(self.directory, self.task, made_with, session)

    def provenance(self) -> dict[str, Any]:
        """Return all that is needed to answer the task again, and to trust the answers."""
        config = self.session.config
        identity = self.session.data_identity(self.task, self.folder)
        return {
            "run_id": self.session.record_id(self.task),
            "task": self.task,
            **self.made_with(identity.data_hash),
            # None: the cache does not tell, or the data is not of the hub.
            "data_revision": identity.revision,
            # None: no commit of the hub, see resolved.fingerprint.
            "model_revision": self.session.checkpoint.revision,
            "config": recorded(config, self.is_judged),
            "resolved": self.session.resolved,
            "machine": machine(self.session.placement),
            # All like the first, each on a device of its own.
            "processes": ranks.here().count,
            "git": records.git_revision(),
        }


def describe_process(session: Session) -> dict[str, Any]:
    """Return the entry that a record has for every process which answered some of its questions."""
    return {
        "started": records.now(),
        "reuse": session.reuse,
        "processes": ranks.here().count,
        "machine": machine(session.placement),
    }

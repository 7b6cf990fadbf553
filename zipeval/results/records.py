"""Records: what is kept of a run. One JSON file per (run, task) beside one JSON-lines file with its samples.

    results/runs/RUN_ID/TASK.json
    results/runs/RUN_ID/TASK.samples.jsonl
    results/runs/RUN_ID/TASK.images/DOC_ID.jpg    the pictures of the first samples, as the model saw them

A record is written last and atomically: where it exists, the task is answered, its samples and images are complete.
Only one of status "incomplete" is ever replaced: answers of it wait for a judge. Its samples are in
TASK.DIGEST.samples.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from zipeval.errors import RunError, UsageError
from zipeval.utils.content_hash import digest_files

SCHEMA = 6
# Of 4, records have no directions, digests nor `from_samples`. Of 4 and 5, samples have no `question`, `choices` and
# `pictures`.
READABLE = (4, 5, SCHEMA)
# What answers and their scores depend on, of zipeval's own code; tasks and configurations have hashes of their own.
ANSWERING = (
    "engine",
    "checkpoints",
    "methods",
    "models",
    "benchmarks",
    "inference",
    "evaluation",
    "media.py",
    "utils/foreign_patches.py",
)
PACKAGES = (
    "zipeval",
    "lmms-eval",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "bitsandbytes",
    "flash-attn",
    "datasets",
    "numpy",
    "pillow",
    "av",
)
# What differs between two equal runs, in records and in samples; `samples` has the digest of the latter, and `digest` a
# sample's logits, which rounding moves.
CIRCUMSTANCES = (
    *(
        "started",
        "ended",
        "seconds",
        "sessions",
        "path",
        "samples",
        "latency",
        "batch",
        "reuse",
        "processes",
        "digest",
    ),
)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds either what it held before or all of it, whenever the process dies."""
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def try_out(directory: Path) -> None:
    """Raises OSError where a directory cannot be made, or nothing be written in it."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def prepare(results: str) -> Path:
    """The results directory, made and tried out.

    Raises:
        UsageError: if nothing can be written there.
    """
    path = Path(results).expanduser()
    try:
        try_out(path)
    except OSError as error:
        reason = error.strerror
        raise UsageError(
            f"results={results}: cannot write there ({reason}). Choose another results=DIR."
        ) from error
    return path


def write(
    directory: Path,
    record: dict[str, Any],
    samples: list[dict[str, Any]],
    images: Mapping[int, bytes] | None = None,
) -> Path:
    """Write a task below `directory`; returns the record's path. A record that is finished is never replaced.

    Args:
        images: by doc_id, JPEG files; without any, those stay that are there.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        return _write(directory, record, samples, images)
    except OSError as error:
        place, reason = (
            error.filename or directory,
            f"cannot be written ({error.strerror})",
        )
        raise RunError(
            f"{place}: {reason}. Make room and run this again: no answer is lost."
        ) from error


def _write(
    directory: Path,
    record: dict[str, Any],
    samples: list[dict[str, Any]],
    images: Mapping[int, bytes] | None,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{record['task']}.json"
    if path.exists() and not incomplete(read(path)):
        raise RunError(f"{path}: it is finished. Move it away and {again(path)}.")
    if images:
        _write_images(directory / f"{record['task']}.images", images)
    lines = "".join(
        json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples
    )
    digest = hashlib.sha256(lines.encode()).hexdigest()
    # The record that is replaced keeps its samples until it is.
    name = f"{record['task']}{f'.{digest[:8]}' if incomplete(record) else ''}.samples.jsonl"
    atomic_write(directory / name, lines)
    record = {
        "schema": SCHEMA,
        **record,
        "samples": {"file": name, "count": len(samples), "sha256": digest},
    }
    atomic_write(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    for replaced in directory.glob(f"{record['task']}.*.samples.jsonl"):
        if replaced.name != name:
            replaced.unlink()
    return path


def _write_images(folder: Path, images: Mapping[int, bytes]) -> None:
    """Below `folder`, in place of what an earlier record left there."""
    folder.mkdir(exist_ok=True)
    paths = {folder / f"{doc_id}.jpg": image for doc_id, image in images.items()}
    for path, image in paths.items():
        atomic_write(path, image)
    for path in {*folder.glob("*.jpg")} - paths.keys():
        path.unlink()


def incomplete(record: dict[str, Any]) -> bool:
    """Return whether answers of it wait for a judge."""
    return record.get("status") == "incomplete"


def read(path: Path) -> dict[str, Any]:
    """Return one record, with the `path` it was read from.

    Raises:
        UsageError: if it is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] not in READABLE:
            raise ValueError(f"schema {record['schema']}, this zipeval reads {SCHEMA}")
        return {**record, "path": str(path)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a readable record ({error}). Move it away and {again(path)}."
        ) from error


def read_all(results: str) -> list[dict[str, Any]]:
    """Return every record below a results directory, in the order of their paths."""
    return [read(path) for path in sorted(Path(results).expanduser().glob("*/*.json"))]


def read_samples(directory: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the samples of a record, checked against it.

    Raises:
        UsageError: if they changed since, or are not there.
    """
    # A text may hold line ends that only Unicode knows, so that splitlines() would cut it.
    lines = read_sample_lines(directory, record).decode().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def read_sample_lines(directory: Path, record: dict[str, Any]) -> bytes:
    """Return the content of the file with a record's samples, checked against the record.

    Raises:
        UsageError: if it changed since, or is not there.
    """
    path = directory / record["samples"]["file"]
    place = directory / f"{record['task']}.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}. Move {place} away and {again(place)}."
        ) from error
    if hashlib.sha256(content).hexdigest() != record["samples"]["sha256"]:
        raise UsageError(
            f"{path}: does not match its record {place}. Move both away and {again(place)}."
        )
    return content


def again(path: Path) -> str:
    """Say how to make a record anew, as far as its place tells: MODEL-METHOD[-TOKENS]-DIGEST/TASK.json."""
    names = ("model", "method", "tokens")
    command = "zipeval run"
    for name, value in zip(names, path.parent.name.split("-")[:-1], strict=False):
        command += f" {name}={value}"
    return f"make it again with its settings: `{command} tasks=[{path.stem}] ...`"


def reproducible_fields(kept: dict[str, Any]) -> dict[str, Any]:
    """Return what two equal runs agree on, of a record or of a sample."""
    return {k: v for k, v in kept.items() if k not in CIRCUMSTANCES}


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that decide what a model answers."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


# What runs is what was there when it was imported, whatever is edited while a sweep
# goes on.
@cache
def git_revision() -> dict[str, Any] | None:
    """Return the commit of zipeval's own sources and whether they differ from it; None for an installed wheel."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        process = subprocess.run(
            command, cwd=package, capture_output=True, text=True, check=True
        )
        return process.stdout.strip()

    try:
        # A wheel may be installed somewhere below another project's repository.
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None
        return {
            "revision": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def code(modules: tuple[str, ...] = ()) -> str:
    """Return the hash of the code that answers depend on: zipeval's own, and that of other modules."""
    package = Path(__file__).parents[1]
    files = set()
    for path in package.rglob("*.py"):
        place = path.relative_to(package)
        if place.parts[0] in ANSWERING or place.as_posix() in ANSWERING:
            files.add(path)
    for name in modules:
        # A namespace package has no file.
        file = getattr(import_module(name), "__file__", None)
        if file:
            files.add(Path(file))
    return digest_files(files)


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return in words what is not the same of all that answers depend on beyond a run's identity.

    Args:
        then, now: a record, or as much of one as `now` has of task_hash, data_hash, code and versions.
    """
    pairs = {}
    for name in ("task_hash", "data_hash", "code"):
        pairs[name] = (then.get(name), now[name])
    for name, after in now["versions"].items():
        # Another Python gives the same answers.
        if name != "python":
            pairs[name] = (then["versions"].get(name), after)
    return [
        f"{name} {before} (now {after})"
        for name, (before, after) in pairs.items()
        if before != after
    ]

"""Tasks: where lmms-eval finds one, and which of its metrics is the number a table shows."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import zipeval.tasks
from zipeval.errors import UsageError, closest
from zipeval.records import digest_files

OURS = Path(zipeval.tasks.__path__[0])
NAME = re.compile(r"""^(task|group)\s*:\s*["']?([\w\-.]+)["']?\s*(?:#.*)?$""", re.M)

JUDGE = re.compile(r"OPENAI_API|API_KEY|gpt_eval|llm_judge|get_chat_response")


@dataclass(frozen=True)
class Benchmark:
    """How a task's result becomes a number in a table.

    Attributes:
        metric: lmms-eval's name of it.
        scale: what turns lmms-eval's value into the number that papers print.
        about: one line for `zipeval list tasks`.
    """

    metric: str
    scale: float
    about: str


BENCHMARKS = {
    "zipeval_shapes": Benchmark("accuracy", 100, "embedded: 1,499 questions of six types about 300 synthetic images"),
    "zipeval_tgif_qa": Benchmark("accuracy", 1, "TGIF-QA, GIFs; a judge scores, data.videos= has them"),
    "zipeval_msvd_qa": Benchmark("accuracy", 1, "MSVD-QA, short videos; a judge scores, data.videos= has them"),
    "zipeval_msrvtt_qa": Benchmark("accuracy", 1, "MSRVTT-QA, short videos; a judge scores, data.videos= has them"),
    "zipeval_activitynet_qa": Benchmark(
        "accuracy", 1, "ActivityNet-QA, minutes; a judge scores, data.videos= has them"
    ),
}


@cache
def task_files() -> dict[str, tuple[str, Path]]:
    """Every task or group name -> (task | group, its YAML file), by text search: no YAML is parsed, nothing imported.

    lmms-eval has 2,000 of them; parsing all takes its own index five seconds.
    """
    theirs = Path(find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"
    found: dict[str, tuple[str, Path]] = {}
    for folder in (theirs, OURS):
        for file in sorted(folder.rglob("*.yaml")):
            for kind, name in NAME.findall(file.read_text(encoding="utf-8", errors="ignore")):
                found.setdefault(name, (kind, file))
    return found


def task_folder(name: str) -> Path:
    """The folder that defines a task.

    Raises:
        UsageError: if there is no such task, if it is a group, or if a judge model scores it.
    """
    found = task_files()
    if name not in found:
        known = [n for n in found if n in BENCHMARKS or n[:1] == name[:1]] or list(BENCHMARKS)
        raise UsageError(f"tasks=[{name}]: no such task.{closest(name, known)} `zipeval list tasks` says more.")
    kind, file = found[name]
    if kind == "group":
        raise UsageError(f"tasks=[{name}]: that is a group of tasks; name its members, listed in {file}.")
    if any(JUDGE.search(f.read_text(encoding="utf-8", errors="ignore")) for f in _sources(file.parent)):
        raise UsageError(
            f"tasks=[{name}]: its answers are scored by a judge model, which zipeval does not support yet; "
            "without one lmms-eval makes numbers up. Choose another task, such as tasks=[zipeval_shapes]."
        )
    return file.parent


def _sources(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.suffix in (".yaml", ".py") or f.name.startswith("_default")]


def task_hash(folder: Path, questions: list[dict] | None = None) -> str:
    """Hash of a task's definition, and of its data where that lies beside it or is given."""
    defined = digest_files([*_sources(folder), *folder.glob("*.parquet"), *folder.glob("*.jsonl")])
    if not questions:
        return defined
    asked = [{**row, "video": Path(row["video"]).stem} for row in questions]  # wherever the videos lie
    return hashlib.sha256(f"{defined}{asked}".encode()).hexdigest()[:16]

"""The regression gate: records beside a committed baseline (baseline.py), sample by sample. Imports no torch.

A record has regressed where its score is worse by more than it may be or significantly worse, where other visual tokens
or costs were measured, where more than a few samples have another answer, other tokens left or other logits, or where
the same answer has another score. All but the first also if scores are as good: a method whose merging was lost may
answer as well, and is another method; and a scorer that calls everything right is no scorer.

A record that other code or other packages made says nothing about those that are installed, and is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.methods import modules
from zipeval.regression import baseline, entries
from zipeval.regression.comparison import compare_entries
from zipeval.regression.verdicts import (
    INCOMPARABLE,
    NEW,
    PASSED,
    REGRESSED,
    Verdict,
)
from zipeval.reporting.scored_samples import score_disagreement
from zipeval.results import records

# Words for what makes two records incomparable; other fields have plain names.
WORDS = {
    "fingerprint": "weights",
    "task_hash": "task",
    "data_hash": "data",
    "limit": "samples",
}


@dataclass(frozen=True)
class Candidate:
    """A record that answers the same questions as one of the baseline.

    Attributes:
        record: the record.
        entry: what a baseline would hold of it.
        samples: its samples, in the order of their doc_id.
    """

    record: dict[str, Any]
    entry: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def path(self) -> str:
        """Return the path of the record."""
        return self.record["path"]


def check(
    against: Path, results: str, max_drop: float, allow_other_code: bool = False
) -> list[Verdict]:
    """Return a verdict on every record of the baseline, then on records that it does not have.

    Args:
        against: the baseline's file.
        results: directory of runs.
        max_drop: largest drop of a score, in percent of the baseline's.
        allow_other_code: compare also records that other code or package versions than the installed ones made.

    Raises:
        UsageError: if either cannot be read.
    """
    baseline_entries = baseline.read(against)
    current = [
        (entries.identity_of(record), record) for record in records.read_all(results)
    ]
    verdicts = []
    for entry in baseline_entries:
        candidates = [r for identity, r in current if identity == entry["of"]]
        verdicts.append(
            _verdict(entry, candidates, results, max_drop, allow_other_code)
        )
    known = [entry["of"] for entry in baseline_entries]
    for identity, record in current:
        if identity not in known:
            line = f"{record['path']} is not in it"
            verdicts.append(Verdict(entries.name(identity), NEW, [line]))
    return verdicts


def _verdict(
    entry: dict[str, Any],
    candidates: list[dict[str, Any]],
    results: str,
    max_drop: float,
    allow_other_code: bool,
) -> Verdict:
    """Return the verdict on one record of the baseline, beside those of the same name."""
    refusal = ""
    comparable = []
    for record in candidates:
        if records.incomplete(record):
            refusal = f"{record['path']}: {entries.WAITS}"
            continue
        samples = entries.sorted_samples(record)
        current = entries.entry(record, samples)
        if current["same"] == entry["same"]:
            comparable.append(Candidate(record, current, samples))
        else:
            refusal = _differences(entry["same"], current["same"], record["path"])
    if len(comparable) == 1:
        return _compare(entry, comparable[0], max_drop, allow_other_code)
    if comparable:
        paths = ", ".join(candidate.path for candidate in comparable)
        refusal = f"{paths}: all are of it. Move away what is not to be compared, or give another results=DIR"
    if not candidates:
        refusal = (
            f"results={results}: no record of it. Make it: `{_run_command(entry)}`"
        )
    return Verdict(entries.name(entry["of"]), INCOMPARABLE, [refusal])


def _run_command(entry: dict[str, Any]) -> str:
    """Return the command that makes a record of the baseline, as far as its name tells."""
    identity = entry["of"]
    settings = {
        "model": identity["model"],
        "method": identity["method"].split()[0],
        "tokens": identity["tokens"],
        "limit": entry["same"]["limit"],
    }
    command = "zipeval run"
    for setting, value in settings.items():
        if value is not None:
            command += f" {setting}={value}"
    return f"{command} tasks=[{identity['task']}] ..."


def _compare(
    entry: dict[str, Any],
    candidate: Candidate,
    max_drop: float,
    allow_other_code: bool,
) -> Verdict:
    """Return the verdict on a record that answers the same questions as the baseline's."""
    name = entries.name(entry["of"])
    other_code = ", ".join(_other_code(candidate.record))
    obstacle = ""
    if other_code and not allow_other_code:
        obstacle = (
            f"{candidate.path}: was made with {other_code}. Run it again, into another results=DIR or with "
            "the record moved away; --allow-other-code compares it as it is"
        )
    else:
        obstacle = _flaw_of_baseline(entry, candidate)
    if obstacle:
        return Verdict(name, INCOMPARABLE, [obstacle])
    reasons, notes = compare_entries(
        entry, candidate.entry, candidate.samples, max_drop
    )
    contradiction = score_disagreement(candidate.record, candidate.samples)
    # A record that contradicts itself, and differs in nothing else, was edited or
    # damaged: that is no regression of the code.
    if contradiction and not reasons:
        again = records.again(Path(candidate.path))
        line = f"{contradiction}. Move both away and {again}"
        return Verdict(name, INCOMPARABLE, [line])
    if contradiction:
        reasons.append(contradiction)
    if other_code:
        notes.append(f"made by other code than this zipeval: {other_code}")
    return Verdict(name, REGRESSED if reasons else PASSED, reasons + notes)


def _flaw_of_baseline(entry: dict[str, Any], candidate: Candidate) -> str:
    """Return why an entry of the baseline cannot be compared with; nothing if it can."""
    scores, samples = entry["scores"], candidate.samples
    if len(scores) != len(samples):
        return f"the baseline has {len(scores)} samples of it, and {candidate.path} has {len(samples)}"
    # A judge's verdicts on LLaVA-Bench's references are in the record alone, so that
    # the baseline's score cannot be checked.
    if entry["of"]["task"] in PROTOCOLS:
        return ""
    before = entries.with_scores(samples, scores)
    contradiction = baseline.score_disagreement(entry, before)
    if contradiction:
        return f"the baseline contradicts itself: {contradiction}. Write a new one"
    return ""


def _other_code(record: dict[str, Any]) -> list[str]:
    """Return in words which code and packages that made a record are not those that are installed."""
    foreign = []
    for module in modules(record["config"]["method"]):
        if not f"{module}.".startswith("zipeval."):
            foreign.append(module)
    for module in foreign:
        try:
            import_module(module)
        except ImportError as error:
            return [f"code that is not here ({error})"]
    installed = {
        # Task and data are compared with the baseline's instead.
        "task_hash": record["task_hash"],
        "data_hash": record["data_hash"],
        "code": records.code(tuple(foreign)),
        "versions": _versions(),
    }
    recorded = {**record, "versions": record.get("versions", {})}
    return records.changes(recorded, installed)


@cache
def _versions() -> dict[str, str | None]:
    """Return the versions that are installed; looking them up for every record would take long."""
    return records.versions()


def _differences(before: dict[str, Any], after: dict[str, Any], path: str) -> str:
    """Return how two records that cannot be compared differ, the most telling first, and what to do.

    Args:
        before: the field `same` of the baseline's entry.
        after: the field `same` of the record's.
        path: of the record.
    """
    differences = []
    for name, value in before.items():
        if value != after[name]:
            word = WORDS.get(name, name)
            differences.append(
                f"other {word} ({name} {value} in the baseline, {after[name]} in {path})"
            )
    return f"{'; '.join(differences)}. Run it as the baseline was, or write a new one with `zipeval baseline`"

"""Verdicts of the regression gate, as a person, a pull request and a CI server read them."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from zipeval.errors import RunError, UsageError
from zipeval.results import records

PASSED = "ok"
REGRESSED = "REGRESSION"
INCOMPARABLE = "CANNOT COMPARE"
NEW = "new"
NOT_WELL = (REGRESSED, INCOMPARABLE)

# JUnit's element of a test case with this outcome, and the attribute that counts them.
JUNIT = {
    REGRESSED: ("failure", "failures"),
    INCOMPARABLE: ("error", "errors"),
    NEW: ("skipped", "skipped"),
}


@dataclass(frozen=True)
class Verdict:
    """Hold the outcome of a record.

    Attributes:
        name: model, method, budget and task.
        outcome: PASSED, REGRESSED, INCOMPARABLE, or NEW where the baseline has no such record.
        lines: why, then what else there is to say.
    """

    name: str
    outcome: str
    lines: list[str]


def conclude(verdicts: list[Verdict], against: Path, results: str) -> None:
    """Raise where not all is well.

    Args:
        verdicts: of the gate.
        against: the baseline's file.
        results: directory of runs.

    Raises:
        RunError: where a record has regressed.
        UsageError: where none has, but some cannot be compared.
    """
    counts = Counter(verdict.outcome for verdict in verdicts)
    if counts[REGRESSED]:
        command = ["zipeval", "baseline", f"results={results}", f"out={against}"]
        raise RunError(
            f"against={against}: {_count(counts[REGRESSED])} regressed. "
            f"Where that is meant, `{shlex.join(command)}` makes these records the new baseline."
        )
    if counts[INCOMPARABLE]:
        raise UsageError(
            f"against={against}: {_count(counts[INCOMPARABLE])} cannot be compared, see above."
        )


def text(verdicts: list[Verdict]) -> str:
    """Return verdicts as a person reads them."""
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.outcome:<15} {verdict.name}")
        lines += [f"    {line}" for line in verdict.lines]
    return "\n".join(lines)


def annotations(verdicts: list[Verdict]) -> str:
    """Return GitHub's workflow commands, which show what is not well beside a pull request."""
    lines = []
    for verdict in verdicts:
        if verdict.outcome not in NOT_WELL:
            continue
        title = _escaped(f"{verdict.outcome} {verdict.name}")
        # A colon ends the properties of a command, a comma ends one of them.
        title = title.replace(":", "%3A").replace(",", "%2C")
        message = _escaped("\n".join(verdict.lines))
        lines.append(f"::error title={title}::{message}")
    return "\n".join(lines)


def _escaped(message: str) -> str:
    """Escape a message for a workflow command, which is a line."""
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def write_junit(verdicts: list[Verdict], path: Path) -> None:
    """Write JUnit's XML, a test case for every record.

    Raises:
        UsageError: if `path` cannot be written.
    """
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    counts = {
        attribute: str(outcomes[outcome]) for outcome, (_, attribute) in JUNIT.items()
    }
    suite = ElementTree.Element(
        "testsuite", name="zipeval check", tests=str(len(verdicts)), **counts
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", classname="zipeval.check", name=verdict.name
        )
        if verdict.outcome in JUNIT:
            element, _ = JUNIT[verdict.outcome]
            report = ElementTree.SubElement(case, element, message=verdict.lines[0])
        else:
            report = ElementTree.SubElement(case, "system-out")
        report.text = "\n".join(verdict.lines)
    content = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write(path, content)
    except OSError as error:
        raise UsageError(
            f"junit={path}: cannot be written ({error.strerror}). Choose another --junit FILE."
        ) from error


def _count(number: int) -> str:
    return f"{number} record{'s' if number > 1 else ''}"

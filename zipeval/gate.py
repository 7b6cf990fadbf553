"""The regression gate: records beside a committed baseline (zipeval/baseline.py), sample by sample. Imports no torch.

A record has regressed where its score is lower by more than it may be or significantly lower, where other visual tokens
or costs were measured, or where more than a few samples have another answer or other tokens left. The last also if
scores are as good: a method whose merging was lost may answer as well, and is another method.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from zipeval import baseline, records, stats
from zipeval.errors import RunError, UsageError
from zipeval.methods import modules

PASSED, REGRESSED, INCOMPARABLE, NEW = "ok", "REGRESSION", "CANNOT COMPARE", "new"
# A method may decide by what it sees how many tokens it leaves; then rounding may move the mean of many samples a bit.
# A token more in one of LLaVA-NeXT's prompts of 2,880 is three times as much.
TOLERANCE = 1e-4
# Of samples that may have another answer, or other tokens left. In float32 none has, with other instructions of the
# processor, eager attention, batches of 7 or a shared prefix; without VisionZip's merging 2% have another answer, and
# the score is no lower.
SHARE = 0.01
SIGNIFICANT = 0.01  # p of a drop: a gate of many records is not to be red by chance
FEW = 3  # samples that are shown
SAYS = {"fingerprint": "weights", "task_hash": "task", "data_hash": "data", "limit": "samples"}  # others by their name


@dataclass(frozen=True)
class Verdict:
    """What is said of a record.

    Attributes:
        name: model, method, budget and task.
        outcome: PASSED, REGRESSED, INCOMPARABLE, or NEW where the baseline has no such record.
        lines: why, then what else there is to say.
    """

    name: str
    outcome: str
    lines: list[str]


def check(against: Path, results: str, max_drop: float) -> list[Verdict]:
    """A verdict on every record of the baseline, then on records that it does not have.

    Args:
        against: the baseline's file.
        results: directory of runs.
        max_drop: of a score, in percent of the baseline's.

    Raises:
        UsageError: if either cannot be read.
    """
    entries = baseline.read(against)
    found = records.read_all(results)
    known = [entry["of"] for entry in entries]
    new = [record for record in found if baseline.of(record) not in known]
    verdicts = []
    for entry in entries:
        candidates = [record for record in found if baseline.of(record) == entry["of"]]
        verdicts.append(_verdict(entry, candidates, results, max_drop))
    return verdicts + [Verdict(_name(baseline.of(record)), NEW, [f"{record['path']} is not in it"]) for record in new]


def conclude(verdicts: list[Verdict], against: Path, results: str) -> None:
    """Nothing where all is well.

    Args:
        against, results: as of `check`.

    Raises:
        RunError: where a record has regressed.
        UsageError: where none has, but some cannot be compared.
    """
    regressed, incomparable = (sum(v.outcome == outcome for v in verdicts) for outcome in (REGRESSED, INCOMPARABLE))
    if regressed:
        command = shlex.join(["zipeval", "baseline", f"results={results}", f"out={against}"])
        raise RunError(
            f"against={against}: {_count(regressed)} regressed. Where that is meant, `{command}` makes these records "
            "the new baseline."
        )
    if incomparable:
        raise UsageError(f"against={against}: {_count(incomparable)} cannot be compared, see above.")


def text(verdicts: list[Verdict]) -> str:
    """As a person reads it."""
    return "\n".join("\n    ".join([f"{v.outcome:<15} {v.name}", *v.lines]) for v in verdicts)


def annotations(verdicts: list[Verdict]) -> str:
    """GitHub's workflow commands, which put what is not well beside a pull request."""
    lines = []
    for verdict in verdicts:
        if verdict.outcome in (REGRESSED, INCOMPARABLE):
            title, message = _escaped(f"{verdict.outcome} {verdict.name}"), _escaped("\n".join(verdict.lines))
            lines.append(f"::error title={title.replace(':', '%3A').replace(',', '%2C')}::{message}")
    return "\n".join(lines)


def write_junit(verdicts: list[Verdict], path: Path) -> None:
    """As JUnit's XML: a test case for every record.

    Raises:
        UsageError: if `path` cannot be written.
    """
    elements = {REGRESSED: "failure", INCOMPARABLE: "error", NEW: "skipped"}
    counts = {
        name: str(sum(v.outcome == outcome for v in verdicts))
        for outcome, name in ((REGRESSED, "failures"), (INCOMPARABLE, "errors"), (NEW, "skipped"))
    }
    suite = ElementTree.Element("testsuite", name="zipeval check", tests=str(len(verdicts)), **counts)
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname="zipeval.check", name=verdict.name)
        if verdict.outcome in elements:
            case = ElementTree.SubElement(case, elements[verdict.outcome], message=verdict.lines[0])
        else:
            case = ElementTree.SubElement(case, "system-out")
        case.text = "\n".join(verdict.lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write(path, ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
    except OSError as error:
        raise UsageError(f"junit={path}: cannot be written ({error.strerror}). Choose another --junit FILE.") from error


def _verdict(entry: dict[str, Any], candidates: list[dict[str, Any]], results: str, max_drop: float) -> Verdict:
    """On one record of the baseline, beside those of the same name."""
    name, refusal, alike = _name(entry["of"]), "", []
    for record in candidates:
        if records.incomplete(record):
            refusal = f"{record['path']}: {baseline.WAITS}"
            continue
        samples = baseline.samples(record)
        now = baseline.entry(record, samples)
        if now["same"] == entry["same"]:
            alike.append((record, now, samples))
        else:
            refusal = _others(entry["same"], now["same"], record["path"])
    if len(alike) == 1:
        ((record, now, samples),) = alike
        reasons, notes = _compared(entry, now, samples, max_drop)
        notes += ["made by other code than this zipeval"] if _made_elsewhere(record) else []
        return Verdict(name, REGRESSED if reasons else PASSED, reasons + notes)
    if alike:
        paths = ", ".join(record["path"] for record, *_ in alike)
        refusal = f"{paths}: all are of it. Move away what is not to be compared, or give another results=DIR"
    if not candidates:
        its, limit = entry["of"], entry["same"]["limit"]
        given = {"model": its["model"], "method": its["method"].split()[0], "tokens": its["tokens"], "limit": limit}
        settings = " ".join(f"{k}={v}" for k, v in given.items() if v is not None)
        refusal = f"results={results}: no record of it. Make it: `zipeval run {settings} tasks=[{its['task']}] ...`"
    return Verdict(name, INCOMPARABLE, [refusal])


def _made_elsewhere(record: dict[str, Any]) -> bool:
    """Whether other code than what is installed made it. Of others' methods only importing them would tell."""
    own = all(name.startswith("zipeval.") for name in modules(record["config"]["method"]))
    return own and record.get("code") not in (None, records.code())


def _others(then: dict[str, Any], now: dict[str, Any], path: str) -> str:
    """What two records that cannot be compared do not agree on, the most telling first, and what to do."""
    found = [
        f"other {SAYS.get(name, name)} ({name} {then[name]} in the baseline, {now[name]} in {path})"
        for name in then
        if then[name] != now[name]
    ]
    return f"{'; '.join(found)}. Run it as the baseline was, or write a new one with `zipeval baseline`"


def _compared(
    then: dict[str, Any], now: dict[str, Any], samples: list[dict[str, Any]], max_drop: float
) -> tuple[list[str], list[str]]:
    """(why it has regressed, what else there is to say) of two records of the same questions."""
    reasons, notes = _score(then, now, samples, max_drop)
    for name, before in then["measured"].items():
        after = now["measured"][name]
        if not np.allclose(before, after, rtol=TOLERANCE, atol=0):
            reasons.append(f"{name}: {_numbers(before)} -> {_numbers(after)}")
    for name, said in (("answers", "another answer"), ("left", "other tokens left")):
        changed = _changed(then[name], now[name], len(samples))
        share = f"{said} in {changed} of {len(samples)} samples"
        if changed > SHARE * len(samples):
            reasons.append(f"{share}, more than {SHARE:.0%}")
        elif changed:
            notes.append(share)
    if reasons or notes:
        notes += [*_flips(then, samples), f"zipeval's commit: {_commit(then['git'])} -> {_commit(now['git'])}"]
    return reasons, notes


def _score(then: dict, now: dict, samples: list[dict], max_drop: float) -> tuple[list[str], list[str]]:
    """Likewise of their scores, of which some tasks have none."""
    old, new = then["score"], now["score"]
    if old is None or new is None:
        return ([] if old is new else [f"score: {old} -> {new}"]), []
    line = f"{then['metric']} {old:.4g} -> {new:.4g}"
    # A baseline has none of these: a comparison with one means nothing.
    odd = [s["doc_id"] for s in samples if s["score"] is not None and not math.isfinite(s["score"])]
    if odd or not math.isfinite(new):
        where = f" in {len(odd)} samples, the first doc_id {odd[0]}" if odd else ""
        return [f"{line}: not a finite number{where}"], []
    if new >= old:
        return [], [f"{line}, better"] if new > old else []
    # Of a judge's verdicts on LLaVA-Bench's references, the new ones stand for both.
    before = [{**sample, "score": score} for sample, score in zip(samples, then["scores"], strict=True)]
    task = then["of"]["task"]
    p = stats.compare(task, samples, before, resamples=0).p
    surely = not stats.tied(task, samples, before) and (p is None or p < SIGNIFICANT)
    lower = round(100 * (old - new) / abs(old), stats.DIGITS) if old else float("inf")
    line += f", {lower:.3g}% lower" + (f", p = {p:.2g}" if p is not None else "")
    if lower > max_drop or surely:
        return [f"{line}: {f'more than max_drop={max_drop:g}' if lower > max_drop else 'significant'}"], []
    return [], [line]


def _changed(then: str | None, now: str | None, count: int) -> int:
    """Of how many samples the codes are not the same; of all, if there are none on one side."""
    if None in (then, now):
        return 0 if then is now else count
    width = baseline.WIDTH
    return sum(then[i : i + width] != now[i : i + width] for i in range(0, width * count, width))


def _flips(then: dict[str, Any], samples: list[dict[str, Any]]) -> list[str]:
    """How many samples were lost and gained, and the first of them."""
    lines = []
    for name, sign in (("lost", -1), ("gained", 1)):
        pairs = zip(samples, then["scores"], strict=True)
        moved = [(s, was) for s, was in pairs if None not in (s["score"], was) and sign * (s["score"] - was) > 0]
        lines.append(f"{len(moved)} samples {name}")
        for sample, was in moved[:FEW]:
            answer, target = (ascii(sample[key])[:80] for key in ("prediction", "target"))
            scores = f"score {was:g} -> {sample['score']:g}"
            lines.append(f"  doc_id {sample['doc_id']}: {scores}, answers {answer}, target {target}")
    return lines


def _commit(git: dict[str, Any] | None) -> str:
    """Of a record; None: an installed wheel made it."""
    return f"{git['revision'][:10]}{' with changes' if git['dirty'] else ''}" if git else "unknown"


def _name(its: dict[str, Any]) -> str:
    return " ".join(str(part) for part in its.values() if part is not None)


def _numbers(value: float | list[float]) -> str:
    return " ".join(f"{number:.6g}" for number in np.atleast_1d(value))


def _count(records: int) -> str:
    return f"{records} record{'s' if records > 1 else ''}"


def _escaped(message: str) -> str:
    """For a workflow command, which is a line."""
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

"""The regression gate: records beside a committed baseline (baseline.py), sample by sample. Imports no torch.

A record has regressed where its score is worse by more than it may be or significantly worse, where other visual tokens
or costs were measured, where more than a few samples have another answer, other tokens left or other logits, or where
the same answer has another score. All but the first also if scores are as good: a method whose merging was lost may
answer as well, and is another method; and a scorer that calls everything right is no scorer.

A record that other code or other packages made says nothing about those that are installed, and is not compared.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.errors import RunError, UsageError
from zipeval.methods import modules
from zipeval.regression import baseline
from zipeval.reporting import stats
from zipeval.reporting.scored_samples import score_disagreement
from zipeval.results import records

PASSED, REGRESSED, INCOMPARABLE, NEW = "ok", "REGRESSION", "CANNOT COMPARE", "new"
# A method may decide by what it sees how many tokens it leaves; then rounding may move the mean of many samples a bit.
# A token more in one of LLaVA-NeXT's prompts of 2,880 is three times as much.
TOLERANCE = 1e-4
# Of samples that may have another answer, or other tokens left. In float32 none has, with other instructions of the
# processor, eager attention, batches of 7 or a shared prefix; without VisionZip's merging 2% have another answer, and
# the score is no lower.
ONE_IN = 100
FEWEST = 20  # samples of which one may: of fewer, one is too much
# How far a first token's largest logit and log-sum-exp may be from the baseline's. In float32 on a CPU, batches of 1
# and 7, eager attention, a shared prefix, two threads and SSE instructions moved none of four methods' by more than
# 8e-6; logits are about 13. Where VisionZip's targets also join themselves, which changes no answer, 86 of 100 samples
# move by more than 1e-4, and the one that decides, the second of 100, by 2e-2.
LOGITS = 1e-4
EXACT = ("cpu", "float32")  # device and dtype in which logits are compared
RANDOM = (
    "mmmu_val",
)  # tasks in which another answer changes the scores of those behind it: they guess, with a seed
SCORE = 1e-9  # of a sample; less is a sum in another order
SIGNIFICANT = 0.01  # p of a drop: a gate of many records is not to be red by chance
FEW = 3  # samples that are shown
SAYS = {
    "fingerprint": "weights",
    "task_hash": "task",
    "data_hash": "data",
    "limit": "samples",
}  # others by their name


@dataclass(frozen=True)
class Verdict:
    """Hold what is said of a record.

    Attributes:
        name: model, method, budget and task.
        outcome: PASSED, REGRESSED, INCOMPARABLE, or NEW where the baseline has no such record.
        lines: why, then what else there is to say.
    """

    name: str
    outcome: str
    lines: list[str]


def check(
    against: Path, results: str, max_drop: float, allow_other_code: bool = False
) -> list[Verdict]:
    """Return a verdict on every record of the baseline, then on records that it does not have.

    Args:
        against: the baseline's file.
        results: directory of runs.
        max_drop: of a score, in percent of the baseline's.
        allow_other_code: compare also records that other code or package versions than the installed ones made.

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
        verdicts.append(
            _verdict(entry, candidates, results, max_drop, allow_other_code)
        )
    return verdicts + [
        Verdict(_name(baseline.of(record)), NEW, [f"{record['path']} is not in it"])
        for record in new
    ]


def conclude(verdicts: list[Verdict], against: Path, results: str) -> None:
    """Raise where not all is well.

    Args:
        against, results: as of `check`.

    Raises:
        RunError: where a record has regressed.
        UsageError: where none has, but some cannot be compared.
    """
    regressed, incomparable = (
        sum(v.outcome == outcome for v in verdicts)
        for outcome in (REGRESSED, INCOMPARABLE)
    )
    if regressed:
        command = shlex.join(
            ["zipeval", "baseline", f"results={results}", f"out={against}"]
        )
        raise RunError(
            f"against={against}: {_count(regressed)} regressed. Where that is meant, `{command}` makes these records "
            "the new baseline."
        )
    if incomparable:
        raise UsageError(
            f"against={against}: {_count(incomparable)} cannot be compared, see above."
        )


def text(verdicts: list[Verdict]) -> str:
    """Return verdicts as a person reads them."""
    return "\n".join(
        "\n    ".join([f"{v.outcome:<15} {v.name}", *v.lines]) for v in verdicts
    )


def annotations(verdicts: list[Verdict]) -> str:
    """GitHub's workflow commands, which put what is not well beside a pull request."""
    lines = []
    for verdict in verdicts:
        if verdict.outcome in (REGRESSED, INCOMPARABLE):
            title, message = (
                _escaped(f"{verdict.outcome} {verdict.name}"),
                _escaped("\n".join(verdict.lines)),
            )
            lines.append(
                f"::error title={title.replace(':', '%3A').replace(',', '%2C')}::{message}"
            )
    return "\n".join(lines)


def write_junit(verdicts: list[Verdict], path: Path) -> None:
    """Write JUnit's XML, a test case for every record.

    Raises:
        UsageError: if `path` cannot be written.
    """
    elements = {REGRESSED: "failure", INCOMPARABLE: "error", NEW: "skipped"}
    counts = {
        name: str(sum(v.outcome == outcome for v in verdicts))
        for outcome, name in (
            (REGRESSED, "failures"),
            (INCOMPARABLE, "errors"),
            (NEW, "skipped"),
        )
    }
    suite = ElementTree.Element(
        "testsuite", name="zipeval check", tests=str(len(verdicts)), **counts
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", classname="zipeval.check", name=verdict.name
        )
        if verdict.outcome in elements:
            case = ElementTree.SubElement(
                case, elements[verdict.outcome], message=verdict.lines[0]
            )
        else:
            case = ElementTree.SubElement(case, "system-out")
        case.text = "\n".join(verdict.lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write(
            path, ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
        )
    except OSError as error:
        raise UsageError(
            f"junit={path}: cannot be written ({error.strerror}). Choose another --junit FILE."
        ) from error


def _verdict(
    entry: dict[str, Any],
    candidates: list[dict[str, Any]],
    results: str,
    max_drop: float,
    allow_other_code: bool,
) -> Verdict:
    """Return the verdict on one record of the baseline, beside those of the same name."""
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
        return _compare(name, entry, *alike[0], max_drop, allow_other_code)
    if alike:
        paths = ", ".join(record["path"] for record, *_ in alike)
        refusal = f"{paths}: all are of it. Move away what is not to be compared, or give another results=DIR"
    if not candidates:
        identity, limit = entry["of"], entry["same"]["limit"]
        method = identity["method"].split()[0]
        options = {
            "model": identity["model"],
            "method": method,
            "tokens": identity["tokens"],
            "limit": limit,
        }
        settings = " ".join(f"{k}={v}" for k, v in options.items() if v is not None)
        refusal = f"results={results}: no record of it. Make it: `zipeval run {settings} tasks=[{identity['task']}] ...`"
    return Verdict(name, INCOMPARABLE, [refusal])


def _compare(
    name: str,
    entry: dict[str, Any],
    record: dict[str, Any],
    now: dict[str, Any],
    samples: list[dict[str, Any]],
    max_drop: float,
    allow_other_code: bool,
) -> Verdict:
    """Return the verdict on a record that answers the same questions as the baseline's."""
    other_code = _other_code(record)
    if other_code and not allow_other_code:
        line = (
            f"{record['path']}: was made with {', '.join(other_code)}. Run it again, into another results=DIR or with "
            "the record moved away; --allow-other-code compares it as it is"
        )
        return Verdict(name, INCOMPARABLE, [line])
    if len(entry["scores"]) != len(samples):
        line = f"the baseline has {len(entry['scores'])} samples of it, and {record['path']} has {len(samples)}"
        return Verdict(name, INCOMPARABLE, [line])
    before = [
        {**sample, "score": score}
        for sample, score in zip(samples, entry["scores"], strict=True)
    ]
    # A judge's verdicts on LLaVA-Bench's references are of the record alone, so that the baseline's cannot be checked.
    contradiction = (
        ""
        if entry["of"]["task"] in PROTOCOLS
        else baseline.score_disagreement(entry, before)
    )
    if contradiction:
        return Verdict(
            name,
            INCOMPARABLE,
            [f"the baseline contradicts itself: {contradiction}. Write a new one"],
        )
    reasons, notes = _compared(entry, now, samples, max_drop)
    contradiction = score_disagreement(record, samples)
    if contradiction and not reasons:
        again = records.again(Path(record["path"]))
        return Verdict(
            name, INCOMPARABLE, [f"{contradiction}. Move both away and {again}"]
        )
    reasons += [contradiction] if contradiction else []
    notes += (
        [f"made by other code than this zipeval: {', '.join(other_code)}"]
        if other_code
        else []
    )
    return Verdict(name, REGRESSED if reasons else PASSED, reasons + notes)


def _other_code(record: dict[str, Any]) -> list[str]:
    """Return in words what of the code and the packages that made a record is not what is installed."""
    foreign = [
        name
        for name in modules(record["config"]["method"])
        if not f"{name}.".startswith("zipeval.")
    ]
    for name in foreign:
        try:
            import_module(name)
        except ImportError as error:
            return [f"code that is not here ({error})"]
    unchanged = {
        name: record[name] for name in ("task_hash", "data_hash")
    }  # they are compared with the baseline's
    installed = {
        **unchanged,
        "code": records.code(tuple(foreign)),
        "versions": _versions(),
    }
    return records.changes(
        {**record, "versions": record.get("versions", {})}, installed
    )


@cache
def _versions() -> dict[str, str | None]:
    """Return the versions that are installed; looking them up for every record would take long."""
    return records.versions()


def _others(then: dict[str, Any], now: dict[str, Any], path: str) -> str:
    """Say what two records that cannot be compared differ in, the most telling first, and what to do."""
    found = [
        f"other {SAYS.get(name, name)} ({name} {then[name]} in the baseline, {now[name]} in {path})"
        for name in then
        if then[name] != now[name]
    ]
    return f"{'; '.join(found)}. Run it as the baseline was, or write a new one with `zipeval baseline`"


def _compared(
    then: dict[str, Any],
    now: dict[str, Any],
    samples: list[dict[str, Any]],
    max_drop: float,
) -> tuple[list[str], list[str]]:
    """Return why a record has regressed and what else there is to say, of two records of the same questions."""
    reasons, notes = _score(then, now, samples, max_drop)
    for name, before in then["measured"].items():
        after = now["measured"][name]
        if np.shape(before) != np.shape(after) or not np.allclose(
            before, after, rtol=TOLERANCE, atol=0
        ):
            reasons.append(f"{name}: {_numbers(before)} -> {_numbers(after)}")
    count, allowed = len(samples), allowed_changes(len(samples))
    changes = [
        (
            "another answer",
            _changed(then["answers"], now["answers"], count).sum(),
            allowed,
        ),
        (
            "other tokens left",
            _changed(then["left"], now["left"], count).sum(),
            allowed,
        ),
        (
            "another score of the same answer",
            _rescored(then, now).sum(),
            _allowed_rescoring(then["of"]["task"], count),
        ),
    ]
    if then["counts"] is not None:  # baselines of before have none
        changes.append(
            (
                "other counts of tokens",
                _changed(then["counts"], now["counts"], count).sum(),
                allowed,
            )
        )
    moved, remark = _moved(then, now)
    changes.append(("other logits", moved, allowed))
    for what, changed, tolerated in changes:
        share = f"{what} in {changed} of {count} samples"
        if changed > tolerated:
            reasons.append(f"{share}, more than {tolerated}")
        elif changed:
            notes.append(share)
    for name in ("metric", "higher_is_better"):
        if then[name] != now[name] and then[name] is not None:
            reasons.append(f"{name}: {then[name]} -> {now[name]}")
    if reasons or notes:
        notes += [
            *_flips(then, samples),
            f"zipeval's commit: {_commit(then['git'])} -> {_commit(now['git'])}",
        ]
    return reasons, [*notes, *remark]


def allowed_changes(samples: int) -> int:
    """Return in how many samples an answer, or the tokens left, may change: none of 19, one of 20, and one in 100."""
    return max(samples // ONE_IN, int(samples >= FEWEST))


def _allowed_rescoring(task: str, samples: int) -> int:
    """Return how many answers may have another score than the same answer had: none, but for judges and guesses."""
    if task in PROTOCOLS:
        return (
            samples // 2
        )  # a judge may change its mind, and is another one if it does so about most
    return allowed_changes(samples) if task in RANDOM else 0


def _rescored(then: dict[str, Any], now: dict[str, Any]) -> np.ndarray:
    """Return for every sample whether its answer is the same and its score is not."""
    old, new = (
        np.array(entry["scores"], float) for entry in (then, now)
    )  # None becomes nan
    equal = np.isclose(old, new, rtol=SCORE, atol=SCORE, equal_nan=True)
    return ~equal & ~_changed(then["answers"], now["answers"], len(old))


def _moved(then: dict[str, Any], now: dict[str, Any]) -> tuple[int, list[str]]:
    """Return in how many samples the logits are others, and a remark where they are not compared."""
    if then["digests"] is None:
        return 0, [] if now["digests"] is None else [
            "the baseline has no logits to compare: write a new one"
        ]
    device, dtype = then["same"]["device"], then["same"]["dtype"]
    if (device, dtype) != EXACT:
        return 0, [
            f"logits are not compared in {dtype} on {device}, where rounding moves them"
        ]
    if now["digests"] is None:  # what makes records now keeps them
        return len(now["scores"]), []
    old, new = baseline.digests(then), baseline.digests(now)
    return int(
        (~np.isclose(old, new, rtol=0, atol=LOGITS, equal_nan=True)).any(1).sum()
    ), []


def _score(
    then: dict, now: dict, samples: list[dict], max_drop: float
) -> tuple[list[str], list[str]]:
    """Return likewise what there is to say of their scores, of which some tasks have none."""
    old, new = then["score"], now["score"]
    if old is None or new is None:
        return ([] if old is new else [f"score: {old} -> {new}"]), []
    line = f"{then['metric']} {old:.4g} -> {new:.4g}"
    # A baseline has none of these: a comparison with one means nothing.
    odd = [
        s["doc_id"]
        for s in samples
        if s["score"] is not None and not math.isfinite(s["score"])
    ]
    if odd or not math.isfinite(new):
        where = f" in {len(odd)} samples, the first doc_id {odd[0]}" if odd else ""
        return [f"{line}: not a finite number{where}"], []
    higher = _is_higher_better(then, now)
    if new == old:
        return [], []
    if (new > old) == higher:
        return [], [f"{line}, better"]
    # Of a judge's verdicts on LLaVA-Bench's references, the new ones stand for both.
    before = [
        {**sample, "score": score}
        for sample, score in zip(samples, then["scores"], strict=True)
    ]
    task = then["of"]["task"]
    p = stats.compare(task, samples, before, resamples=0).p
    surely = not stats.tied(task, samples, before) and (p is None or p < SIGNIFICANT)
    worse = (
        round(100 * abs(old - new) / abs(old), stats.DIGITS) if old else float("inf")
    )
    line += f", {worse:.3g}% {'lower' if higher else 'higher'}" + (
        f", p = {p:.2g}" if p is not None else ""
    )
    if worse > max_drop > 0 and not surely and _is_of_one_sample(then, samples):
        return [], [f"{line}: one sample's, which may change"]
    if worse > max_drop or surely:
        return [
            f"{line}: {f'more than max_drop={max_drop:g}' if worse > max_drop else 'significant'}"
        ], []
    return [], [line]


def _is_of_one_sample(then: dict[str, Any], samples: list[dict[str, Any]]) -> bool:
    """Return whether a single sample made a score worse, of so few that it weighs more than 1%."""
    changed = sum(
        sample["score"] != score
        for sample, score in zip(samples, then["scores"], strict=True)
    )
    return changed == 1 and FEWEST <= len(samples) < ONE_IN


def _is_higher_better(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether more is better; baselines of schema 1 do not say."""
    return (
        now["higher_is_better"]
        if then["higher_is_better"] is None
        else then["higher_is_better"]
    )


def _changed(then: str | None, now: str | None, count: int) -> np.ndarray:
    """Return for every sample whether the codes are not the same; for all, if there are none on one side."""
    if None in (then, now):
        return np.full(count, then is not now)
    width = baseline.WIDTH
    return np.array(
        [
            then[i : i + width] != now[i : i + width]
            for i in range(0, width * count, width)
        ],
        bool,
    )


def _flips(then: dict[str, Any], samples: list[dict[str, Any]]) -> list[str]:
    """Return how many samples were lost and gained, and the first of them."""
    lines, better = [], -1 if then["higher_is_better"] is False else 1
    for name, sign in (("lost", -better), ("gained", better)):
        pairs = zip(samples, then["scores"], strict=True)
        moved = [
            (s, was)
            for s, was in pairs
            if None not in (s["score"], was) and sign * (s["score"] - was) > 0
        ]
        lines.append(f"{len(moved)} samples {name}")
        for sample, was in moved[:FEW]:
            answer, target = (
                ascii(sample[key])[:80] for key in ("prediction", "target")
            )
            scores = f"score {was:g} -> {sample['score']:g}"
            lines.append(
                f"  doc_id {sample['doc_id']}: {scores}, answers {answer}, target {target}"
            )
    return lines


def _commit(git: dict[str, Any] | None) -> str:
    """Return the commit of a record's `git`, which is None where an installed wheel made it."""
    return (
        f"{git['revision'][:10]}{' with changes' if git['dirty'] else ''}"
        if git
        else "unknown"
    )


def _name(its: dict[str, Any]) -> str:
    return " ".join(str(part) for part in its.values() if part is not None)


def _numbers(value: float | list[float]) -> str:
    return " ".join(f"{number:.6g}" for number in np.atleast_1d(value))


def _count(records: int) -> str:
    return f"{records} record{'s' if records > 1 else ''}"


def _escaped(message: str) -> str:
    """Escape a message for a workflow command, which is a line."""
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

"""Compare an entry of a baseline with a record's, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.regression import entries
from zipeval.reporting import stats

# Relative tolerance of measured tokens and costs. A method may decide by what it sees
# how many tokens it leaves; then rounding may move the mean of many samples a bit.
# A token more in one of LLaVA-NeXT's prompts of 2,880 is three times as much.
TOLERANCE = 1e-4

# One sample in so many may have another answer, or other tokens left. In float32 none
# has, with other instructions of the processor, eager attention, batches of 7 or a
# shared prefix; without VisionZip's merging 2% have another answer, and the score is
# no lower.
ONE_IN = 100
# Of fewer samples than these, one with another answer is too much.
FEWEST = 20

# How far a first token's largest logit and log-sum-exp may be from the baseline's. In
# float32 on a CPU, batches of 1 and 7, eager attention, a shared prefix, two threads
# and SSE instructions moved none of four methods' by more than 8e-6; logits are about
# 13. Where VisionZip's targets also join themselves, which changes no answer, 86 of
# 100 samples move by more than 1e-4, and the one that decides, the second of 100, by
# 2e-2.
LOGITS = 1e-4
# Device and dtype in which logits are compared.
EXACT = ("cpu", "float32")

# In these tasks another answer changes the scores of the samples behind it: they
# guess, with a seed.
RANDOM = ("mmmu_val",)
# A smaller difference of a sample's score comes from a sum in another order.
SCORE = 1e-9
# p of a drop: a gate of many records must not be red by chance.
SIGNIFICANT = 0.01
# Number of lost and of gained samples that are shown.
SHOWN = 3

Entry = dict[str, Any]
Samples = list[dict[str, Any]]
# Why a record has regressed, and what else there is to say.
Findings = tuple[list[str], list[str]]


def compare_entries(
    before: Entry, after: Entry, samples: Samples, max_drop: float
) -> Findings:
    """Return why a record has regressed, and what else there is to say.

    Args:
        before: the baseline's entry.
        after: the entry of a record that answers the same questions.
        samples: the record's samples, in the order of their doc_id.
        max_drop: largest drop of the score, in percent of the baseline's.
    """
    reasons, notes = _compare_scores(before, after, samples, max_drop)
    reasons += _measured_differences(before["measured"], after["measured"])
    count = len(samples)
    moved, remark = _moved_logits(before, after)
    changes = [*_changed_samples(before, after, count), ("other logits", moved)]
    for change, changed in changes:
        line = f"{change} in {changed} of {count} samples"
        allowed = allowed_changes(count)
        if change == RESCORED:
            allowed = _allowed_rescoring(before["of"]["task"], count)
        if changed > allowed:
            reasons.append(f"{line}, more than {allowed}")
        elif changed:
            notes.append(line)
    for name in ("metric", "higher_is_better"):
        # Baselines of schema 1 do not say whether higher is better.
        if before[name] not in (None, after[name]):
            reasons.append(f"{name}: {before[name]} -> {after[name]}")
    if reasons or notes:
        commits = f"{_commit(before['git'])} -> {_commit(after['git'])}"
        notes += [*_flips(before, samples), f"zipeval's commit: {commits}"]
    return reasons, notes + remark


RESCORED = "another score of the same answer"


def _changed_samples(before: Entry, after: Entry, count: int) -> list[tuple[str, int]]:
    """Return for each kind of change in how many samples it happened."""
    changes = [
        ("another answer", _changed(before["answers"], after["answers"], count)),
        ("other tokens left", _changed(before["left"], after["left"], count)),
        (RESCORED, _rescored(before, after)),
    ]
    # Baselines of schema 1 have no counts of tokens.
    if before["counts"] is not None:
        different = _changed(before["counts"], after["counts"], count)
        changes.append(("other counts of tokens", different))
    return [(change, int(changed.sum())) for change, changed in changes]


def _measured_differences(before: dict, after: dict) -> list[str]:
    """Return a line for each measured number of tokens, or cost, that is another one now."""
    lines = []
    for name, old in before.items():
        new = after[name]
        equal = np.shape(old) == np.shape(new)
        equal = equal and np.allclose(old, new, rtol=TOLERANCE, atol=0)
        if not equal:
            lines.append(f"{name}: {_numbers(old)} -> {_numbers(new)}")
    return lines


def allowed_changes(samples: int) -> int:
    """Return in how many samples an answer, or the tokens left, may change: none of 19, one of 20, and one in 100."""
    return max(samples // ONE_IN, int(samples >= FEWEST))


def _allowed_rescoring(task: str, samples: int) -> int:
    """Return how many answers may have another score than the same answer had: none, but for judges and guesses."""
    if task in PROTOCOLS:
        # A judge may change its mind; one that does so about most is another judge.
        return samples // 2
    return allowed_changes(samples) if task in RANDOM else 0


def _rescored(before: Entry, after: Entry) -> np.ndarray:
    """Return for every sample whether its answer is the same and its score is not, [samples]."""
    # None becomes nan.
    old = np.array(before["scores"], float)
    new = np.array(after["scores"], float)
    same_score = np.isclose(old, new, rtol=SCORE, atol=SCORE, equal_nan=True)
    same_answer = ~_changed(before["answers"], after["answers"], len(old))
    return ~same_score & same_answer


def _moved_logits(before: Entry, after: Entry) -> tuple[int, list[str]]:
    """Return in how many samples the logits are others, and a remark where they are not compared."""
    if before["digests"] is None and after["digests"] is None:
        return 0, []
    if before["digests"] is None:
        return 0, ["the baseline has no logits to compare: write a new one"]
    device, dtype = before["same"]["device"], before["same"]["dtype"]
    if (device, dtype) != EXACT:
        remark = (
            f"logits are not compared in {dtype} on {device}, where rounding moves them"
        )
        return 0, [remark]
    # Every record of this version has digests: without them, something is wrong.
    if after["digests"] is None:
        return len(after["scores"]), []
    # [samples, 2]: the largest logit and the log-sum-exp
    old = entries.digests(before)
    new = entries.digests(after)
    close = np.isclose(old, new, rtol=0, atol=LOGITS, equal_nan=True)
    return int((~close).any(axis=1).sum()), []


def _compare_scores(
    before: Entry, after: Entry, samples: Samples, max_drop: float
) -> Findings:
    """Return why the score has regressed, and what else there is to say; some tasks have no score."""
    old, new = before["score"], after["score"]
    if None in (old, new):
        return ([] if old is new else [f"score: {old} -> {new}"]), []
    line = f"{before['metric']} {old:.4g} -> {new:.4g}"
    if fault := _not_finite(new, samples):
        return [f"{line}: {fault}"], []
    if new == old:
        return [], []
    higher_is_better = before["higher_is_better"]
    # Baselines of schema 1 do not say.
    if higher_is_better is None:
        higher_is_better = after["higher_is_better"]
    if (new > old) == higher_is_better:
        return [], [f"{line}, better"]
    drop = round(100 * abs(old - new) / abs(old), stats.DIGITS) if old else math.inf
    line += f", {drop:.3g}% {'lower' if higher_is_better else 'higher'}"
    p, significant = _significance(before, samples)
    if p is not None:
        line += f", p = {p:.2g}"
    too_much = drop > max_drop
    one_sample = max_drop > 0 and _is_of_one_sample(before, samples)
    if too_much and one_sample and not significant:
        return [], [f"{line}: one sample's, which may change"]
    if too_much:
        return [f"{line}: more than max_drop={max_drop:g}"], []
    if significant:
        return [f"{line}: significant"], []
    return [], [line]


def _not_finite(score: float, samples: Samples) -> str:
    """Return in words which score is no finite number; nothing if all are.

    A baseline holds only finite scores, so that a comparison would mean nothing.
    """
    infinite = []
    for sample in samples:
        if sample["score"] is not None and not math.isfinite(sample["score"]):
            infinite.append(sample["doc_id"])
    if infinite:
        return f"not a finite number in {len(infinite)} samples, the first doc_id {infinite[0]}"
    return "" if math.isfinite(score) else "not a finite number"


def _significance(before: Entry, samples: Samples) -> tuple[float | None, bool]:
    """Return p of a worse score, where the task has a test, and whether the score is surely worse.

    A task whose number no test compares counts as surely worse, unless it is tied.
    """
    task = before["of"]["task"]
    # Judges' verdicts on LLaVA-Bench's references are in the new record alone, and
    # stand for both.
    old_samples = entries.with_scores(samples, before["scores"])
    p = stats.compare(task, samples, old_samples, resamples=0).p
    if stats.tied(task, samples, old_samples):
        return p, False
    return p, p is None or p < SIGNIFICANT


def _is_of_one_sample(before: Entry, samples: Samples) -> bool:
    """Return whether a single sample made a score worse, of so few that it weighs more than 1%."""
    if not FEWEST <= len(samples) < ONE_IN:
        return False
    pairs = zip(samples, before["scores"], strict=True)
    return sum(sample["score"] != score for sample, score in pairs) == 1


def _changed(before: str | None, after: str | None, count: int) -> np.ndarray:
    """Return for every sample whether the codes differ, [samples]; for all if only one side has codes."""
    if None in (before, after):
        return np.full(count, before is not after)
    return entries.split_codes(before, count) != entries.split_codes(after, count)


def _flips(before: Entry, samples: Samples) -> list[str]:
    """Return how many samples were lost and gained, and the first of them."""
    better = -1 if before["higher_is_better"] is False else 1
    # A sample without a score becomes nan, which is neither lost nor gained.
    old = np.array(before["scores"], float)
    new = np.array([sample["score"] for sample in samples], float)
    lines = []
    for name, sign in (("lost", -better), ("gained", better)):
        flipped = np.flatnonzero(sign * (new - old) > 0)
        lines.append(f"{len(flipped)} samples {name}")
        for number in flipped[:SHOWN]:
            sample = samples[number]
            answer = ascii(sample["prediction"])[:80]
            target = ascii(sample["target"])[:80]
            scores = f"score {old[number]:g} -> {new[number]:g}"
            lines.append(
                f"  doc_id {sample['doc_id']}: {scores}, answers {answer}, target {target}"
            )
    return lines


def _commit(git: dict[str, Any] | None) -> str:
    """Return the commit of a record's `git`, which is None where an installed wheel made it."""
    if git is None:
        return "unknown"
    changes = " with changes" if git["dirty"] else ""
    return git["revision"][:10] + changes


def _numbers(value: float | list[float]) -> str:
    return " ".join(f"{number:.6g}" for number in np.atleast_1d(value))

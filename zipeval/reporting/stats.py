"""Compute how sure the numbers of a table are, from the samples of two runs that answer the same questions.

Imports no torch.

The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) keeps pairs together: questions are drawn anew, each
with what both runs made of it, and the benchmark's own number is computed of every draw. Of n questions n - 1 are drawn
(Rao and Wu 1988): n would make intervals too narrow where kinds have few questions, as MME's. McNemar's exact test is a
binomial one of the questions that only one of two runs answers right.

A sample is what zipeval/results/records.py keeps. Samples without a score drop out, of both runs: those without a
verdict, and failed ones where lower is better. Other failed ones are wrong.

Where lower is better a percentage is the bound's share of the score, and a sample that scores 0 is right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError

LEVEL = 0.95
# The fields that two runs' samples of one question agree on.
QUESTION = ("doc_id", "question_hash", "kind", "group")
RESAMPLES = 10_000
# Tolerance of a score beside what its samples come to: sums in another order differ in
# the last bits.
REL_TOL = 1e-6
ABS_TOL = 1e-9
# Number of weights in memory at once.
CHUNK = 2**22
# Digits of percentages: equal runs are equal, whatever the last bits of a sum of tenths.
DIGITS = 9

# Bootstrap draws of one run's number, or of two runs', the number itself first.
Draws = np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Hold a run beside the upper bound.

    Attributes:
        percent: 100 x its number / the bound's, or the bound's / its own where lower is better; nan where that says
            nothing (zipeval/reporting/percentages.py), or no sample has a score.
        low: lower end of its 95% interval.
        high: upper end of it; both are nan where there is a single question, of a kind or at all, or none.
        lost: samples that only the bound answers right; None unless all are right or wrong, for conversations, and
            for an average.
        gained: samples that only this run answers right; None likewise.
        p: McNemar's exact test of the two, two-sided. It takes samples as independent, also those of one group.
    """

    percent: float
    low: float
    high: float
    lost: int | None = None
    gained: int | None = None
    p: float | None = None

    @property
    def distinguishable(self) -> bool:
        """Tell whether 100 lies outside the interval."""
        return self.low > 100 or self.high < 100


@dataclass(frozen=True)
class Statistic:
    """Describe how a task's number follows from its samples: it is a function of sums over units, which are drawn.

    Attributes:
        features: the samples of one unit -> what is summed.
        number: sums (..., kinds, features) -> numbers (...).
        grouped: a unit is the samples of one `group`, not a sample.
        kinds: every `kind` has sums of its own, and is drawn from on its own.
    """

    features: Callable[[Sequence[dict]], tuple[float, ...]]
    number: Callable[[np.ndarray], np.ndarray]
    grouped: bool = False
    kinds: bool = False


def _ratio(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the number that is the first sum as a share of the second."""
    return lambda sums: scale * sums[..., 0, 0] / sums[..., 0, 1]


def _score(samples: Sequence[dict]) -> tuple[float, ...]:
    (sample,) = samples
    return sample["score"], 1


def _beside_reference(samples: Sequence[dict]) -> tuple[float, ...]:
    (sample,) = samples
    return sample["score"], sample["scores"]["reference"]


def _later_rounds(samples: Sequence[dict]) -> tuple[float, ...]:
    """Return the right rounds and all rounds of a conversation: one of more rounds counts more."""
    (sample,) = samples
    return sample["score"] * sample["later"], sample["later"]


def _all_right(samples: Sequence[dict]) -> tuple[float, ...]:
    return min(sample["score"] for sample in samples), 1


def _right_and_all_right(samples: Sequence[dict]) -> tuple[float, ...]:
    right = sum(sample["score"] for sample in samples)
    return right, len(samples), *_all_right(samples)


def _positives(samples: Sequence[dict]) -> tuple[float, ...]:
    """Return true positives and wrong answers: F1 is 2 x the first / (2 x the first + the second)."""
    (sample,) = samples
    right = sample["score"]
    return right * (sample["target"] == "yes"), 1 - right


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    true, wrong = sums[..., 0], sums[..., 1]
    zeros = np.zeros_like(true)
    f1 = np.divide(2 * true, 2 * true + wrong, out=zeros, where=true > 0)
    return 100 * f1.mean(axis=-1)


def _sum_of_kinds(sums: np.ndarray) -> np.ndarray:
    """Return MME's score: of each kind accuracy, and accuracy of pictures of which both answers are right."""
    right, questions, all_right, groups = np.moveaxis(sums, -1, 0)
    return 100 * (right / questions + all_right / groups).sum(axis=-1)


# A task that has no place in a paper is on the scale of its samples.
MEAN = Statistic(_score, _ratio(1))
PERCENT = Statistic(_score, _ratio(100))
CONVERSATIONS = [name for name, known in BENCHMARKS.items() if known.turns]
STATISTICS = {
    "pope": Statistic(_positives, _mean_f1, kinds=True),
    "mme": Statistic(_right_and_all_right, _sum_of_kinds, grouped=True, kinds=True),
    "mmbench_en_dev": Statistic(_all_right, _ratio(100), grouped=True),
    "llava_in_the_wild": Statistic(_beside_reference, _ratio(100)),
    **dict.fromkeys(CONVERSATIONS, Statistic(_later_rounds, _ratio(100))),
}


def value(task: str, samples: list[dict]) -> float:
    """Return the number that a table shows, the record's `score`; nan where no sample has a score."""
    scored = [sample for sample in samples if sample["score"] is not None]
    numbers = _draws(task, scored, scored, 0, np.random.default_rng())
    return float(numbers[0, 0])


def agrees(task: str, samples: list[dict], score: float | None) -> bool:
    """Return whether a score is what a task's samples come to."""
    if score is None:
        return False
    number = value(task, samples)
    return bool(np.isclose(number, score, rtol=REL_TOL, atol=ABS_TOL))


def compare(
    task: str,
    samples: list[dict],
    bound: list[dict],
    resamples: int = RESAMPLES,
    seed: int = 0,
    higher_is_better: bool = True,
) -> Comparison:
    """Compare a run's samples with the upper bound's.

    Raises:
        UsageError: if they are not of the same questions.
    """
    ours, theirs = _paired(task, samples, bound)
    draws = _draws(task, ours, theirs, resamples, np.random.default_rng(seed))
    percentages = _percent(draws, higher_is_better)
    percent, low, high = _interval(percentages, complete=not higher_is_better)
    lost, gained, p = _flips(task, ours, theirs, higher_is_better)
    return Comparison(percent, low, high, lost, gained, p)


def average(
    pairs: list[tuple[str, list[dict], list[dict]]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    higher_is_better: Sequence[bool] = (),
) -> Comparison:
    """Return the mean of the percentages of several benchmarks, each of which is drawn from on its own.

    Args:
        pairs: of every benchmark the task, a run's samples, and the upper bound's.
        higher_is_better: of every benchmark; of all, if none is given.

    Raises:
        UsageError: if two are not of the same questions.
    """
    rng = np.random.default_rng(seed)
    directions = higher_is_better or [True] * len(pairs)
    percentages = []
    for (task, samples, bound), higher in zip(pairs, directions, strict=True):
        ours, theirs = _paired(task, samples, bound)
        percentages.append(_percent(_draws(task, ours, theirs, resamples, rng), higher))
    means = np.mean(percentages, axis=0)
    return Comparison(*_interval(means, complete=not all(directions)))


def tied(
    task: str,
    samples: list[dict],
    best: list[dict],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> bool:
    """Return whether 0 lies in the 95% interval of the difference of two runs' numbers, or there is no such interval.

    Raises:
        UsageError: if they are not of the same questions.
    """
    paired = _paired(task, samples, best)
    ours, theirs = _draws(task, *paired, resamples, np.random.default_rng(seed))
    _, low, high = _interval(np.round(ours - theirs, DIGITS))
    # Without an interval both ends are nan, and all comparisons are false.
    return not (low > 0 or high < 0)


def change(
    task: str, samples: list[dict], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Return how later rounds of conversations suffer from the visual tokens of the first round.

    Returns:
        Their accuracy minus that with a fresh selection, in points, and the ends of its 95% interval. Conversations,
        thus images, are drawn.
    """
    fresh = [{**sample, "score": sample["scores"]["fresh"]} for sample in samples]
    cached, anew = _draws(task, samples, fresh, resamples, np.random.default_rng(seed))
    return _interval(np.round(cached - anew, DIGITS))


def _paired(
    task: str, samples: list[dict], bound: list[dict]
) -> tuple[list[dict], list[dict]]:
    """Return the samples that have a score in both runs, in one order.

    Raises:
        UsageError: if they are not of the same questions.
    """
    ours = sorted(samples, key=lambda sample: sample["doc_id"])
    theirs = sorted(bound, key=lambda sample: sample["doc_id"])
    scored = []
    for pair in zip_longest(ours, theirs, fillvalue={}):
        question, other = (tuple(map(sample.get, QUESTION)) for sample in pair)
        if question != other:
            raise UsageError(
                f"tasks=[{task}]: the samples of two runs do not pair: {', '.join(QUESTION)} are {question} in one and "
                f"{other} in the other. `zipeval run` both with the same limit= and the same data."
            )
        if None not in (pair[0]["score"], pair[1]["score"]):
            scored.append(pair)
    if not scored:
        return [], []
    ours, theirs = zip(*scored, strict=True)
    return list(ours), list(theirs)


def _draws(
    task: str,
    ours: list[dict],
    theirs: list[dict],
    resamples: int,
    rng: np.random.Generator,
) -> Draws:
    """Return the numbers of two runs, [2, 1 + resamples]: of the samples as they are, then of every draw.

    Units that have the same features in both runs are interchangeable. So of a draw it is enough to know how often it
    has each combination of features, and that is distributed as a multinomial.
    """
    if not ours:
        return np.full((2, 1 + resamples), np.nan)
    statistic = STATISTICS.get(task, PERCENT if task in BENCHMARKS else MEAN)
    kinds = _units(statistic, ours, theirs)
    # [2 runs, 1 + resamples, kinds, features]
    sums = np.empty((2, 1 + resamples, len(kinds), kinds[0].shape[-1]))
    for k, units in enumerate(kinds):
        # combinations: [combinations, 2 runs, features]
        combinations, counts = np.unique(units, axis=0, return_counts=True)
        sums[:, 0, k] = np.tensordot(counts, combinations, axes=1)
        at_once = max(1, CHUNK // len(counts))
        for start in range(1, 1 + resamples, at_once):
            stop = min(start + at_once, 1 + resamples)
            # One unit less than there are is drawn (Rao and Wu 1988).
            weights = rng.multinomial(
                len(units) - 1, counts / len(units), size=stop - start
            )
            # [draws, 2 runs, features] -> [2 runs, draws, features]
            drawn = np.tensordot(weights, combinations, axes=1).swapaxes(0, 1)
            sums[:, start:stop, k] = drawn
    # Nothing is drawn of a single unit, so that its number is 0 / 0.
    with np.errstate(invalid="ignore"):
        numbers = statistic.number(sums)
    # Nor does a single unit say how much its kind varies.
    if min(map(len, kinds)) == 1:
        numbers[:, 1:] = np.nan
    return numbers


def _units(
    statistic: Statistic, ours: list[dict], theirs: list[dict]
) -> list[np.ndarray]:
    """Return the features of every kind's units, each [units, 2 runs, features]."""
    # Pairs of samples by kind, then by unit.
    kinds: dict[str, dict[int | str, list[tuple[dict, dict]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        sample = pair[0]
        kind = sample["kind"] if statistic.kinds else ""
        unit = sample["group"] if statistic.grouped else i
        kinds[kind][unit].append(pair)
    arrays = []
    for units in kinds.values():
        features = []
        for pairs in units.values():
            our_samples, their_samples = zip(*pairs, strict=True)
            features.append(
                [statistic.features(our_samples), statistic.features(their_samples)]
            )
        arrays.append(np.array(features, float))
    return arrays


def _percent(draws: Draws, higher_is_better: bool = True) -> Draws:
    """Return `percent_of_bound` of draws of a run's number and the bound's, [2, n] -> [n]."""
    ours, bound = draws
    over, under = (ours, bound) if higher_is_better else (bound, ours)
    defined = (bound > 0) & (under > 0)
    undefined = np.full_like(ours, np.nan)
    percent = np.divide(100 * over, under, out=undefined, where=defined)
    return np.round(percent, DIGITS)


def _interval(
    numbers: np.ndarray, complete: bool = False
) -> tuple[float, float, float]:
    """Return the first number, and the interval of the others, of which those that are nan are left out.

    Args:
        complete: whether there is no interval where more are nan than lie above it. An error of 0 stands for a
            percentage beyond all others, and without it the interval would end too early.
    """
    first, draws = float(numbers[0]), numbers[1:]
    finite = draws[np.isfinite(draws)]
    too_few = complete and finite.size < (1 + LEVEL) / 2 * draws.size
    if not finite.size or too_few:
        return first, np.nan, np.nan
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return first, float(low), float(high)


def _flips(
    task: str, ours: list[dict], theirs: list[dict], higher_is_better: bool
) -> tuple[int | None, int | None, float | None]:
    """Return lost, gained and p of a Comparison; None for scores that are not all right or wrong."""
    # A conversation's score is a share, also where all of them happen to be 0 or 1.
    if task in CONVERSATIONS or not ours:
        return None, None, None
    our_scores = np.array([sample["score"] for sample in ours], float)
    their_scores = np.array([sample["score"] for sample in theirs], float)
    if not np.isin([our_scores, their_scores], (0, 1)).all():
        return None, None, None
    lost = int((their_scores > our_scores).sum())
    gained = int((our_scores > their_scores).sum())
    if not higher_is_better:
        lost, gained = gained, lost
    # Importing it takes a second, which a table without statistics does not need.
    from scipy.stats import binomtest

    if lost + gained == 0:
        return lost, gained, 1.0
    return lost, gained, float(binomtest(min(lost, gained), lost + gained, 0.5).pvalue)

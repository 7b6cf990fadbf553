"""How sure the numbers of a table are, from the samples of two runs that answer the same questions. Imports no torch.

The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) keeps pairs together: questions are drawn anew, each
with what both runs made of it, and the benchmark's own number is computed of every draw. Of n questions n - 1 are drawn
(Rao and Wu 1988): n would make intervals too narrow where kinds have few questions, as MME's. McNemar's exact test is a
binomial one of the questions that only one of two runs answers right.

A sample is what zipeval/results/records.py keeps. Samples without a score drop out, of both runs: those without a
verdict, and failed ones where lower is better. Other failed ones are wrong.

Where lower is better a percentage is the bound's share of the score, and a sample that scores 0 is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from zipeval.benchmarks import BENCHMARKS
from zipeval.errors import UsageError

LEVEL = 0.95
QUESTION = (
    "doc_id",
    "question_hash",
    "kind",
    "group",
)  # what two runs' samples agree on
RESAMPLES = 10_000
REL_TOL = 1e-6  # of a score beside what its samples come to: sums in another order differ in the last bits
CHUNK = 2**22  # weights in memory at once
DIGITS = (
    9  # of percentages: equal runs are equal, whatever the last bits of a sum of tenths
)


@dataclass(frozen=True)
class Comparison:
    """A run beside the upper bound.

    Attributes:
        percent: 100 x its number / the bound's, or the bound's / its own where lower is better; nan where that says
            nothing (zipeval/reporting/percentages.py), or no sample has a score.
        low, high: 95% interval of it; nan where there is a single question, of a kind or at all, or none.
        lost, gained: samples that only the bound, or only this run, answers right; None unless all are right or wrong,
            for conversations, and for an average.
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
    return lambda sums: scale * sums[..., 0, 0] / sums[..., 0, 1]


def _score(samples: Sequence[dict]) -> tuple[float, ...]:
    (sample,) = samples
    return sample["score"], 1


def _beside_reference(samples: Sequence[dict]) -> tuple[float, ...]:
    (sample,) = samples
    return sample["score"], sample["scores"]["reference"]


def _later_rounds(samples: Sequence[dict]) -> tuple[float, ...]:
    """Right ones, and all: conversations of more rounds count more."""
    (sample,) = samples
    return sample["score"] * sample["later"], sample["later"]


def _all_right(samples: Sequence[dict]) -> tuple[float, ...]:
    return min(s["score"] for s in samples), 1


def _right_and_all_right(samples: Sequence[dict]) -> tuple[float, ...]:
    return sum(s["score"] for s in samples), len(samples), *_all_right(samples)


def _positives(samples: Sequence[dict]) -> tuple[float, ...]:
    """True positives, and wrong answers: F1 is 2 x the first / (2 x the first + the second)."""
    (sample,) = samples
    right = sample["score"]
    return right * (sample["target"] == "yes"), 1 - right


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    true, wrong = sums[..., 0], sums[..., 1]
    return 100 * np.divide(
        2 * true, 2 * true + wrong, out=np.zeros_like(true), where=true > 0
    ).mean(-1)


def _sum_of_kinds(sums: np.ndarray) -> np.ndarray:
    right, questions, all_right, groups = np.moveaxis(sums, -1, 0)
    return 100 * (right / questions + all_right / groups).sum(-1)


MEAN = Statistic(_score, _ratio(1))  # of a task that has no place in a paper
PERCENT = Statistic(_score, _ratio(100))
STATISTICS = {
    "pope": Statistic(_positives, _mean_f1, kinds=True),
    "mme": Statistic(_right_and_all_right, _sum_of_kinds, grouped=True, kinds=True),
    "mmbench_en_dev": Statistic(_all_right, _ratio(100), grouped=True),
    "llava_in_the_wild": Statistic(_beside_reference, _ratio(100)),
    **{
        task: Statistic(_later_rounds, _ratio(100))
        for task, known in BENCHMARKS.items()
        if known.turns
    },
}


def value(task: str, samples: list[dict]) -> float:
    """Return the number that a table shows, the record's `score`; nan where no sample has a score."""
    scored = [s for s in samples if s["score"] is not None]
    return float(_draws(task, scored, scored, 0, np.random.default_rng())[0, 0])


def agrees(task: str, samples: list[dict], score: float | None) -> bool:
    """Return whether a score is what a task's samples come to."""
    number = value(task, samples)
    return score is not None and bool(
        np.isclose(number, score, rtol=REL_TOL, atol=1e-9)
    )


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
    percentages = _percent(
        _draws(task, ours, theirs, resamples, np.random.default_rng(seed)),
        higher_is_better,
    )
    return Comparison(
        *_interval(percentages, not higher_is_better),
        *_flips(task, ours, theirs, higher_is_better),
    )


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
    percentages = [
        _percent(_draws(task, *_paired(task, ours, bound), resamples, rng), higher)
        for (task, ours, bound), higher in zip(pairs, directions, strict=True)
    ]
    return Comparison(*_interval(np.mean(percentages, axis=0), not all(directions)))


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
    ours, theirs = _draws(
        task, *_paired(task, samples, best), resamples, np.random.default_rng(seed)
    )
    _, low, high = _interval(np.round(ours - theirs, DIGITS))
    return not (low > 0 or high < 0)


def change(
    task: str, samples: list[dict], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Of conversations, what becomes of later rounds that have to make do with the visual tokens of the first one:
    accuracy minus that with a fresh selection, in points, and its 95% interval. Conversations are drawn: images.
    """
    fresh = [{**sample, "score": sample["scores"]["fresh"]} for sample in samples]
    cached, anew = _draws(task, samples, fresh, resamples, np.random.default_rng(seed))
    return _interval(np.round(cached - anew, DIGITS))


def _paired(
    task: str, samples: list[dict], bound: list[dict]
) -> tuple[list[dict], list[dict]]:
    """Return the samples that have a score in both runs, in one order."""
    ours, theirs = (sorted(of, key=lambda s: s["doc_id"]) for of in (samples, bound))
    for pair in zip_longest(ours, theirs, fillvalue={}):
        here, there = (tuple(map(sample.get, QUESTION)) for sample in pair)
        if here != there:
            raise UsageError(
                f"tasks=[{task}]: the samples of two runs do not pair: {', '.join(QUESTION)} are {here} in one and "
                f"{there} in the other. `zipeval run` both with the same limit= and the same data."
            )
    both = [
        pair
        for pair in zip(ours, theirs, strict=True)
        if None not in (pair[0]["score"], pair[1]["score"])
    ]
    return [a for a, _ in both], [b for _, b in both]


def _draws(
    task: str,
    ours: list[dict],
    theirs: list[dict],
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The numbers of two runs, (2, 1 + resamples): of the samples as they are, then of every draw.

    Units that have the same features in both runs are interchangeable. So of a draw it is enough to know how often it
    has each combination of features, and that is distributed as a multinomial.
    """
    if not ours:
        return np.full((2, 1 + resamples), np.nan)
    statistic = STATISTICS.get(task, PERCENT if task in BENCHMARKS else MEAN)
    kinds = _units(statistic, ours, theirs)
    sums = np.empty((2, 1 + resamples, len(kinds), kinds[0].shape[-1]))
    for k, units in enumerate(kinds):
        found, counts = np.unique(units, axis=0, return_counts=True)
        sums[:, 0, k] = np.tensordot(counts, found, axes=1)
        at_once = max(1, CHUNK // len(counts))
        for start in range(1, 1 + resamples, at_once):
            stop = min(start + at_once, 1 + resamples)
            weights = rng.multinomial(
                len(units) - 1, counts / len(units), size=stop - start
            )
            sums[:, start:stop, k] = np.tensordot(weights, found, axes=1).swapaxes(0, 1)
    with np.errstate(invalid="ignore"):  # nothing is drawn of a single unit
        numbers = statistic.number(sums)
    if min(map(len, kinds)) == 1:
        numbers[:, 1:] = np.nan  # nothing says how much that kind varies
    return numbers


def _units(
    statistic: Statistic, ours: list[dict], theirs: list[dict]
) -> list[np.ndarray]:
    """Return the features of every kind's units, (units, 2, features)."""
    kinds: dict[str, dict[int | str, list[tuple[dict, dict]]]] = {}
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        units = kinds.setdefault(pair[0]["kind"] if statistic.kinds else "", {})
        units.setdefault(pair[0]["group"] if statistic.grouped else i, []).append(pair)
    return [
        np.array(
            [
                [statistic.features(run) for run in zip(*unit, strict=True)]
                for unit in units.values()
            ],
            float,
        )
        for units in kinds.values()
    ]


def _percent(draws: np.ndarray, higher_is_better: bool = True) -> np.ndarray:
    """Return `percent_of_bound` of draws (2, n) of a run's number and the bound's."""
    ours, bound = draws
    over, under = (ours, bound) if higher_is_better else (bound, ours)
    defined = (bound > 0) & (under > 0)
    return np.round(
        np.divide(100 * over, under, out=np.full_like(ours, np.nan), where=defined),
        DIGITS,
    )


def _interval(
    numbers: np.ndarray, complete: bool = False
) -> tuple[float, float, float]:
    """Return the first number, and the interval of the others, of which those that are nan are left out.

    Args:
        complete: whether there is no interval where more are nan than lie above it. An error of 0 stands for a
            percentage beyond all others, and without it the interval would end too early.
    """
    drawn = numbers[1:][np.isfinite(numbers[1:])]
    if complete and drawn.size < (1 + LEVEL) / 2 * (numbers.size - 1):
        drawn = drawn[:0]
    low, high = (
        np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if drawn.size
        else (np.nan, np.nan)
    )
    return float(numbers[0]), float(low), float(high)


def _flips(
    task: str, ours: list[dict], theirs: list[dict], higher_is_better: bool
) -> tuple[int | None, int | None, float | None]:
    """Return lost, gained and p of a Comparison."""
    if (
        task in BENCHMARKS and BENCHMARKS[task].turns
    ):  # shares, also where all of them happen to be 0 or 1
        return None, None, None
    pairs = [(a["score"], b["score"]) for a, b in zip(ours, theirs, strict=True)]
    if not pairs or not {score for pair in pairs for score in pair} <= {0, 1}:
        return None, None, None
    from scipy.special import (
        bdtr,
    )  # half a second that a table without statistics does not take

    lost, gained = sum(b > a for a, b in pairs), sum(a > b for a, b in pairs)
    if not higher_is_better:
        lost, gained = gained, lost
    return (
        lost,
        gained,
        min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5))),
    )

"""One definition of a task's score: the metric that its record names, and that metric's value of every sample."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from numbers import Real
from statistics import fmean
from typing import Any

from zipeval.benchmarks import BENCHMARKS, lmms_names

# Tolerance of a score beside the mean of its samples: sums in another order differ in
# the last bits.
REL_TOL = 1e-6


def main_metric(
    task: str, metrics: Mapping[str, float], directions: Mapping[str, bool]
) -> str | None:
    """Return the metric that is the task's score.

    It is the benchmark's own or, of any other task, the first one of its metric_list that lmms-eval has a number for.

    Args:
        metrics: lmms-eval's numbers by their names; behind a comma they may name a filter.
        directions: whether more is better, of every metric in the order of the task's metric_list.

    Returns:
        None where the task only writes a file to submit.
    """
    if task in BENCHMARKS:
        return BENCHMARKS[task].metric
    # Of a metric under several filters, the first one's number is the score.
    reported: dict[str, str] = {}
    for name in metrics:
        reported.setdefault(without_filter(name), name)
    first = next(filter(reported.__contains__, directions), None)
    return reported.get(first)


def without_filter(name: str | None) -> str:
    """Return a metric's name as the task's metric_list and its samples have it; an empty one for None."""
    return (name or "").partition(",")[0]


def is_higher_better(metric: str | None, directions: Mapping[str, bool]) -> bool:
    """Return whether more of a metric is better, which it is unless its task declares otherwise."""
    return directions.get(without_filter(metric), True)


def sample_value(logged: Mapping[str, Any], metric: str | None) -> float | None:
    """Return a metric's value of a logged sample; None where the sample has no number of that name."""
    # Some metrics log what is scored all together, and no number of each sample.
    value = logged.get(without_filter(metric))
    return float(value) if isinstance(value, Real) else None


def is_mean(metric: str, score: float, logged: list[dict[str, Any]]) -> bool:
    """Return whether a metric is the mean of its samples' values.

    Whatever a task's own function is called, this is what its samples can be held
    against, and drawn from.
    """
    values = [sample_value(sample, metric) for sample in _samples_with(metric, logged)]
    if not values or None in values:
        return False
    return isclose(fmean(values), score, rel_tol=REL_TOL, abs_tol=1e-12)


def _samples_with(metric: str, logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples that a metric counts: some tasks score each by a part only."""
    name = without_filter(metric)
    return [sample for sample in logged if name in sample]


def without_failed(
    metrics: Mapping[str, float],
    directions: Mapping[str, bool],
    logged: list[dict[str, Any]],
    failed: set[int],
) -> dict[str, float]:
    """Return the metrics as they are when samples that could not be read do not pass for answers.

    lmms-eval scores an empty answer in their place. Where more is better, they count 0. Where less is better an empty
    answer may be perfect and an error has no worst value, so that they are left out of the mean; of a metric that is no
    mean they cannot be, and then it has no value.

    Args:
        failed: the doc_ids of those samples.
    """
    corrected = {}
    for name, score in metrics.items():
        samples = _samples_with(name, logged)
        higher = is_higher_better(name, directions)
        value = _score_without_failed(name, score, samples, failed, higher)
        if value is not None:
            corrected[name] = value
    return corrected


def _score_without_failed(
    metric: str,
    score: float,
    samples: list[dict[str, Any]],
    failed: set[int],
    higher_is_better: bool,
) -> float | None:
    """Return one metric as `without_failed` does; None where it then has no value.

    Args:
        samples: those that the metric counts.
    """
    answered = [sample for sample in samples if sample["doc_id"] not in failed]
    if len(answered) == len(samples):
        return score
    if not is_mean(metric, score, samples):
        # Where more is better, the task's own rule for an empty answer holds.
        return score if higher_is_better else None
    values = [sample_value(sample, metric) for sample in answered]
    if higher_is_better:
        values += [0.0] * (len(samples) - len(answered))
    return fmean(values) if values else None


def scores(
    task: str, results: dict[str, Any], samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the part of a record that lmms-eval's own scores make.

    Args:
        results: what lmms-eval returned.
        samples: what is kept of them, with their scores.
    """
    known = BENCHMARKS.get(task)
    directions = lmms_names.directions(results, task)
    failed = {sample["doc_id"] for sample in samples if "error" in sample}
    metrics = lmms_names.scores(results, task)
    metric = main_metric(task, metrics, directions)
    metrics = without_failed(metrics, directions, results["samples"][task], failed)
    score = metrics.get(metric)
    if known:
        # A benchmark's own number may follow from several of lmms-eval's, as MME's sum.
        metrics |= known.derive(metrics, samples) if known.derive else {}
        score = metrics[metric]
        # Into the units of the papers' tables.
        if score is not None:
            score *= known.scale
    return {
        "status": "success",
        "metric": metric,
        "higher_is_better": is_higher_better(metric, directions),
        "directions": directions,
        "score": score,
        "metrics": metrics,
    }


def follows_from_samples(
    task: str, samples: list[dict[str, Any]], score: float | None
) -> bool:
    """Return whether a score follows from its samples' scores, so that it can be checked and intervals be drawn."""
    # Imported here: a run is refused without the seconds of numpy.
    from zipeval.reporting import stats

    return stats.agrees(task, samples, score)

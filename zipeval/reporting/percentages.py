"""Percentages of an upper bound, of metrics of which more is better and of those of which less is."""

from __future__ import annotations

from math import nan


def percent_of_bound(
    score: float, bound: float, higher_is_better: bool = True
) -> float:
    """Return which part of the upper bound is left, in percent.

    Where lower is better it is the bound's share of the score: twice the error is 50%. A ratio says nothing about
    numbers that are not above zero: the bound has to be, and the score too where lower is better.

    Returns:
        nan where the ratio says nothing.
    """
    if bound <= 0 or (score <= 0 and not higher_is_better):
        return nan
    return 100 * score / bound if higher_is_better else 100 * bound / score

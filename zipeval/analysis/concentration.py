"""Measure how concentrated shares are: three measures, each from 0 or 1/n to 1 whatever the number of shares is.

All take non-negative numbers (..., n) that need not add up to one, and measure along the last dimension.
"""

from __future__ import annotations

import math

import numpy as np


def gini(x: np.ndarray) -> np.ndarray:
    """Return the Gini coefficient: 0 where all are equal, 1 - 1/n where one has everything.

    With x ascending, sum_i (2 i - n - 1) x_i / (n sum_i x_i), which is half of the mean absolute difference of two
    shares over their mean (Gini 1912; Sen, On Economic Inequality, 1973, section 2.3).
    """
    n = x.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    return (np.sort(x, -1) * weights).sum(-1) / (n * x.sum(-1))


def top(x: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Return the part of all that the largest `share` of them hold: about `share` where all are equal.

    Their number is rounded up to whole ones.
    """
    # 0.1 * 30 is a little more than 3 in floating point.
    count = math.ceil(share * x.shape[-1] - 1e-9)
    return np.sort(x, -1)[..., -count:].sum(-1) / x.sum(-1)


def entropy(x: np.ndarray) -> np.ndarray:
    """Return the entropy over its maximum: 1 where all are equal, 0 where one has everything.

    -sum_i p_i log p_i / log n with p = x / sum x and n > 1 (Shannon 1948, section 6).
    """
    p = x / x.sum(-1, keepdims=True)
    # 0 log 0 is 0 here, as it is in the limit.
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(-1) / np.log(x.shape[-1])

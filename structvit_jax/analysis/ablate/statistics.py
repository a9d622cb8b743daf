"""Means and deviations over seeds, and paired differences between arms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_rel


class Summary(NamedTuple):
    """Statistics of an arm over its seeds."""

    mean: float
    deviation: float  # sample standard deviation; nan for one seed
    seeds: int


class Comparison(NamedTuple):
    """Mean difference of two arms over pairs of runs with the same seed."""

    difference: float
    low: float  # 95 % confidence interval by Student's t; nan for one pair
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def summarize(values: Sequence[float]) -> Summary:
    """Return the statistics of at least one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Summary(float(np.mean(values)), deviation, len(values))


def compare(values: Sequence[float], base: Sequence[float]) -> Comparison:
    """Return the mean of `values` minus `base`, pair by pair, with its confidence interval.

    The interval assumes normal differences, which a few pairs cannot test. It does not cover the choice of
    test clips, which all runs share.
    """
    difference = float(np.subtract(values, base).mean())
    if len(values) < 2:
        return Comparison(difference, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns if all differences are equal
        interval = ttest_rel(values, base).confidence_interval()
    return Comparison(difference, float(interval.low), float(interval.high))

"""What seeds say: means, deviations, and differences between arms seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Summary(NamedTuple):
    """Of one arm over its seeds."""

    mean: float
    deviation: float  # standard deviation of a seed, n - 1 in the denominator; nan of one seed
    seeds: int


class Comparison(NamedTuple):
    """Of an arm with another, over pairs of runs with the same seed."""

    difference: float
    low: float  # 95 % confidence interval of the mean difference, by Student's t; nan of one pair
    high: float
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def summarize(values: Sequence[float]) -> Summary:
    """At least one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Summary(float(np.mean(values)), deviation, len(values))


def compare(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Comparison:
    """`values` less `others`, pair by pair.

    The interval assumes that differences are normal; few pairs can hardly tell. It says nothing of other
    test clips than these, which all runs share.
    """
    differences = np.subtract(values, others)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Comparison(mean, math.nan, math.nan, count)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    reach = float(student.ppf((1 + confidence) / 2, count - 1)) * error
    return Comparison(mean, mean - reach, mean + reach, count)

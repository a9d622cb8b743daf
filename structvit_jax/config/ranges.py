"""Ranges of values of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

_LARGEST = 3.4e38  # just below the largest float32


class Range(NamedTuple):
    """The values that a key takes."""

    holds: Callable[[Any], bool]  # may raise TypeError or ValueError for a value of another type
    phrase: str  # completes "it needs ..." in an error message

    def contains(self, value: Any) -> bool:
        """Return whether a value, of whatever type, is in the range."""
        try:
            return self.holds(value)
        except (TypeError, ValueError):
            return False


def at_least(least: int) -> Range:
    """Return the range of numbers from `least` upwards."""
    return Range(lambda n: n >= least, f"to be at least {least}")


def within(least: int, most: int, phrase: str = "") -> Range:
    """Return the range of numbers from `least` to `most`; `phrase` is how to write `most`."""
    return Range(lambda n: least <= n <= most, f"to lie from {least} to {phrase or most}")


def one_of(*values: str | int) -> Range:
    """Return the range of a few values."""
    *most, last = map(str, values)
    return Range(lambda value: value in values, f"to be {', '.join(most)} or {last}")


def _is_triple(value: Any, above: float) -> bool:
    return len(value) == 3 and all(isinstance(x, int | float) and above < x < math.inf for x in value)


def _is_interval(value: Any, most: float) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] <= most


ANY = Range(lambda _: True, "a value of its type")
FRACTION = Range(lambda x: 0 <= x <= 1, "to lie from 0 to 1")
BELOW_ONE = Range(lambda x: 0 <= x < 1, "to lie from 0 to below 1")
POSITIVE_FRACTION = Range(lambda x: 0 < x <= 1, "to lie above 0, up to 1")
POSITIVE = Range(lambda x: 0 < x <= _LARGEST, "to be positive, and finite in float32")
NOT_NEGATIVE = Range(lambda x: 0 <= x <= _LARGEST, "to be 0 or positive, and finite in float32")
COUNT = Range(lambda n: 0 <= n < 2**31, "to lie from 0 to below 2**31")
ALL_OR_COUNT = Range(lambda n: n == -1 or n >= 1, "to be -1 or at least 1")
FRACTIONS = Range(lambda x: _is_interval(x, 1), "two numbers, from and to, above 0 and up to 1")
RATIOS = Range(lambda x: _is_interval(x, math.inf), "two numbers, from and to, above 0")
TRIPLE = Range(lambda x: _is_triple(x, -math.inf), "three finite numbers, one per channel")
POSITIVE_TRIPLE = Range(lambda x: _is_triple(x, 0), "three finite numbers, one per channel, positive")
PATH = Range(lambda path: isinstance(path, str) and path.isprintable(), "a path of printable characters")

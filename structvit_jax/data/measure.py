"""Measure examples: sizes, lengths, whether they can be read, and which are the same in two splits."""

from __future__ import annotations

import collections
import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from structvit_jax.data.fingerprint import bytes_digest
from structvit_jax.data.index import Index
from structvit_jax.data.types import Source
from structvit_jax.utils.errors import DecodeError, UserError

_SAMPLED = 200  # examples of a split to measure at most


class Measured(NamedTuple):
    """Size and length of one example, or `problem`, the reason why it cannot be read."""

    width: int = 0  # pixels
    height: int = 0
    frames: int = 0
    problem: str = ""


class Spread(NamedTuple):
    """Minimum, median and maximum of some values."""

    least: int
    middle: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        ordered = sorted(values)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.least:,}"
        return f"{self.least:,} to {self.most:,} (median {self.middle:,})"


def measure(source: Source, number: int) -> Measured:
    """Measure an example by decoding its first, middle and last frame."""
    try:
        media = source.media(number) if isinstance(source, Index) else source.open(number)[0]
        with contextlib.closing(media):
            if media.missing:
                return Measured(problem=f"cut off: {media.missing} of {media.count} frames are missing")
            pictures = media.frames(sorted({0, media.count // 2, media.count - 1}))
    except DecodeError as error:
        return Measured(problem=str(error))
    return Measured(pictures.shape[2], pictures.shape[1], media.count)


def measure_some(source: Source, count: int = _SAMPLED, seconds: float | None = None) -> dict[int, Measured]:
    """Measure `count` examples spread over a split, or fewer if they take longer than `seconds`."""
    numbers = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    measured: dict[int, Measured] = {}
    started = time.monotonic()
    for number in np.random.default_rng(0).permutation(numbers).tolist():
        if measured and seconds is not None and time.monotonic() - started > seconds:
            break
        measured[number] = measure(source, number)
    return dict(sorted(measured.items()))


def typical(source: Source) -> Measured:
    """Return the median width, height and length of up to 16 examples, the same in every process.

    Raises:
      UserError: none of them can be read.
    """
    measured = measure_some(source, 16)
    read = [one for one in measured.values() if not one.problem]
    if not read:
        number, one = next(iter(measured.items()))
        raise UserError(
            f"none of {len(measured)} sampled examples can be read ({source.id(number)}: {one.problem})"
        )
    width, height, frames, _ = zip(*read, strict=True)
    return Measured(Spread.of(width).middle, Spread.of(height).middle, Spread.of(frames).middle)


class Duplicates(NamedTuple):
    """Test examples with the same bytes as training examples."""

    pairs: dict[int, int]  # test example -> training example
    test: int  # examples of each split that were compared
    train: int


def find_duplicates(train: Source, test: Source, limit: float | None) -> Duplicates:
    """Compare files of equal size in two splits, until `time.monotonic()` exceeds `limit`."""
    found = Duplicates({}, 0, 0)
    if not (isinstance(train, Index) and isinstance(test, Index)) or _is_one(train, test):
        return found

    def until_limit(index: Index) -> Iterator[tuple[int, int | None]]:
        for item in _sizes(index):
            yield item
            if limit is not None and time.monotonic() > limit:
                return

    by_size: dict[int, list[int]] = collections.defaultdict(list)
    for number, size in until_limit(test):
        found = found._replace(test=found.test + 1)
        if size is not None:
            by_size[size].append(number)
    digests: dict[int, dict[str, int]] = {}
    for number, size in until_limit(train):
        found = found._replace(train=found.train + 1)
        if size is None or size not in by_size:
            continue
        if size not in digests:
            digests[size] = {_digest(test, other): other for other in by_size[size]}
        if (other := digests[size].get(_digest(train, number))) is not None:
            found.pairs[other] = number
    return found


def _is_one(train: Index, test: Index) -> bool:
    """Return whether one split is used for both."""
    return len(train) == len(test) and train.root == test.root and train.entry(0) == test.entry(0)


def _sizes(index: Index) -> Iterator[tuple[int, int | None]]:
    """Yield examples, spread over the split, with the size of their file; None if it is not a whole file."""
    step = next(step for step in (7919, 7907, 7901, 1) if len(index) % step or step == 1)
    for position in range(len(index)):
        number = position * step % len(index)
        size = None
        if not index.entry(number).is_part:
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(index.path(number))
                size = status.st_size if stat.S_ISREG(status.st_mode) else None
        yield number, size


def _digest(index: Index, number: int) -> str:
    try:
        return bytes_digest([index.path(number)])
    except DecodeError:
        return f"unreadable {index.root} {number}"

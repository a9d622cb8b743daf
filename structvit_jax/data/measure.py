"""What examples are like: sizes, lengths, whether they can be read, and which are the same in two splits."""

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

_SAMPLED = 200  # examples of a split that are measured, at most


class Measured(NamedTuple):
    """What one example is like; `problem` says why it cannot be read."""

    width: int = 0
    height: int = 0
    frames: int = 0
    problem: str = ""


class Spread(NamedTuple):
    """The least, the middle and the largest of some values."""

    least: int
    middle: int
    most: int

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.least:,}"
        return f"{self.least:,} to {self.most:,} (median {self.middle:,})"


def spread(values: Sequence[int]) -> Spread:
    ordered = sorted(values)
    return Spread(ordered[0], ordered[len(ordered) // 2], ordered[-1])


def measure(source: Source, number: int) -> Measured:
    """Decode frames at the beginning, middle and end of an example, and return what it is like."""
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
    """Measure examples that are spread over a split; as many as `seconds` are enough for, one at least."""
    places = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    measured: dict[int, Measured] = {}
    started = time.monotonic()
    for place in np.random.default_rng(0).permutation(places).tolist():
        if measured and seconds is not None and time.monotonic() - started > seconds:
            break
        measured[place] = measure(source, place)
    return dict(sorted(measured.items()))


def typical(source: Source) -> Measured:
    """Return the median width, height and length of up to 16 examples, the same in every process.

    Raises:
      UserError: none of them can be read.
    """
    measured = measure_some(source, 16, None)
    read = [one for one in measured.values() if not one.problem]
    if not read:
        number, one = next(iter(measured.items()))
        raise UserError(
            f"none of {len(measured)} sampled examples can be read ({source.id(number)}: {one.problem})"
        )
    sizes = ([one.width for one in read], [one.height for one in read], [one.frames for one in read])
    width, height, frames = (spread(values).middle for values in sizes)
    return Measured(width, height, frames)


def duplicates(
    train_name: str, train: Source, test_name: str, test: Source, limit: float | None
) -> Iterator[str]:
    """Warn of test examples that have the same bytes as training examples, as far as time allows.

    Only files of equal size are read.
    """
    if not (isinstance(train, Index) and isinstance(test, Index)) or _is_one(train, test):
        return

    def is_over() -> bool:
        return limit is not None and time.monotonic() > limit

    sizes: dict[int, list[int]] = collections.defaultdict(list)
    seen = 0
    for number, size in _sizes(test):
        seen += 1
        if size is not None:
            sizes[size].append(number)
        if is_over():
            break
    digests: dict[int, dict[str, int]] = {}
    pairs: dict[int, int] = {}
    compared = 0
    for number, size in _sizes(train):
        compared += 1
        if size is not None and size in sizes:
            if size not in digests:
                digests[size] = {_digest(test, other): other for other in sizes[size]}
            if (other := digests[size].get(_digest(train, number))) is not None:
                pairs[other] = number
        if is_over():
            break
    if pairs:
        other, number = next(iter(pairs.items()))
        of = f"{len(pairs):,} of {seen:,} examples of {test_name}"
        most = (
            "" if compared >= len(train) else f" ({compared:,} of {len(train):,} training examples compared)"
        )
        yield (
            f"{of} have the same bytes as examples of {train_name}{most}, as {test.id(other)} and"
            f" {train.id(number)}: scores on them say nothing of new data"
        )


def _is_one(train: Index, test: Index) -> bool:
    """Whether a split is used for both."""
    return len(train) == len(test) and train.root == test.root and train.entry(0) == test.entry(0)


def _sizes(index: Index) -> Iterator[tuple[int, int | None]]:
    """Yield examples, spread over the split, with their file's size; None for what is not a whole file."""
    step = next(step for step in (7919, 7907, 7901, 1) if len(index) % step or step == 1)
    for place in range(len(index)):
        number = place * step % len(index)
        entry, size = index.entry(number), None
        if entry.start is None and entry.end is None:
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(index.path(number))
                size = status.st_size if stat.S_ISREG(status.st_mode) else None
        yield number, size


def _digest(index: Index, number: int) -> str:
    try:
        return bytes_digest([index.path(number)])
    except DecodeError:
        return f"unreadable {index.root} {number}"

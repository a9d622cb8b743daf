"""Survey a data set before training: count its examples, and find missing and unreadable ones.

An error makes a run pointless, a warning does not. `structvit prepare --check` decodes three frames of every
example. `structvit show --data`, and every run when it starts, decode some examples for about two seconds.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from structvit_jax.data.fingerprint import bytes_digest
from structvit_jax.data.index import LABELS, Index, suggest_label
from structvit_jax.data.limits import file_size
from structvit_jax.data.types import Source
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, printable
from structvit_jax.utils.tables import align_columns

_SAMPLED = 200  # largest number of examples of a split to decode
_SECONDS = 2.0  # duration of a survey that decodes only a sample
_ROWS = 15  # largest number of classes listed in a table
_IMBALANCE = 20  # warn if the largest class has at least this many times the examples of the smallest


class Measured(NamedTuple):
    """Size and length of one example, or `problem`, the reason why it cannot be read."""

    width: int = 0  # pixels
    height: int = 0
    frames: int = 0
    problem: str = ""


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


def _measure_some(source: Source, count: int, seconds: float | None = None) -> dict[int, Measured]:
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
    """Return the median width, height and length of up to 16 examples; they are the same in every process.

    Raises:
      UserError: none of them can be read.
    """
    measured = _measure_some(source, 16)
    read = [one for one in measured.values() if not one.problem]
    if not read:
        number, one = next(iter(measured.items()))
        raise UserError(
            f"none of {len(measured)} sampled examples can be read ({source.id(number)}: {one.problem})"
        )
    width, height, frames, _ = zip(*read, strict=True)
    return Measured(*map(statistics.median_high, (width, height, frames)))


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a surveyed data set.

    Attributes:
      name: "train", "val" or another name.
      source: its examples.
      measured: results for the examples that were decoded, by number.
    """

    name: str
    source: Source
    measured: Mapping[int, Measured]

    @functools.cached_property
    def classes(self) -> dict[str, int] | None:
        """Number of examples by class, without empty classes; None if labels are stored in the examples."""
        labels, names = getattr(self.source, "labels", None), self.source.class_names
        if labels is None:
            return None
        counts = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}

    @property
    def unknown(self) -> dict[str, int]:
        """Number of examples by label, for labels that are not a class."""
        return self.source.unknown_labels() if isinstance(self.source, Index) else {}

    @property
    def unreadable(self) -> list[str]:
        """Decoded examples that cannot be read, as "ID: REASON"."""
        return [
            f"{self.source.id(number)}: {one.problem}" for number, one in self.measured.items() if one.problem
        ]

    def range_text(self, field: str) -> str:
        """Return the range of a field of `Measured` as text, "" if no example was read."""
        return _range_text([getattr(one, field) for one in self.measured.values() if not one.problem])


@dataclasses.dataclass(frozen=True)
class Survey:
    """Contents of a data set. Each error makes a run pointless; it is one line that says what to do."""

    unit: str  # "images" or "videos"
    splits: tuple[Split, ...]  # the first is the training split
    notes: tuple[str, ...]  # on how the splits are stored
    warnings: tuple[str, ...]
    errors: tuple[str, ...]

    def check(self) -> None:
        """Raise the first error as a UserError, if there is one."""
        if self.errors:
            more = len(self.errors) - 1
            raise UserError(
                self.errors[0] + (f" (and {more} more: structvit show --data lists them)" if more else "")
            )

    def lines(self) -> list[str]:
        """Return the survey in a few lines, without errors."""
        train = self.splits[0]
        sizes = " + ".join(f"{len(split.source):,} {split.name}" for split in self.splits)
        first = f"data: {sizes} {self.unit}, {len(train.source.class_names):,} classes"
        if train.classes:
            first += f" of {_range_text(train.classes.values())}"
        if width := train.range_text("width"):
            first += f"; {width} x {train.range_text('height')} pixels"
            first += f", {train.range_text('frames')} frames" if self.unit == "videos" else ""
            sampled = len(train.measured)
            first += f" in {sampled:,} sampled examples" if sampled < len(train.source) else ""
        return [printable(first), *self._remarks()]

    def _remarks(self) -> list[str]:
        lines = [f"note: {line}" for line in self.notes] + [f"warning: {line}" for line in self.warnings]
        return list(map(printable, lines))

    def table(self) -> str:
        """Return the whole survey as a text table, followed by all notes, warnings and errors."""
        splits = self.splits
        rows = [
            [self.unit, *(split.name for split in splits)],
            ["examples", *(f"{len(split.source):,}" for split in splits)],
            *self._class_rows(),
            ["width, pixels", *(split.range_text("width") for split in splits)],
            ["height, pixels", *(split.range_text("height") for split in splits)],
        ]
        if self.unit == "videos":
            rows.append(["length, frames", *(split.range_text("frames") for split in splits)])
        rows += [
            ["decoded", *(f"{len(split.measured):,} of {len(split.source):,}" for split in splits)],
            ["of them unreadable", *(f"{len(split.unreadable):,}" for split in splits)],
        ]
        lines = [line.rstrip() for line in align_columns(rows)]
        errors = [f"error: {line}" for line in self.errors]
        return "\n".join([*map(printable, lines), *self._remarks(), *map(printable, errors)])

    def _class_rows(self) -> Iterator[list[str]]:
        """Yield the number of examples of each class, by decreasing size in the training split.

        If there are more than _ROWS, only the largest classes and the three smallest are shown.
        """
        class_names = self.splits[0].source.class_names
        counts = [{**split.unknown, **(split.classes or {})} for split in self.splits]
        if not any(counts):
            yield ["classes", *[f"{len(class_names):,}"] * len(counts)]
            return
        yield ["classes", *(f"{len(one):,}" for one in counts)]
        names = sorted({*class_names}.union(*counts), key=lambda name: (-counts[0].get(name, 0), name))
        shown = names if len(names) <= _ROWS else [*names[: _ROWS - 3], *names[-3:]]
        for name in shown:
            if len(shown) < len(names) and name == names[-3]:
                yield [f"  ... and {len(names) - len(shown):,} more", *[""] * len(counts)]
            short = name if len(name) <= 40 else f"{name[:37]}..."
            yield [f"  {short}", *(f"{one.get(name, 0):,}" for one in counts)]


def survey(
    sources: Mapping[str, Source],
    *,
    video: bool,
    measured: Mapping[str, Mapping[int, Measured]] | None = None,
    frames: int = 0,
) -> Survey:
    """Survey the splits of a data set.

    Args:
      sources: the splits by name; the first is the training split.
      video: whether examples are videos rather than images.
      measured: results for all examples of every split, if they exist already. With None, a sample is decoded
        for about two seconds.
      frames: number of frames that the model takes; shorter videos give a warning. 0 gives no warning.
    """
    deadline = None
    if measured is None:
        seconds = _SECONDS / (len(sources) + 1)
        measured = {name: _measure_some(source, _SAMPLED, seconds) for name, source in sources.items()}
        deadline = time.monotonic() + seconds
    splits = tuple(Split(name, source, measured[name]) for name, source in sources.items())
    duplicates = [line for split in splits[1:] for line in _duplicates(splits[0], split, deadline)]
    return Survey(
        unit="videos" if video else "images",
        splits=splits,
        notes=tuple(note for split in splits for note in getattr(split.source, "notes", ())),
        warnings=(*_warnings(splits, frames), *duplicates),
        errors=tuple(_errors(splits)),
    )


def _errors(splits: Sequence[Split]) -> Iterator[str]:
    train = splits[0]
    root = train.source.root if isinstance(train.source, Index) else ""
    labels_file = os.path.join(root, LABELS) if root else ""
    for split in splits:
        if split.unknown:
            suggestion = suggest_label(next(iter(split.unknown)), train.source.class_names)
            if os.path.isfile(labels_file):
                yield (
                    f"{labels_file} lacks {_list_classes(split.unknown)} of {split.name}: add the names, or"
                    f" remove the file to take the classes from {train.name}.{suggestion}"
                )
            else:
                yield (
                    f"{split.name} has {_list_classes(split.unknown)}, which {train.name} lacks: add training"
                    f" examples, or remove the examples of {split.name}.{suggestion}"
                )
        if split.measured and len(split.unreadable) == len(split.measured):
            yield (
                f"none of {len(split.measured):,} examples of {split.name} can be read"
                f" ({split.unreadable[0]})"
            )
    if train.classes is not None and len(train.classes) == 1:
        yield f"all examples of {train.name} have the class {next(iter(train.classes))!r}: add another class"


def _warnings(splits: Sequence[Split], frames: int) -> Iterator[str]:
    train = splits[0]
    for split in splits:
        if split.unreadable:
            yield (
                f"{len(split.unreadable):,} of {len(split.measured):,} decoded examples of {split.name}"
                f" cannot be read ({split.unreadable[0]})"
            )
    if short := sum(not one.problem and one.frames < frames for one in train.measured.values()):
        yield (
            f"{short:,} of {len(train.measured):,} decoded videos are shorter than the {frames} frames of a"
            " clip; their frames are repeated"
        )
    if not train.classes:
        return
    for split in splits[1:]:
        if split.classes is not None and (missing := [c for c in train.classes if c not in split.classes]):
            yield f"{split.name} has no example of {_list_classes(missing)}: its score says nothing about it"
    if missing := [name for name in train.source.class_names if name not in train.classes]:
        yield f"{train.name} has no example of {_list_classes(missing)}, which cannot be learned"
    smallest, largest = min(train.classes.values()), max(train.classes.values())
    if largest >= _IMBALANCE * smallest:
        yield f"the largest class of {train.name} has {largest:,} examples, the smallest {smallest:,}"


def _range_text(values: Collection[int]) -> str:
    """Return minimum, maximum and median as text; "" without values."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if low == high:
        return f"{low:,}"
    return f"{low:,} to {high:,} (median {statistics.median_high(values):,})"


def _list_classes(names: Mapping[str, int] | Sequence[str], most: int = 3) -> str:
    """Return class names as text: "the classes 'a', 'b', 'c' and 4 more"."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{'the classes' if len(names) > 1 else 'the class'} {shown}{more}"


def _duplicates(train: Split, test: Split, deadline: float | None) -> Iterator[str]:
    """Yield a warning if test files equal training files in size, beginning and end.

    Comparing stops at `deadline`, a value of `time.monotonic()`.
    """
    train_index, test_index = train.source, test.source
    if not (isinstance(train_index, Index) and isinstance(test_index, Index)):
        return
    if (train_index.root, len(train_index), train_index.entry(0)) == (
        test_index.root,
        len(test_index),
        test_index.entry(0),
    ):
        return  # the same split is used for training and testing
    by_size: dict[int, list[int]] = collections.defaultdict(list)  # test examples by size of their file
    test_compared = train_compared = 0
    for number, size in _file_sizes(test_index, deadline):
        test_compared += 1
        by_size[size].append(number)
    digests: dict[int, dict[str, int]] = {}  # test examples by size and digest
    pairs: dict[int, int] = {}  # test example -> training example
    for number, size in _file_sizes(train_index, deadline):
        train_compared += 1
        if not size or size not in by_size:
            continue
        with contextlib.suppress(DecodeError):
            if size not in digests:
                digests[size] = {bytes_digest([test_index.path(other)]): other for other in by_size[size]}
            if (other := digests[size].get(bytes_digest([train_index.path(number)]))) is not None:
                pairs[other] = number
    if pairs:
        other, number = next(iter(pairs.items()))
        part = (
            f" ({train_compared:,} of {len(train_index):,} training examples compared)"
            if train_compared < len(train_index)
            else ""
        )
        yield (
            f"{len(pairs):,} of {test_compared:,} examples of {test.name} seem to be copies of examples of"
            f" {train.name}{part}, such as {test_index.id(other)} and {train_index.id(number)}: their"
            " scores do not measure generalisation"
        )


def _file_sizes(index: Index, deadline: float | None) -> Iterator[tuple[int, int]]:
    """Yield examples in random order with the size of their file in bytes.

    The size is 0 for a part of a file, a folder of frames, and an unreadable file. The iteration stops when
    `time.monotonic()` exceeds `deadline`.
    """
    for number in np.random.default_rng(0).permutation(len(index)).tolist():
        size = 0
        if not index.entry(number).is_part:
            with contextlib.suppress(DecodeError):
                size = file_size(index.path(number))
        yield number, size
        if deadline is not None and time.monotonic() > deadline:
            return

"""Survey a data set before training: what is there, what is missing, what is wrong.

Errors make a run pointless, warnings do not. `structvit prepare --check` decodes every example for the
survey; `structvit show --data` and the start of a training sample for a few seconds.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from structvit_jax.data.folder import counts
from structvit_jax.data.index import LABELS, Index, Scan
from structvit_jax.data.measure import Measured, Spread, find_duplicates, measure_some
from structvit_jax.data.types import Source
from structvit_jax.utils.errors import UserError, printable

SECONDS = 2.0  # duration of a survey that samples
_ROWS = 15  # classes listed in a table
_IMBALANCE = 20  # ratio of the largest class to the smallest from which to warn


@dataclasses.dataclass(frozen=True)
class Split:
    """Contents of one split.

    Attributes:
      name: of the split.
      examples: number of examples.
      classes: number of examples by class, without empty classes; None if labels are stored with examples.
      unknown: number of examples by label, for labels that are none of the classes.
      scan: what else its folder contains.
      measured: sizes of the examples that were decoded.
    """

    name: str
    examples: int
    classes: Mapping[str, int] | None
    unknown: Mapping[str, int]
    scan: Scan
    measured: Mapping[int, Measured]

    @property
    def unreadable(self) -> dict[int, str]:
        return {number: one.problem for number, one in self.measured.items() if one.problem}

    @property
    def sides(self) -> tuple[Spread, Spread] | None:
        """Widths and heights in pixels; None if no example was read."""
        read = [one for one in self.measured.values() if not one.problem]
        if not read:
            return None
        return Spread.of([one.width for one in read]), Spread.of([one.height for one in read])

    @property
    def lengths(self) -> Spread | None:
        """Numbers of frames; None if no example was read."""
        read = [one.frames for one in self.measured.values() if not one.problem]
        return Spread.of(read) if read else None


@dataclasses.dataclass(frozen=True)
class Survey:
    """Contents of a data set; `errors` make a run pointless, one line each with the way out."""

    unit: str  # "images" or "videos"
    splits: tuple[Split, ...]
    class_names: tuple[str, ...]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def check(self) -> None:
        """Raise the first error as a UserError, if there is one."""
        if self.errors:
            more = len(self.errors) - 1
            raise UserError(
                self.errors[0] + (f" (and {more} more: structvit show --data lists them)" if more else "")
            )

    def lines(self) -> list[str]:
        """Return the survey in a few lines."""
        named = " + ".join(f"{split.examples:,} {split.name}" for split in self.splits)
        classes = f", {len(self.class_names):,} classes"
        if counted := self.splits[0].classes:
            classes += f" of {Spread.of(list(counted.values()))}"
        ignored = sum((collections.Counter(one.scan.ignored) for one in self.splits), collections.Counter())
        more = f"; ignored: {counts(ignored)}" if ignored else ""
        first = f"data: {named} {self.unit}{classes}{self._size()}{more}"
        lines = [first, *self.notes, *(f"warning: {line}" for line in self.warnings)]
        return [printable(line) for line in lines]

    def _size(self) -> str:
        """Return sizes and lengths of training examples as text, with the number sampled."""
        split = self.splits[0]
        if not split.sides:
            return ""
        width, height = split.sides
        same = width.least == width.most and height.least == height.most
        size = f"{width.middle}x{height.middle}" if same else f"{width} x {height} pixels"
        length = f", {split.lengths} frames" if self.unit == "videos" else ""
        sampled = "" if len(split.measured) == split.examples else f" in {len(split.measured):,} sampled"
        return f"; {size}{length}{sampled}"

    def table(self) -> str:
        """Return the whole survey as a table of text, with all notes, warnings and errors."""
        splits = self.splits
        rows = [[self.unit, *(split.name for split in splits)]]
        rows += [["examples", *(f"{split.examples:,}" for split in splits)], *self._class_rows()]
        rows += [["width, pixels", *(str(split.sides[0]) if split.sides else "" for split in splits)]]
        rows += [["height, pixels", *(str(split.sides[1]) if split.sides else "" for split in splits)]]
        if self.unit == "videos":
            rows += [["length, frames", *(str(split.lengths or "") for split in splits)]]
        rows += [["decoded", *(f"{len(split.measured):,} of {split.examples:,}" for split in splits)]]
        rows += [["of them unreadable", *(f"{len(split.unreadable):,}" for split in splits)]]
        rows += [["ignored files", *(counts(split.scan.ignored) or "none" for split in splits)]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [*self.notes, *(f"warning: {line}" for line in self.warnings)]
        lines += [f"error: {line}" for line in self.errors]
        return "\n".join(map(printable, lines))

    def _class_rows(self) -> Iterator[list[str]]:
        """Yield examples by class: the largest classes of the training split, those without examples last."""
        known = [{**split.unknown, **(split.classes or {})} for split in self.splits]
        if not any(known):
            yield ["classes", *[f"{len(self.class_names):,}"] * len(known)]
            return
        yield ["classes", *(f"{len(one):,}" for one in known)]
        names = sorted({*self.class_names}.union(*known), key=lambda name: (-known[0].get(name, 0), name))
        shown = names if len(names) <= _ROWS else [*names[: _ROWS - 3], *names[-3:]]
        for name in shown:
            if len(shown) < len(names) and name == names[-3]:
                yield [f"  ... and {len(names) - len(shown):,} more", *[""] * len(known)]
            short = name if len(name) <= 40 else f"{name[:37]}..."
            yield [f"  {short}", *(f"{one.get(name, 0):,}" for one in known)]


def survey(
    sources: Mapping[str, Source],
    *,
    video: bool,
    measured: Mapping[str, Mapping[int, Measured]] | None = None,
    frames: int = 0,
) -> Survey:
    """Survey the splits of a data set.

    Args:
      sources: the splits by name, the first the one to train on.
      video: whether examples are videos rather than images.
      measured: all examples by split, if they are decoded already; None decodes a sample for `SECONDS`.
      frames: length of a clip that the model takes; shorter videos are a warning. 0 takes any.
    """
    limit = None
    if measured is None:
        seconds = SECONDS / (len(sources) + 1)
        measured = {name: measure_some(source, seconds=seconds) for name, source in sources.items()}
        limit = time.monotonic() + seconds
    splits = tuple(_split(name, source, measured[name]) for name, source in sources.items())
    train, *others = sources.values()
    warnings = [*_warnings(splits, (train, *others), frames)]
    for split, other in zip(splits[1:], others, strict=True):
        warnings += _duplicates(splits[0].name, train, split.name, other, limit)
    return Survey(
        unit="videos" if video else "images",
        splits=splits,
        class_names=tuple(train.class_names),
        errors=tuple(_errors(splits, (train, *others))),
        warnings=tuple(warnings),
        notes=tuple(split.scan.note for split in splits if split.scan.note),
    )


def _split(name: str, source: Source, measured: Mapping[int, Measured]) -> Split:
    labels, classes = getattr(source, "labels", None), None
    if labels is not None:
        tally = np.bincount(labels[labels >= 0], minlength=len(source.class_names)).tolist()
        classes = {name: count for name, count in zip(source.class_names, tally, strict=True) if count}
    unknown, scan = (source.unknown_labels(), source.scan) if isinstance(source, Index) else ({}, Scan())
    return Split(name, len(source), classes, unknown, scan, measured)


def _errors(splits: Sequence[Split], sources: Sequence[Source]) -> Iterator[str]:
    first, train = splits[0], sources[0]
    labels_file = os.path.join(train.root, LABELS) if isinstance(train, Index) and train.root else ""
    for split, source in zip(splits, sources, strict=True):
        if split.unknown:
            near = difflib.get_close_matches(next(iter(split.unknown)), train.class_names, n=1)
            suggestion = f" Did you mean {near[0]!r}?" if near else ""
            if os.path.isfile(labels_file):
                yield (
                    f"{labels_file} lacks {_several(split.unknown)} of {split.name}: add the names, or remove"
                    f" the file to take the classes from {first.name}.{suggestion}"
                )
            else:
                yield (
                    f"{split.name} has {_several(split.unknown)}, which {first.name} lacks: add training"
                    f" examples, or remove them from {split.name}.{suggestion}"
                )
        if split.measured and len(split.unreadable) == len(split.measured):
            yield (
                f"none of {len(split.measured):,} examples of {split.name} can be read"
                f" ({_first_problem(split, source)})"
            )
    if first.classes is not None and len(first.classes) == 1:
        yield f"all examples of {first.name} have the class {next(iter(first.classes))!r}: add another class"


def _warnings(splits: Sequence[Split], sources: Sequence[Source], frames: int) -> Iterator[str]:
    first = splits[0]
    for split, source in zip(splits, sources, strict=True):
        for name, ignored in list(split.scan.empty.items())[:5]:
            what = f"only {counts(ignored)}, ignored" if ignored else "nothing in it"
            yield f"the class folder {name!r} of {split.name} has no examples: {what}"
        if (more := len(split.scan.empty) - 5) > 0:
            yield f"... and {more} more class folders of {split.name}"
        if split.unreadable:
            yield (
                f"{len(split.unreadable):,} of {len(split.measured):,} decoded examples of {split.name}"
                f" cannot be read ({_first_problem(split, source)})"
            )
    if first.classes is None:
        return
    for split in splits[1:]:
        if split.classes is not None and (missing := [c for c in first.classes if c not in split.classes]):
            yield f"{split.name} has no example of {_several(missing)}: untested"
    if missing := [name for name in sources[0].class_names if name not in first.classes]:
        yield f"{first.name} has no example of {_several(missing)}: it cannot be learned"
    least, most = min(first.classes.values()), max(first.classes.values())
    if most >= _IMBALANCE * least:
        yield f"the largest class of {first.name} has {most:,} examples, the smallest {least:,}"
    short = [one for one in first.measured.values() if not one.problem and one.frames < frames]
    if short:
        yield (
            f"{len(short):,} of {len(first.measured):,} decoded videos are shorter than the {frames} frames"
            " of a clip; their frames are repeated"
        )


def _duplicates(
    train_name: str, train: Source, test_name: str, test: Source, limit: float | None
) -> Iterator[str]:
    """Warn of test examples with the same bytes as training examples."""
    found = find_duplicates(train, test, limit)
    if found.pairs:
        other, number = next(iter(found.pairs.items()))
        compared = f" ({found.train:,} of {len(train):,} training examples compared)"
        yield (
            f"{len(found.pairs):,} of {found.test:,} examples of {test_name} have the same bytes as examples"
            f" of {train_name}{compared if found.train < len(train) else ''}, as {test.id(other)} and"
            f" {train.id(number)}: their scores do not measure generalisation"
        )


def _first_problem(split: Split, source: Source) -> str:
    number, problem = next(iter(split.unreadable.items()))
    return f"{source.id(number)}: {problem}"


def _several(names: Mapping[str, int] | Sequence[str], most: int = 3) -> str:
    """Return class names as text: "the classes 'a', 'b', 'c' and 4 more"."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{'the classes' if len(names) > 1 else 'the class'} {shown}{more}"

"""One look at a data set before anything is trained: what is there, what is missing, what is wrong.

`survey` reads the splits and returns a `Survey`: errors make a run pointless, warnings do not. `prepare
--check` decodes every example for it; `--mode=data` and the start of a training sample for a few seconds.
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
from structvit_jax.data.index import LABELS, Found, Index
from structvit_jax.data.measure import Measured, Spread, duplicates, measure_some, spread
from structvit_jax.data.types import Source
from structvit_jax.utils.errors import UserError, printable

SECONDS = 2.0  # that a look takes where it samples
_ROWS = 15  # classes that a table lists
_IMBALANCE = 20  # times that the largest class may outnumber the smallest, before it is a warning


@dataclasses.dataclass(frozen=True)
class Split:
    """What a split holds.

    Attributes:
      name: of the split.
      examples: how many there are.
      classes: examples by class name, empty ones left out; None where labels are not known without reading.
      unknown: examples by label, of labels that are none of the classes.
      found: what else was found.
      measured: by example, as far as they were looked at.
    """

    name: str
    examples: int
    classes: Mapping[str, int] | None
    unknown: Mapping[str, int]
    found: Found
    measured: Mapping[int, Measured]

    @property
    def unreadable(self) -> dict[int, str]:
        return {number: one.problem for number, one in self.measured.items() if one.problem}

    @property
    def sides(self) -> tuple[Spread, Spread] | None:
        """Widths and heights in pixels."""
        read = [one for one in self.measured.values() if not one.problem]
        return (spread([one.width for one in read]), spread([one.height for one in read])) if read else None

    @property
    def lengths(self) -> Spread | None:
        """Numbers of frames."""
        read = [one.frames for one in self.measured.values() if not one.problem]
        return spread(read) if read else None


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a look at a data set found; `errors` make a run pointless, one line each with the way out."""

    unit: str  # "images" or "videos"
    splits: tuple[Split, ...]
    class_names: tuple[str, ...]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def check(self) -> None:
        """Raise UserError for the first error."""
        if self.errors:
            more = len(self.errors) - 1
            raise UserError(self.errors[0] + (f" (and {more} more: --mode=data lists them)" if more else ""))

    def lines(self) -> list[str]:
        """Return the survey in a few lines."""
        named = " + ".join(f"{split.examples:,} {split.name}" for split in self.splits)
        classes = f", {len(self.class_names):,} classes"
        if counted := self.splits[0].classes:
            classes += f" of {spread(list(counted.values()))}"
        size = f"; {_size(self.splits[0], self.unit)}" if self.splits[0].sides else ""
        ignored = sum(
            (collections.Counter(split.found.ignored) for split in self.splits), collections.Counter()
        )
        more = f"; ignored: {counts(ignored)}" if ignored else ""
        first = f"data: {named} {self.unit}{classes}{size}{more}"
        lines = [first, *self.notes, *(f"warning: {line}" for line in self.warnings)]
        return [printable(line) for line in lines]

    def table(self) -> str:
        """Return the whole survey as a table of text, with all notes, warnings and errors."""
        rows = [(self.unit, [split.name for split in self.splits])]
        rows += [("examples", [f"{split.examples:,}" for split in self.splits])]
        rows += list(self._class_rows())
        for title, values in (
            ("width, pixels", [str(split.sides[0]) if split.sides else "" for split in self.splits]),
            ("height, pixels", [str(split.sides[1]) if split.sides else "" for split in self.splits]),
            ("length, frames", [str(split.lengths or "") for split in self.splits]),
            ("looked at", [f"{len(split.measured):,} of {split.examples:,}" for split in self.splits]),
            ("of them unreadable", [f"{len(s.unreadable):,}" for s in self.splits]),
            ("ignored files", [counts(split.found.ignored) or "none" for split in self.splits]),
        ):
            if title != "length, frames" or self.unit == "videos":
                rows.append((title, values))
        wide = [max(len(row[0]) for row in rows)]
        wide += [max(len(row[1][column]) for row in rows) for column in range(len(self.splits))]
        lines = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip([a, *b], wide, strict=True)).rstrip() for a, b in rows
        ]
        lines += [*self.notes, *(f"warning: {line}" for line in self.warnings)]
        lines += [f"error: {line}" for line in self.errors]
        return "\n".join(map(printable, lines))

    def _class_rows(self) -> Iterator[tuple[str, list[str]]]:
        """Examples by class: the largest classes of the training split, those without examples last."""
        known = [{**split.unknown, **(split.classes or {})} for split in self.splits]
        if not any(known):
            yield "classes", [f"{len(self.class_names):,}"] * len(self.splits)
            return
        yield "classes", [f"{len(one):,}" for one in known]
        names = sorted({*self.class_names}.union(*known), key=lambda name: (-known[0].get(name, 0), name))
        shown = names if len(names) <= _ROWS else [*names[: _ROWS - 3], *names[-3:]]
        for name in shown:
            if len(shown) < len(names) and name == names[-3]:
                yield f"  ... and {len(names) - len(shown):,} more", [""] * len(self.splits)
            short = name if len(name) <= 40 else f"{name[:37]}..."
            yield f"  {short}", [f"{one.get(name, 0):,}" for one in known]


def survey(
    splits: Mapping[str, Source],
    *,
    video: bool,
    measured: Mapping[str, Mapping[int, Measured]] | None = None,
    frames: int = 0,
    seconds: float | None = SECONDS,
) -> Survey:
    """Look at the splits of a data set; the first of them is the one to train on.

    Args:
      splits: by name.
      video: whether examples are videos, or else images.
      measured: of all examples, by split, where they were decoded before; None samples.
      frames: of a clip that the model takes; shorter videos are a warning. 0 takes any.
      seconds: what a sampled look may take, None as long as it needs.
    """
    if measured is None:
        share = None if seconds is None else seconds / (len(splits) + 1)
        measured = {name: measure_some(source, seconds=share) for name, source in splits.items()}
        limit = None if share is None else time.monotonic() + share
    else:
        limit = None
    looked = tuple(_split(name, source, measured[name]) for name, source in splits.items())
    sources = tuple(splits.values())
    class_names = tuple(sources[0].class_names)
    warnings = [*_warnings(looked, sources, frames)]
    for name, other in list(splits.items())[1:]:
        warnings += duplicates(looked[0].name, sources[0], name, other, limit)
    notes = tuple(split.found.note for split in looked if split.found.note)
    unit = "videos" if video else "images"
    return Survey(unit, looked, class_names, tuple(_errors(looked, sources)), tuple(warnings), notes)


def _split(name: str, source: Source, measured: Mapping[int, Measured]) -> Split:
    labels = getattr(source, "labels", None)
    classes = None
    if labels is not None:
        tally = np.bincount(np.asarray(labels)[np.asarray(labels) >= 0], minlength=len(source.class_names))
        classes = {source.class_names[i]: int(count) for i, count in enumerate(tally) if count}
    unknown = source.unknown_labels() if isinstance(source, Index) else {}
    found = source.found if isinstance(source, Index) else Found()
    return Split(name, len(source), classes, unknown, found, measured)


def _errors(splits: Sequence[Split], sources: Sequence[Source]) -> Iterator[str]:
    first, train = splits[0], sources[0]
    root = getattr(train, "root", "")
    for split, source in zip(splits, sources, strict=True):
        near = _near(next(iter(split.unknown)), train.class_names) if split.unknown else ""
        if split.unknown and root and os.path.isfile(os.path.join(root, LABELS)):
            yield (
                f"{os.path.join(root, LABELS)} lacks {_several(split.unknown)} of {split.name}: add the"
                f" names, or remove the file to take the classes from {first.name}.{near}"
            )
        elif split.unknown:
            yield (
                f"{split.name} has {_several(split.unknown)}, which {first.name} lacks: add training"
                f" examples, or remove them from {split.name}.{near}"
            )
        if split.measured and len(split.unreadable) == len(split.measured):
            number, problem = next(iter(split.unreadable.items()))
            first_problem = f"{source.id(number)}: {problem}"
            yield f"none of {len(split.measured):,} examples of {split.name} can be read ({first_problem})"
    if first.classes is not None and len(first.classes) == 1:
        only = next(iter(first.classes))
        yield f"all examples of {first.name} have the class {only!r}: add examples of another"


def _warnings(splits: Sequence[Split], sources: Sequence[Source], frames: int) -> Iterator[str]:
    first = splits[0]
    for split, source in zip(splits, sources, strict=True):
        for name, ignored in list(split.found.empty.items())[:5]:
            what = f"only {counts(ignored)}, ignored" if ignored else "nothing in it"
            yield f"the class folder {name!r} of {split.name} has no examples: {what}"
        if (more := len(split.found.empty) - 5) > 0:
            yield f"... and {more} more class folders of {split.name}"
        if split.unreadable:
            number, problem = next(iter(split.unreadable.items()))
            of = f"{len(split.unreadable):,} of {len(split.measured):,} examples looked at"
            yield f"{of} in {split.name} cannot be read ({source.id(number)}: {problem})"
    if first.classes is None:
        return
    for split in splits[1:]:
        if split.classes is not None and (lacking := _without(first.classes, split.classes)):
            yield f"{split.name} has no example of {_several(lacking)}: untested"
    names = dict.fromkeys(sources[0].class_names, 0)
    if lacking := _without(names, first.classes):
        yield f"{first.name} has no example of {_several(lacking)}: it cannot be learned"
    least, most = min(first.classes.values()), max(first.classes.values())
    if most >= _IMBALANCE * least:
        yield f"the largest class of {first.name} has {most:,} examples, the smallest {least:,}"
    short = [one for one in first.measured.values() if not one.problem and one.frames < frames]
    if short:
        of = f"{len(short):,} of {len(first.measured):,} videos looked at"
        yield f"{of} are shorter than the {frames} frames of a clip; their frames are repeated"


def _near(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _without(wanted: Mapping[str, int], there: Mapping[str, int]) -> list[str]:
    return [name for name in wanted if name not in there]


def _size(split: Split, unit: str) -> str:
    """Sizes and lengths in words, with how many were sampled."""
    assert split.sides
    width, height = split.sides
    same = width.least == width.most and height.least == height.most
    size = f"{width.middle}x{height.middle}" if same else f"{width} x {height} pixels"
    length = f", {split.lengths} frames" if unit == "videos" else ""
    sampled = "" if len(split.measured) == split.examples else f" in {len(split.measured):,} sampled"
    return f"{size}{length}{sampled}"


def _several(names: Mapping[str, int] | Sequence[str], most: int = 3) -> str:
    """Class names in words."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{'the classes' if len(names) > 1 else 'the class'} {shown}{more}"

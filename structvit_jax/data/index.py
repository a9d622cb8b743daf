"""The examples of a split, in an order that is the same for class folders, lists and shards.

A list (ROOT/train.csv, .jsonl or .txt) has the columns `path` and `label` and, for parts of files, `start`
and `end` in seconds. The lines "path label" of SlowFast's lists are read too. Paths are absolute, or relative
to ROOT. ROOT/labels.txt, with one name per line, sets the classes and their order; without it, they are
the sorted labels of the training split. `structvit_jax.data.folder` finds the splits of a data set.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import difflib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from structvit_jax.data.limits import Limits
from structvit_jax.data.media import frame_names, open_media, without_extension
from structvit_jax.data.types import Media
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, decoding, parse_json, printable

LABELS = "labels.txt"
LISTS = (".jsonl", ".csv", ".txt")


class Entry(NamedTuple):
    """One example: a row of a list, or a file in a class folder."""

    path: str  # absolute, or relative to the root
    label: str
    start: float | None = None  # seconds
    end: float | None = None

    @property
    def id(self) -> str:
        """Name of the example in reports and predictions."""
        name = printable(self.path)
        if not self.is_part:
            return name
        return f"{name}#{self.start or 0:g}-" + ("" if self.end is None else f"{self.end:g}")

    @property
    def is_part(self) -> bool:
        """Whether the example is a part of a file."""
        return self.start is not None or self.end is not None


def sort_key(entry: Entry) -> tuple[str, float, float, str]:
    """Return the key that sorts examples by path without extension, then by time."""
    return without_extension(entry.path), entry.start or 0.0, entry.end or math.inf, entry.path


class Index:
    """The examples of one split, sorted. They are in compact arrays, because every worker holds a copy.

    Sorting by path without extension gives the same order for class folders, lists and shards, whatever the
    encoding of the files.

    Attributes:
      root: the folder to which paths are relative.
      class_names: the classes; labels are positions in it.
      labels: int32 [examples]; -1 if the label of an example is not a class.
      limits: largest allowed sizes and frame counts of files.
      notes: lines about the split to print in a survey.
    """

    def __init__(
        self,
        root: str,
        entries: Iterable[Entry],
        class_names: Sequence[str],
        *,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        notes: Sequence[str] = (),
    ):
        self.root, self.class_names = root, tuple(class_names)
        self.limits, self.notes = limits, tuple(notes)
        rows = sorted(entries, key=sort_key)
        label_of = {name: i for i, name in enumerate(class_names)}
        self.labels = np.array([label_of.get(row.label, -1) for row in rows], np.int32)
        self._paths = np.array([os.fsencode(row.path) for row in rows])
        times = [[math.nan if time is None else time for time in (row.start, row.end)] for row in rows]
        self._times = np.array(times, np.float64)
        self._unknown = {i: row.label for i, row in enumerate(rows) if row.label not in label_of}

    def __len__(self) -> int:
        return len(self.labels)

    def entry(self, index: int) -> Entry:
        label = self.labels[index]
        name = self.class_names[label] if label >= 0 else self._unknown[index]
        start, end = self._part(index)
        return Entry(os.fsdecode(self._paths[index]), name, start, end)

    def _part(self, index: int) -> tuple[float | None, float | None]:
        """Return the start and the end of an example in seconds; None if it has none."""
        start, end = self._times[index].tolist()
        return None if math.isnan(start) else start, None if math.isnan(end) else end

    def id(self, index: int) -> str:
        return self.entry(index).id

    def ids(self) -> list[str]:
        """Return the ids of all examples. If all are whole files, this is much faster than calling `id`."""
        if not np.isnan(self._times).all():
            return [self.id(number) for number in range(len(self))]
        names = map(os.fsdecode, self._paths.tolist())
        return [name if name.isprintable() else printable(name) for name in names]

    def unknown_labels(self) -> dict[str, int]:
        """Return the labels that are not a class, and the number of examples of each."""
        return dict(collections.Counter(self._unknown.values()))

    def path(self, index: int) -> str:
        """Return the file of an example, or its folder of frames."""
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def files(self, index: int) -> list[str]:
        """Return the images in the folder of an example, or its file.

        For a part of a file, this is the whole file.

        Raises:
          DecodeError: its folder of frames cannot be read.
        """
        path = self.path(index)
        with decoding():
            if not os.path.isdir(path):
                return [path]
            return [os.path.join(path, name) for name in frame_names(os.listdir(path))]

    def stored(self, index: int) -> tuple[str, Sequence[str | bytes] | None]:
        """Return the label of an example, and its files; the files are None for a part of a file."""
        entry = self.entry(index)
        return entry.label, None if entry.is_part else self.files(index)

    def open(self, index: int) -> tuple[Media, int]:
        """Return the frames and the label of an example.

        Raises:
          DecodeError: the frames cannot be read, or the label is not a class.
        """
        if self.labels[index] < 0:
            label = self._unknown[index]
            raise DecodeError(f"unknown label {label!r}.{suggest_label(label, self.class_names)}")
        return self.media(index), int(self.labels[index])

    def media(self, index: int) -> Media:
        """Return the frames of an example, whatever its label.

        Raises:
          DecodeError: they cannot be read.
        """
        return open_media(self.path(index), *self._part(index), self.limits)


def suggest_label(label: str, class_names: Sequence[str]) -> str:
    """Return " Did you mean 'NAME'?" with the most similar class, or "" if none is similar."""
    near = difflib.get_close_matches(label, class_names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def read_labels(root: str) -> tuple[str, ...]:
    """Return the names in ROOT/labels.txt, or () if there is no such file.

    Raises:
      UserError: the file cannot be read as text, or has a name twice.
    """
    path = os.path.join(root, LABELS)
    if not os.path.isfile(path):
        return ()
    with _open_text(path) as file:
        names = tuple(line.strip() for line in file if line.strip())
    if len(set(names)) < len(names):
        twice = next(name for name, count in collections.Counter(names).items() if count > 1)
        raise UserError(f"{path} has the name {twice!r} more than once; remove one of the lines")
    return names


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[TextIO]:
    """Open a text file in UTF-8, with or without a byte order mark; turn read errors into UserError."""
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or device may never end
        raise UserError(f"{path} is not a regular file; lists and label files must be regular files")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as text: {error}; save it as UTF-8") from error


def class_names_of(root: str, train: Iterable[Entry]) -> tuple[str, ...]:
    """Return the classes in order: those of ROOT/labels.txt, or the sorted labels of the training split.

    If all labels are plain numbers, and at least half of the numbers from 0 to the largest occur, the classes
    are all numbers from 0 to the largest, as in SlowFast's lists.
    """
    if names := read_labels(root):
        return names
    labels = {entry.label for entry in train}
    if all(len(label) < 10 and label.isdecimal() and str(int(label)) == label for label in labels):
        count = max(map(int, labels)) + 1
        return tuple(map(str, range(count))) if count <= 2 * len(labels) else tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def read_list(path: str) -> Iterator[Entry]:
    """Yield the examples of a list: JSON objects (.jsonl), or CSV with or without a header.

    Raises:
      UserError: the file cannot be read, or a line cannot be understood.
    """
    with _open_text(path) as file:
        for number, row in _json_rows(file) if path.endswith(".jsonl") else _csv_rows(file):
            yield _parse_row(row, f"{path}:{number}")


def _parse_row(row: Any, where: str) -> Entry:
    try:
        path, label = row["path"], row["label"]
        start, end = (None if row.get(key) in (None, "") else float(row[key]) for key in ("start", "end"))
        if not all(time is None or math.isfinite(time) for time in (start, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        needs = "a line needs path and label, and may have start and end in seconds"
        raise UserError(f"{where}: {needs}") from error
    if path in (None, "") or label in (None, ""):
        raise UserError(f"{where}: a path or label is empty")
    if "\0" in f"{path}{label}":
        raise UserError(f"{where}: a path or label contains a zero byte")
    try:
        os.fsencode(f"{path}{label}")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a path or label contains half of a surrogate pair") from error
    return Entry(str(path), str(label), start, end)


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield line numbers and values; None for a line that is not JSON."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            yield number, row


def _csv_rows(file: TextIO) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield line numbers and cells by column; None for a row with too few or too many cells.

    A first row that has the cell "label" is the header; without a header, the columns are path, label, start
    and end.
    """
    header: list[str] = []
    for number, row in enumerate(csv.reader(file), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if not header:
            names = [cell.lower() for cell in cells]
            header = names if "label" in names else ["path", "label", "start", "end"]
            if "path" not in header:
                raise UserError(f"{file.name}: the columns are {', '.join(cells)}; one of them must be path")
            if header is names:
                continue
        if len(cells) == 1:  # SlowFast's lists: "path label"
            cells = cells[0].rsplit(None, 1)
        fits = 2 <= len(cells) <= len(header)
        yield number, dict(zip(header, cells, strict=False)) if fits else None

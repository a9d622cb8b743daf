"""Which examples a split has: class folders or lists, in one order whatever they come from.

A data set on disk is a folder ROOT with, for each split, either class folders (ROOT/train/CLASS/FILE, or
CLASS/FOLDER_OF_FRAMES) or a list (ROOT/train.csv, ROOT/train.jsonl) of `path`, `label` and, if an example is
part of a file, `start` and `end` in seconds. Paths are relative to the list. ROOT/labels.txt, one name per
line, fixes the classes and their order; without it they are the sorted labels of the training split.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.data.media import IMAGES, VIDEOS, Media, frame_names, open_media, without_extension
from structvit_jax.errors import DecodeError, UserError, did_you_mean

LABELS = "labels.txt"
_LISTS = (".jsonl", ".csv", ".txt")
_NUMBERED = 100_000  # labels that are numbers below this are class numbers, others names


class Entry(NamedTuple):
    """A line of a list."""

    path: str  # relative to the list, or absolute
    label: str
    start: float | None = None
    end: float | None = None

    @property
    def id(self) -> str:
        """What reports and predictions call the example."""
        if self.start is None and self.end is None:
            return self.path
        return f"{self.path}#{self.start or 0:g}-" + ("" if self.end is None else f"{self.end:g}")


class Index:
    """The examples of one split, sorted; compact, since every worker holds a copy.

    Sorting goes by the path without its extension, so that the same clips come in the same order from
    class folders, lists and shards, however they are encoded.
    """

    def __init__(self, root: str, entries: Iterable[Entry], class_names: Sequence[str]):
        self.root, self.class_names = root, tuple(class_names)
        rows = sorted(entries, key=order)
        number = {name: i for i, name in enumerate(class_names)}
        self._paths = np.array([os.fsencode(row.path) for row in rows])
        self._times = np.array([(_nan(row.start), _nan(row.end)) for row in rows], np.float64)
        self._labels = np.array([number.get(row.label, -1) for row in rows], np.int32)
        self._unknown = {i: row.label for i, row in enumerate(rows) if row.label not in number}

    def __len__(self) -> int:
        return len(self._labels)

    def entry(self, index: int) -> Entry:
        label = self._labels[index]
        name = self.class_names[label] if label >= 0 else self._unknown[index]
        start, end = (None if math.isnan(time) else float(time) for time in self._times[index])
        return Entry(os.fsdecode(self._paths[index]), name, start, end)

    def id(self, index: int) -> str:
        return self.entry(index).id

    def open(self, index: int) -> tuple[Media, int]:
        """An example's frames and label.

        Raises:
          DecodeError: they cannot be read, or the label is none of the classes.
        """
        entry = self.entry(index)
        if self._labels[index] < 0:
            raise DecodeError(f"unknown label {entry.label!r}.{did_you_mean(entry.label, self.class_names)}")
        media = open_media(os.path.join(self.root, entry.path), entry.start, entry.end)
        return media, int(self._labels[index])


def order(entry: Entry) -> tuple[Any, ...]:
    """The key that examples are sorted by."""
    return without_extension(entry.path), entry.start or 0.0, entry.end or math.inf, entry.path


def _nan(time: float | None) -> float:
    return math.nan if time is None else time


def read_splits(root: str, train: str, test: str, *, video: bool) -> tuple[Index, Index]:
    """The two splits of a folder, with the same classes.

    Args:
      root: the folder.
      train, test: names of the splits: of a list, with or without its ending, or of a folder.
      video: whether files are videos (or folders of frames), or else images.

    Raises:
      UserError: something is missing, empty or cannot be understood; names it.
    """
    if not root:
        raise UserError("say where the data are: --config.data.root=DIR, with DIR/train and DIR/val")
    if not os.path.isdir(root):
        raise UserError(f"no folder {root!r}")
    splits = {
        key: list(read_split(root, name, key, video)) for key, name in (("train", train), ("test", test))
    }
    class_names = read_labels(root) or _classes_of(splits["train"])
    for key, entries in splits.items():
        known = sum(entry.label in class_names for entry in entries)
        if not known:
            name = {"train": train, "test": test}[key]
            labels = sorted({entry.label for entry in entries})[:3]
            raise UserError(
                f"{root}/{name}: none of its labels ({', '.join(labels)}, ...) is among the"
                f" {len(class_names)} classes of {LABELS if read_labels(root) else train}"
            )
    return Index(root, splits["train"], class_names), Index(root, splits["test"], class_names)


def read_split(root: str, name: str, key: str, video: bool) -> Iterator[Entry]:
    """The examples of a list or of class folders, unsorted; at least one."""
    found = [n for n in (name, *(name + end for end in _LISTS)) if os.path.exists(os.path.join(root, n))]
    if not found:
        there = ", ".join(sorted(n for n in os.listdir(root) if not n.startswith("."))[:8]) or "nothing"
        raise UserError(
            f"{root} has neither a folder {name!r} nor a list {name}.csv or {name}.jsonl (there is: {there});"
            f" name it with --config.data.{key}_split"
        )
    if len(found) > 1:
        raise UserError(f"{root} has {' and '.join(found)}; choose one with --config.data.{key}_split=NAME")
    path = os.path.join(root, found[0])
    entries = _walk(root, found[0], video) if os.path.isdir(path) else read_list(path)
    empty = True
    for entry in entries:
        empty = False
        yield entry
    if empty:
        kind = "videos" if video else "images"
        raise UserError(f"{path} is empty: there are no {kind} in it (config.data.frames: 0 means images)")


def read_labels(root: str) -> tuple[str, ...]:
    """The names in ROOT/labels.txt; none if there is no such file."""
    path = os.path.join(root, LABELS)
    if not os.path.isfile(path):
        return ()
    with open(path, encoding="utf-8") as file:
        names = tuple(line.strip() for line in file if line.strip())
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has the name {twice!r} more than once")
    return names


def _classes_of(entries: Sequence[Entry]) -> tuple[str, ...]:
    labels = {entry.label for entry in entries}
    if all(label.isdecimal() and int(label) < _NUMBERED for label in labels):  # as in SlowFast's lists
        return tuple(str(number) for number in range(max(map(int, labels)) + 1))
    return tuple(sorted(labels))


def _walk(root: str, split: str, video: bool) -> Iterator[Entry]:
    """root/split/CLASS/**/FILE; for videos, a folder that holds images is one example."""
    top = os.path.join(root, split)
    for label in sorted(os.listdir(top)):
        if label.startswith("."):
            continue
        if not os.path.isdir(os.path.join(top, label)):
            if label.lower().endswith(VIDEOS if video else IMAGES):
                raise UserError(
                    f"{top}/{label} lies beside the class folders; move it into that of its class"
                )
            continue
        for folder, folders, files in os.walk(os.path.join(top, label), followlinks=True):
            here = os.path.relpath(folder, root).replace(os.sep, "/")
            if video and folder != os.path.join(top, label) and frame_names(files):
                folders.clear()
                yield Entry(here, label)
                continue
            for name in files:
                if name.lower().endswith(VIDEOS if video else IMAGES) and not name.startswith("."):
                    yield Entry(f"{here}/{name}", label)


def read_list(path: str) -> Iterator[Entry]:
    """The lines of a list: JSON objects (.jsonl), or CSV with a header, or "path label" without one.

    Raises:
      UserError: a line that cannot be understood; names it.
    """
    with open(path, encoding="utf-8", newline="") as file:
        for number, row in _json_rows(file) if path.endswith(".jsonl") else _csv_rows(file):
            try:
                times = (
                    float(row[key]) if row.get(key) not in (None, "") else None for key in ("start", "end")
                )
                entry = Entry(str(row["path"]), str(row["label"]), *times)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}:{number}: a line needs path and label, and may have start and end in seconds"
                ) from error
            if not entry.path or not entry.label:
                raise UserError(f"{path}:{number}: a path or label is empty")
            yield entry


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _csv_rows(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    rows = csv.reader(file)
    header: list[str] | None = None
    for number, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if header is None:
            named = {"path", "label"} <= set(cells)
            header = cells if named else ["path", "label", "start", "end"]
            if named:
                continue
        if len(cells) == 1:  # SlowFast's lists: "path label"
            cells = cells[0].rsplit(None, 1)
        yield number, dict(zip(header, cells, strict=False)) if len(cells) >= 2 else None


def write_list(path: str, entries: Iterable[Entry]) -> int:
    """Writes a JSON-lines list whole or not at all; returns how many lines it has."""
    rows = [{key: value for key, value in entry._asdict().items() if value is not None} for entry in entries]
    partial = path + ".tmp"
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)
    return len(rows)

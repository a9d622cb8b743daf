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
from structvit_jax.errors import DecodeError, UserError, did_you_mean, printable

LABELS = "labels.txt"
LISTS = (".jsonl", ".csv", ".txt")


class Entry(NamedTuple):
    """A line of a list."""

    path: str  # relative to the list, or absolute
    label: str
    start: float | None = None
    end: float | None = None

    @property
    def id(self) -> str:
        """What reports and predictions call the example."""
        name = printable(self.path)
        if self.start is None and self.end is None:
            return name
        return f"{name}#{self.start or 0:g}-" + ("" if self.end is None else f"{self.end:g}")


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
    class_names = class_names_of(root, splits["train"])
    known = set(class_names)
    for key, entries in splits.items():
        if not any(entry.label in known for entry in entries):
            name = {"train": train, "test": test}[key]
            labels = sorted({entry.label for entry in entries})[:3]
            raise UserError(
                f"{root}/{name}: none of its labels ({', '.join(labels)}, ...) is among the"
                f" {len(class_names)} classes of {LABELS if read_labels(root) else train}"
            )
    return Index(root, splits["train"], class_names), Index(root, splits["test"], class_names)


def read_split(root: str, name: str, key: str, video: bool) -> Iterator[Entry]:
    """The examples of a list or of class folders, unsorted; at least one.

    `key` is "train" or "test", for the advice where there is no split of this name.
    """
    found = [n for n in (name, *(name + end for end in LISTS)) if os.path.exists(os.path.join(root, n))]
    if not found:
        there = ", ".join(sorted(n for n in os.listdir(root) if not n.startswith("."))[:8]) or "nothing"
        raise UserError(
            f"{root} has neither a folder {name!r} nor a list {name}.csv or {name}.jsonl (there is: {there});"
            f" say which it is with {key}_split=NAME"
        )
    if len(found) > 1:
        raise UserError(f"{root} has {' and '.join(found)}; choose one with {key}_split=NAME")
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


def class_names_of(root: str, train: Iterable[Entry]) -> tuple[str, ...]:
    """The classes in their order: those of ROOT/labels.txt, or the sorted labels of the training split.

    Labels that are plain numbers without large gaps are numbers of classes, as in SlowFast's lists.
    """
    if names := read_labels(root):
        return names
    labels = {entry.label for entry in train}
    if all(label.isdecimal() and str(int(label)) == label for label in labels):
        count = max(map(int, labels)) + 1
        return tuple(map(str, range(count))) if count <= 2 * len(labels) else tuple(sorted(labels, key=int))
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
        for name in examples_below(os.path.join(top, label), video):
            if name != ".":  # a folder of a class is no clip
                yield Entry(f"{os.path.normpath(split)}/{label}/{name}", label)


def examples_below(top: str, video: bool) -> Iterator[str]:
    """What is in a folder, as paths from it: images, or videos and folders that hold the frames of one, which
    may be the folder itself, "."."""
    for folder, files in walk(top):
        here = os.path.relpath(folder, top).replace(os.sep, "/")
        wanted = [name for name in files if name.lower().endswith(VIDEOS if video else IMAGES)]
        if video and not wanted and frame_names(files):
            yield here
        yield from wanted if here == "." else (f"{here}/{name}" for name in wanted)


def walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `top` down, links followed once each, with its files; hidden ones left out.

    Raises:
      UserError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, sorted(name for name in files if not name.startswith("."))


def read_list(path: str) -> Iterator[Entry]:
    """The lines of a list: JSON objects (.jsonl), or CSV with a header, or "path label" without one.

    Raises:
      UserError: a line that cannot be understood; names it.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = _json_rows(file) if path.endswith(".jsonl") else _csv_rows(file)
        try:
            for number, row in rows:
                yield _entry(row, f"{path}:{number}")
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read as text: {error}; save it as UTF-8") from error


def _entry(row: Any, where: str) -> Entry:
    try:
        path, label = row["path"], row["label"]
        start, end = (None if row.get(key) in (None, "") else float(row[key]) for key in ("start", "end"))
    except (KeyError, TypeError, ValueError) as error:
        needs = "a line needs path and label, and may have start and end in seconds"
        raise UserError(f"{where}: {needs}") from error
    if path in (None, "") or label in (None, ""):
        raise UserError(f"{where}: a path or label is empty")
    return Entry(str(path), str(label), start, end)


def _json_rows(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _csv_rows(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Rows by column; None for one that has not as many cells as it should. A first row that names the
    columns is the header; without one they are path, label, start and end."""
    header: list[str] | None = None
    for number, row in enumerate(csv.reader(file), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if header is None:
            names = [cell.lower() for cell in cells]
            header = names if "label" in names else ["path", "label", "start", "end"]
            if "label" in names:
                if "path" not in names:
                    raise UserError(f"the list's columns are {', '.join(cells)}; one has to be path")
                continue
        if len(cells) == 1:  # SlowFast's lists: "path label"
            cells = cells[0].rsplit(None, 1)
        fits = 2 <= len(cells) <= len(header)
        yield number, dict(zip(header, cells, strict=False)) if fits else None


def write_list(path: str, entries: Iterable[Entry]) -> int:
    """Writes a JSON-lines list whole or not at all; returns how many lines it has."""
    rows = [{key: value for key, value in entry._asdict().items() if value is not None} for entry in entries]
    partial = path + ".tmp"
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(partial, path)
    return len(rows)

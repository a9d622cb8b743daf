"""Data sets on disk: find their splits, the examples of each, and whether these are images or videos.

A data set is a folder ROOT with, for each split, either class folders (ROOT/train/CLASS/FILE, or
CLASS/FOLDER_OF_FRAMES) or a list (see `structvit_jax.data.index`). If there is no test split, a part of
the training split can be held out for it. In that case ROOT may also hold the class folders themselves
(ROOT/CLASS/FILE), which together are the training split.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator

from structvit_jax.data.container import VIDEOS
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import (
    LABELS,
    LISTS,
    Entry,
    Index,
    class_names_of,
    read_list,
    sort_key,
)
from structvit_jax.data.limits import Limits
from structvit_jax.data.media import frame_names, without_extension
from structvit_jax.utils.errors import UserError

# Folders with these names are splits, not classes.
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the splits of a data set are.

    Attributes:
      root: the folder.
      train, test: name of a folder, or of a list with or without its extension. "train/" is the folder if a
        list has the same name; "." is the root itself.
      val_fraction: fraction of the training examples to hold out if there is no test split; with 0, a missing
        test split is an error.
      limits: largest allowed sizes and frame counts of files.
      option: how error messages write options: this prefix, then "train_split", "test_split" or
        "val_fraction".
    """

    root: str
    train: str = "train"
    test: str = "val"
    val_fraction: float = 0.0
    limits: Limits = Limits()  # noqa: RUF009 - immutable
    option: str = "--config.data."

    def splits(self) -> tuple[str, str | None]:
        """Return the folder or list of the training and of the test split.

        The test split is None if it is to be held out from the training split.

        Raises:
          UserError: a split is missing.
        """
        if not self.root:
            raise UserError("set the folder of the data: --config.data.root=DIR, with DIR/train and DIR/val")
        if not os.path.isdir(self.root):
            raise UserError(f"no folder {self.root!r}")
        for key, name in (("train", self.train), ("test", self.test)):
            if not name:
                raise UserError(f"{self.option}{key}_split is empty; name a folder or list (. is the root)")
        train, test = self.find("train", self.train), self.find("test", self.test)
        if train is None and test is None and self.val_fraction and self._class_folders():
            train = "."
        if train is None:
            raise self._missing("train", self.train)
        if test is None and not self.val_fraction:
            raise self._missing("test", self.test)
        return train, test

    def find(self, key: str, name: str) -> str | None:
        """Return the folder or list of a split, or None if there is none.

        Raises:
          UserError: there are several. The message names the option that chooses one, `key`_split, where
            `key` is "train" or "test".
        """
        found = [n for n in (name, *(name + end for end in LISTS)) if os.path.exists(self.join(n))]
        if len(found) > 1:
            names = [n.rstrip("/") + "/" if os.path.isdir(self.join(n)) else n for n in found]
            choices = " or ".join(f"{self.option}{key}_split={n}" for n in names)
            raise UserError(f"{self.root} has {' and '.join(names)}; choose one with {choices}")
        return found[0] if found else None

    def join(self, name: str) -> str:
        return os.path.join(self.root, name)

    def _class_folders(self) -> list[str]:
        """Return the class folders in the root; none if `train` is not "train", or a folder is a split."""
        folders = [name for name in _names(self.root) if os.path.isdir(self.join(name))]
        return [] if self.train != "train" or any(name.lower() in _SPLITS for name in folders) else folders

    def _missing(self, key: str, name: str) -> UserError:
        hold_out = ""
        if not self.val_fraction and (key == "test" or self._class_folders()):
            hold_out = f", or hold out training examples with {self.option}val_fraction=0.1"
        return UserError(
            f"{self.root} has neither a folder {name!r} nor a list {name}.csv, .jsonl or .txt (it has:"
            f" {_shorten(_names(self.root), 8)}); name the split with {self.option}{key}_split=NAME{hold_out}"
        )


def read_splits(layout: Layout, *, video: bool) -> tuple[Index, Index]:
    """Return the training and the test split of a folder, with the same classes.

    Args:
      layout: where the splits are.
      video: whether examples are videos (or folders of frames) rather than images.

    Raises:
      UserError: something is missing, empty or not understood.
    """
    train_name, test_name = layout.splits()
    train, train_notes = read_split(layout.root, train_name, video=video)
    class_names = class_names_of(layout.root, train)
    if test_name is None:
        train, test = hold_out(train, layout.val_fraction)
        if not test:
            raise UserError(
                f"{layout.join(train_name)}: no class has examples from two files, so none can be held out"
                f" for testing ({layout.option}val_fraction={layout.val_fraction:g})"
            )
        test_notes = [_held_out_note(layout, len(train), len(test))]
    else:
        test, test_notes = read_split(layout.root, test_name, video=video)
    train_index = Index(layout.root, train, class_names, limits=layout.limits, notes=train_notes)
    return train_index, Index(layout.root, test, class_names, limits=layout.limits, notes=test_notes)


def _held_out_note(layout: Layout, train: int, test: int) -> str:
    stems = [os.path.splitext(name)[0] for name in _names(layout.root)]
    others = [stem for stem in stems if stem.lower() in _SPLITS and stem != layout.train]
    more = f"; to use {others[0]} instead: {layout.option}test_split={others[0]}" if others else ""
    return (
        f"{layout.root} has no split {layout.test!r}: {test:,} of {train + test:,} training examples are held"
        f" out for it ({layout.option}val_fraction={layout.val_fraction:g}){more}"
    )


def read_split(root: str, name: str, *, video: bool) -> tuple[list[Entry], list[str]]:
    """Return the examples of a list or of class folders, unsorted, and notes on other files and folders.

    Raises:
      UserError: there are no examples of the requested kind, or the files are not understood.
    """
    path = os.path.normpath(os.path.join(root, name))
    ignored: collections.Counter[str] = collections.Counter()
    if os.path.isdir(path):
        entries, notes = _read_class_folders(path, os.path.normpath(name), video, ignored)
    else:
        entries, notes = list(read_list(path)), []
    if entries:
        return entries, notes
    kind, others = ("videos", "images") if video else ("images", "videos")
    if count := ignored[others]:
        model = "structvit_tiny_4_1" if video else "structvit_tiny_4_1_video"
        raise UserError(
            f"{path} has no {kind}, but {count:,} {others}: choose a model for {others}, such as"
            f" --config.model.name={model} --config.data.frames={0 if video else 8}; or use"
            " --config=folder with a new --workdir, which chooses the model"
        )
    raise UserError(f"{path} is empty: there are no {kind} in it{_describe(ignored)}")


def _read_class_folders(
    top: str, split: str, video: bool, ignored: collections.Counter[str]
) -> tuple[list[Entry], list[str]]:
    """Read top/CLASS/**/FILE; for videos, a folder that holds images is one example."""
    entries: list[Entry] = []
    empty = []
    for label in _names(top):
        folder = os.path.join(top, label)
        if not os.path.isdir(folder):
            if label.lower().endswith(VIDEOS if video else IMAGES):
                raise UserError(f"{folder} is beside the class folders; move it into the folder of its class")
            if label != LABELS:
                ignored[kind_of(label)] += 1
            continue
        names = list(examples_below(folder, video, ignored))
        if "." in names:  # a class folder is not a clip
            names.remove(".")
            ignored["images"] += len(frame_names(os.listdir(folder)))
        path = label if split == "." else f"{split}/{label}"
        entries += [Entry(f"{path}/{name}", label) for name in names]
        if not names:
            empty.append(label)
    notes = [f"{top} has class folders without examples: {_shorten(empty)}"] if empty else []
    if ignored:
        notes.append(f"{top}: {len(entries):,} examples{_describe(ignored)}")
    return entries, notes


def examples_below(top: str, video: bool, ignored: collections.Counter[str] | None = None) -> Iterator[str]:
    """Yield the examples in a folder as paths relative to it, and count other files in `ignored`.

    For images, every image is an example. For videos, every video file is an example, and so is every folder
    that holds images but no videos. If `top` itself is such a folder, its path is ".".
    """
    for folder, files in walk(top):
        here = os.path.relpath(folder, top).replace(os.sep, "/")
        examples = [name for name in files if name.lower().endswith(VIDEOS if video else IMAGES)]
        frames = frame_names(files) if video and not examples else []
        if ignored is not None:
            ignored.update(map(kind_of, set(files).difference(examples, frames)))
        if frames:
            yield here
        yield from examples if here == "." else (f"{here}/{name}" for name in examples)


def walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield `top` and every folder below it with the files in it, sorted and without hidden ones.

    Symbolic links are followed, but every folder is yielded only once.

    Raises:
      UserError: a folder cannot be read.
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


def hold_out(entries: Iterable[Entry], fraction: float) -> tuple[list[Entry], list[Entry]]:
    """Split examples in two, stratified by class, the same way on every machine.

    About round(n * fraction) of the n examples of a class are held out, but at least one. At least one file
    of a class always remains, so nothing is held out from a class with a single file. Files are taken in the
    order of the SHA-256 of their paths without extension. Parts of one file stay together, so a few more
    examples may be held out.

    Returns:
      The remaining examples and the held-out examples.
    """
    classes: dict[str, dict[bytes, list[Entry]]] = {}
    for entry in entries:
        key = os.fsencode(without_extension(entry.path))
        classes.setdefault(entry.label, {}).setdefault(hashlib.sha256(key).digest(), []).append(entry)
    left: list[Entry] = []
    held: list[Entry] = []
    for files in classes.values():
        wanted = max(round(fraction * sum(map(len, files.values()))), 1)
        *ranked, last = (files[key] for key in sorted(files))
        taken = 0
        for file in ranked:
            (held if taken < wanted else left).extend(file)
            taken += len(file)
        left += last
    return sorted(left, key=sort_key), sorted(held, key=sort_key)


def is_video(layout: Layout) -> bool:
    """Return whether at least half of the training examples of a folder are videos or folders of frames.

    Raises:
      UserError: there are neither images nor videos.
    """
    path = layout.join(layout.splits()[0])
    if os.path.isdir(path):
        found = _count_kinds(path)
    else:
        images = [entry.path.lower().endswith(IMAGES) for entry in read_list(path)]
        found = collections.Counter(images=sum(images), videos=len(images) - sum(images))
    if not found["images"] + found["videos"]:
        raise UserError(f"{path} is empty: there are no images or videos in it{_describe(found)}")
    return found["videos"] >= found["images"]


def _count_kinds(top: str) -> collections.Counter[str]:
    """Count files below class folders by kind; a folder of numbered frames counts as a video."""
    found: collections.Counter[str] = collections.Counter()
    class_folders = {os.path.join(top, label) for label in _names(top)}
    for folder, files in walk(top):
        if folder == top:
            continue
        kinds = collections.Counter(map(kind_of, files))
        if folder not in class_folders and not kinds["videos"] and _are_frames(frame_names(files)):
            kinds["videos"], kinds["images"] = 1, 0
        found += kinds
    return found


def _are_frames(names: list[str]) -> bool:
    """Return whether images are numbered like the frames of a video: from 0 or 1, in steps of one."""
    numbers = [int(number) for name in names for number in re.findall(r"([0-9]{1,9})[^0-9]*$", name)]
    count = len(names)
    return count > 1 and numbers in (list(range(count)), list(range(1, count + 1)))


def kind_of(name: str) -> str:
    """Return the kind of a file from its name: "images", "videos", its extension, or "no extension"."""
    name = name.lower()
    if name.endswith(IMAGES):
        return "images"
    return "videos" if name.endswith(VIDEOS) else os.path.splitext(name)[1] or "no extension"


def _describe(ignored: collections.Counter[str]) -> str:
    """Return counts by `kind_of` as text, the largest first: "; ignored: .tiff (12), no extension (3)"."""
    counts = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{kind} ({count:,})" for kind, count in counts if count]
    return f"; ignored: {_shorten(kinds, 6)}" if kinds else ""


def _names(folder: str) -> list[str]:
    """Return the names in a folder, sorted, without hidden files."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def _shorten(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "nothing"

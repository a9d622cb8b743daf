"""Makes lists to train from out of a data set's annotation files, and checks that every file can be decoded.

    python -m structvit_jax.data.prepare kinetics400 ANNOTATIONS VIDEOS --out DIR [--check]
    python -m structvit_jax.data.prepare folder DIR --check [--images]
    python -m structvit_jax.data.prepare list FILE [FILE ...] --check [--images]

The first, likewise something_v1, something_v2, diving48, finegym99, finegym288 and imagenet, writes
DIR/train.jsonl, DIR/val.jsonl and DIR/labels.txt, the names of annotated files that are not there into
DIR/missing-SPLIT.txt, and compares the counts with those published; DIR becomes the config.data.root.

--check decodes frames at the beginning, middle and end of every example in parallel, prints each that cannot
be read with its reason, also into bad_files.txt (in --out, or here), and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from structvit_jax.data.annotations import DATA_SETS, Prepared
from structvit_jax.data.index import (
    LABELS,
    LISTS,
    Entry,
    Index,
    class_names_of,
    read_list,
    read_split,
    write_list,
)
from structvit_jax.data.workers import Note, in_processes
from structvit_jax.errors import DecodeError, UserError, exit_in_one_line, known

_SOURCES = ("folder", "list", *DATA_SETS)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help=", ".join(_SOURCES))
    parser.add_argument("paths", nargs="+", help="the folders or lists")
    parser.add_argument("--out", default="", help="where lists, labels and reports go")
    parser.add_argument("--check", action="store_true", help="decode every file")
    parser.add_argument("--images", action="store_true", help="files are images (folder, list)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode")
    chosen = parser.parse_args(arguments)
    known("source", chosen.source, _SOURCES)
    if not (chosen.out or chosen.check):
        raise UserError("nothing to do: say --out=DIR for lists, --check to decode every file, or both")
    if chosen.workers < 1:
        raise UserError("--workers is how many processes decode; it needs to be at least 1")
    if chosen.source in DATA_SETS:
        indices = _from_annotations(chosen.source, chosen.paths, chosen.out)
    elif chosen.source == "folder":
        indices = _from_folder(chosen.paths, video=not chosen.images)
    else:
        indices = _from_lists(chosen.paths)
    if chosen.source not in DATA_SETS and chosen.out:
        if os.path.realpath(chosen.out) == os.path.realpath(next(iter(indices.values())).root):
            raise UserError(f"{chosen.out} holds the data themselves; choose another folder for the lists")
        _write(chosen.out, {name: _absolute(index) for name, index in indices.items()}, _classes(indices))
    return check(indices, chosen.workers, chosen.out) if chosen.check else 0


def _from_annotations(source: str, paths: Sequence[str], out: str) -> dict[str, Index]:
    if len(paths) > 2:
        raise UserError(f"{source} takes a folder of annotations and a folder of files")
    dataset = DATA_SETS[source]
    prepared: Prepared = dataset.read(paths[0], paths[-1])
    for split, entries in prepared.splits.items():
        line = f"{split}: {len(entries):,} examples"
        if published := dataset.published.get(split):
            line += f", published {published:,} ({len(entries) / published:.1%})"
        if missing := prepared.missing.get(split):
            line += f", {len(missing):,} more are annotated, but their files are not there"
            if out:
                os.makedirs(out, exist_ok=True)
                with open(os.path.join(out, f"missing-{split}.txt"), "w", encoding="utf-8") as file:
                    file.writelines(name + "\n" for name in sorted(set(missing)))
        print(line)
        if not entries:
            raise UserError(f"none of the files annotated for {split} is in {paths[-1]}")
    if out:
        _write(out, prepared.splits, prepared.class_names)
    return {name: Index("", entries, prepared.class_names) for name, entries in prepared.splits.items()}


def _from_folder(paths: Sequence[str], video: bool) -> dict[str, Index]:
    if len(paths) > 1 or not os.path.isdir(paths[0]):
        raise UserError(f"no folder {paths[0]!r}" if len(paths) == 1 else "folder takes one folder")
    root = paths[0]
    splits = {name: list(read_split(root, name, name, video)) for name in _splits_in(root)}
    if not splits:
        raise UserError(f"{root} has no train, val or test, neither as a folder of classes nor as a list")
    return _index(root, splits)


def _splits_in(root: str) -> Iterator[str]:
    """Those of train, val and test that are lists or have class folders; test splits may have no labels."""
    for name in ("train", "val", "test"):
        folder = os.path.join(root, name)
        lists = [ending for ending in LISTS if os.path.isfile(folder + ending)]
        is_folder = os.path.isdir(folder)
        if lists or (is_folder and any(os.path.isdir(os.path.join(folder, n)) for n in os.listdir(folder))):
            yield name
        elif is_folder:
            print(f"{folder}: no class folders in it, left out")


def _from_lists(paths: Sequence[str]) -> dict[str, Index]:
    roots = {os.path.dirname(os.path.abspath(path)) for path in paths}
    if len(roots) > 1:
        raise UserError("the lists lie in different folders; check them one by one")
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"no list {path!r}")
    splits = {os.path.splitext(os.path.basename(path))[0]: list(read_list(path)) for path in paths}
    if empty := [path for path, entries in zip(paths, splits.values(), strict=True) if not entries]:
        raise UserError(f"{empty[0]} is empty")
    return _index(roots.pop(), splits)


def _index(root: str, splits: dict[str, list[Entry]]) -> dict[str, Index]:
    names = class_names_of(root, next(iter(splits.values())))  # the first split is the one to train on
    return {name: Index(root, entries, names) for name, entries in splits.items()}


def _classes(indices: dict[str, Index]) -> tuple[str, ...]:
    return next(iter(indices.values())).class_names


def _absolute(index: Index) -> list[Entry]:
    entries = map(index.entry, range(len(index)))
    return [entry._replace(path=os.path.abspath(os.path.join(index.root, entry.path))) for entry in entries]


def _write(out: str, splits: dict[str, list[Entry]], class_names: Sequence[str]) -> None:
    """Lists with paths relative to `out` where files lie below it."""
    os.makedirs(out, exist_ok=True)
    here = os.path.abspath(out) + os.sep
    with open(os.path.join(out, LABELS), "w", encoding="utf-8") as file:
        file.writelines(name + "\n" for name in class_names)
    for name, entries in splits.items():
        rows = [entry._replace(path=entry.path.removeprefix(here)) for entry in entries]
        write_list(os.path.join(out, f"{name}.jsonl"), sorted(rows))
    print(f"{out}: {', '.join(f'{name}.jsonl' for name in splits)}, {LABELS} ({len(class_names)} classes)")


def check(indices: dict[str, Index], workers: int, out: str) -> int:
    """Decodes frames of every example; returns 1 if any cannot be read, else 0."""
    bad = []
    total = sum(map(len, indices.values()))
    with tqdm(total=total, unit="file", file=sys.stderr, desc="checking") as bar:
        for split, index in indices.items():
            for number, reason in _reasons(index, workers):
                bar.update()
                if reason:
                    bad.append(f"{split}\t{index.id(number)}\t{reason}")
                    bar.write(f"{split} {index.id(number)}: {reason}", file=sys.stdout)
    path = os.path.join(out or ".", "bad_files.txt")
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)  # an earlier check's
    if bad:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in bad)
    print(
        f"{total - len(bad)} of {total} examples can be read" + (f"; {path} lists the others" if bad else "")
    )
    return 1 if bad else 0


def _reasons(index: Index, workers: int) -> Iterator[tuple[int, str]]:
    """Yield number and reason of every example, "" if it can be read, also if it kills its decoder."""
    numbers = range(len(index))
    read = functools.partial(_reason, index)
    found = in_processes(read, numbers, workers, ahead=_AHEAD, lost=lambda worker: _KILLED)
    with contextlib.closing(found):
        yield from zip(numbers, found, strict=True)


_AHEAD = 16  # examples in the queue of each worker
_KILLED = "kills the process that decodes it"


def _reason(index: Index, number: int, note: Note) -> str:
    del note  # a worker reads one example at a time
    return reason_of(index, number)


def reason_of(index: Index, number: int) -> str:
    """Why an example cannot be read; "" if it can."""
    try:
        media, _ = index.open(number)
        with contextlib.closing(media):
            if media.missing:
                return f"cut off: {media.missing} of {media.count} frames are missing"
            media.frames(sorted({0, media.count // 2, media.count - 1}))
    except DecodeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    with exit_in_one_line():
        sys.exit(main(sys.argv[1:]))

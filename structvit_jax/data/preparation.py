"""Write lists to train from out of annotation files, and check a data set before training."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from structvit_jax.data import folder
from structvit_jax.data.annotations import DATA_SETS, Prepared
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import LABELS, Entry, Index, class_names_of, order, read_list, write_list
from structvit_jax.data.measure import Measured, measure
from structvit_jax.data.media import configure_decoding
from structvit_jax.data.survey import survey
from structvit_jax.data.workers import Note, in_processes
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.paths import check_local, write_errors_as_user_error

_CONFIGS = {"finegym99": "finegym", "finegym288": "finegym"}  # of data sets; others have one of their name
_AHEAD = 16  # examples in the queue of each worker
_KILLED = Measured(problem="kills the process that decodes it")


class Request(NamedTuple):
    """What to prepare; see `structvit prepare`."""

    source: str  # "folder", "list", or one of DATA_SETS
    paths: Sequence[str]
    out: str = ""  # folder for lists; "" writes none
    check: bool = False  # decode every file
    workers: int = 1  # processes that decode
    images: bool = False  # examples are images; otherwise the kind of most of them
    train_split: str = "train"  # of a folder
    test_split: str = "val"  # of a folder
    val_fraction: float = 0.1  # of a folder's training examples, held out if there is no test split


def run(request: Request) -> int:
    """Write the lists of a data set, check it, or both; return the exit code.

    Raises:
      UserError: nothing to do, or data that are missing, empty or not understood.
    """
    if not (request.out or request.check):
        raise UserError("nothing to do: add --out=DIR for lists, --check to decode every file, or both")
    check_local(request.out)
    configure_decoding()
    if request.source in DATA_SETS:
        indices = _from_annotations(request.source, request.paths, request.out)
        video = request.source != "imagenet"
    elif request.source == "folder":
        indices, video = _from_folder(request)
    else:
        indices, video = _from_lists(request.paths, request.images)
    if request.source not in DATA_SETS and request.out:
        first = next(iter(indices.values()))
        if os.path.realpath(request.out) == os.path.realpath(first.root):
            raise UserError(f"{request.out} holds the data themselves; choose another folder for the lists")
        lists = {name: _absolute(index) for name, index in indices.items()}
        _write(request.out, lists, first.class_names)
    if not request.check:
        return 0
    return check(indices, request.workers, _report(request), video=video, then=_next_command(request))


def _report(request: Request) -> str:
    """Return the file that lists unreadable examples, a different one for each data set."""
    if request.out:
        return os.path.join(request.out, "bad_files.txt")
    places = [os.path.abspath(path) for path in request.paths]
    name = os.path.splitext(os.path.basename(places[-1]))[0] or request.source
    return f"bad_files-{name}-{hashlib.sha256(' '.join(places).encode(errors='replace')).hexdigest()[:6]}.txt"


def _next_command(request: Request) -> str:
    """Return the command that trains on the data; "" if there are no lists to train from."""
    root = request.out or (request.paths[0] if request.source == "folder" else "")
    if not root:
        return ""
    name = _CONFIGS.get(request.source, request.source) if request.source in DATA_SETS else "folder"
    command = f"structvit train --config={name} --config.data.root={shlex.quote(root)}"
    if not request.out:
        for key in ("train_split", "test_split", "val_fraction"):
            if (value := getattr(request, key)) != Request._field_defaults[key]:
                command += f" --config.data.{key}={value}"
    return command


def _read(source: str, annotations: str, media: str) -> Prepared:
    """Read annotation files; an unexpected format becomes one line."""
    try:
        return DATA_SETS[source].read(annotations, media)
    except UserError:
        raise
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, csv.Error) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}: the annotations in {annotations} are not as distributed: {what}"
        ) from error


def _from_annotations(source: str, paths: Sequence[str], out: str) -> dict[str, Index]:
    prepared, dataset = _read(source, paths[0], paths[-1]), DATA_SETS[source]
    for split, entries in prepared.splits.items():
        line = f"{split}: {len(entries):,} examples"
        if published := dataset.published.get(split):
            line += f", published {published:,} ({len(entries) / published:.1%})"
        if missing := prepared.missing.get(split):
            line += f", {len(missing):,} more are annotated, but their files do not exist"
            if out:
                _write_lines(os.path.join(out, f"missing-{split}.txt"), sorted(set(missing)))
        print(line)
        if not entries:
            raise UserError(f"none of the files annotated for {split} is in {paths[-1]}")
    if out:
        _write(out, prepared.splits, prepared.class_names)
    return {name: Index("", entries, prepared.class_names) for name, entries in prepared.splits.items()}


def _from_folder(request: Request) -> tuple[dict[str, Index], bool]:
    """Return the splits of a folder, a third named "test" among them, and whether they are videos."""
    root = request.paths[0]
    if not os.path.isdir(root):
        raise UserError(f"no folder {root!r}")
    layout = folder.Layout(root, request.train_split, request.test_split, request.val_fraction, option="--")
    video = not request.images and folder.is_video(layout)
    train, test = folder.read_splits(layout, video=video)
    indices = {_split_name(request.train_split): train, _split_name(request.test_split): test}
    more = folder.Layout(root, train="test", option="--").find("train") if "test" not in indices else None
    if more and not os.path.isdir(layout.join(more)):
        indices["test"] = Index(root, read_list(layout.join(more)), train.class_names)
    elif more:
        try:
            entries, scan = folder.read_split(root, more, video=video)
            indices["test"] = Index(root, entries, train.class_names, scan=scan)
        except UserError:  # test splits may have no labels
            print(f"{layout.join(more)}: no class folders with examples in it, left out")
    return indices, video


def _split_name(split: str) -> str:
    """Return the name of a split in lists, shards and reports."""
    return os.path.splitext(os.path.basename(split.rstrip("/")))[0].strip(".") or "train"


def _from_lists(paths: Sequence[str], images: bool) -> tuple[dict[str, Index], bool]:
    """Return the splits of lists, and whether most of their examples are videos."""
    roots = {os.path.dirname(os.path.abspath(path)) for path in paths}
    if len(roots) > 1:
        raise UserError("the lists lie in different folders; check them one by one")
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"no list {path!r}")
    splits = {os.path.splitext(os.path.basename(path))[0]: list(read_list(path)) for path in paths}
    if empty := [path for path, entries in zip(paths, splits.values(), strict=True) if not entries]:
        raise UserError(f"{empty[0]} is empty")
    root, train = roots.pop(), next(iter(splits.values()))  # the first split is the one to train on
    names = class_names_of(root, train)
    pictures = sum(entry.path.lower().endswith(IMAGES) for entry in train)
    video = not images and 2 * pictures <= len(train)
    return {name: Index(root, entries, names) for name, entries in splits.items()}, video


def _absolute(index: Index) -> list[Entry]:
    return [index.entry(i)._replace(path=os.path.abspath(index.path(i))) for i in range(len(index))]


def _write(out: str, splits: Mapping[str, Sequence[Entry]], class_names: Sequence[str]) -> None:
    """Write lists, with paths relative to `out` for files below it."""
    here = os.path.abspath(out) + os.sep
    _write_lines(os.path.join(out, LABELS), class_names)
    with write_errors_as_user_error(out):
        for name, entries in splits.items():
            rows = [entry._replace(path=entry.path.removeprefix(here)) for entry in entries]
            write_list(os.path.join(out, f"{name}.jsonl"), sorted(rows, key=order))
    print(f"{out}: {', '.join(f'{name}.jsonl' for name in splits)}, {LABELS} ({len(class_names)} classes)")


def _write_lines(path: str, lines: Sequence[str]) -> None:
    with write_errors_as_user_error(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def check(
    indices: Mapping[str, Index], workers: int, report: str, *, video: bool = True, then: str = ""
) -> int:
    """Decode frames of every example and print a survey of the data set.

    Args:
      indices: the splits by name, the first the one to train on.
      workers: number of processes that decode.
      report: file that lists unreadable examples; an earlier one is replaced or removed.
      video: whether examples are videos rather than images.
      then: the command to run next.

    Returns:
      1 if any example cannot be read or training would be pointless, else 0.
    """
    bad = []
    total = sum(map(len, indices.values()))
    measured: dict[str, dict[int, Measured]] = {name: {} for name in indices}
    with tqdm(total=total, unit="file", file=sys.stderr, desc="checking") as bar:
        for split, index in indices.items():
            for number, one in _measured(index, workers):
                bar.update()
                measured[split][number] = one
                if one.problem:
                    bad.append(f"{split}\t{index.id(number)}\t{one.problem}")
                    bar.write(f"{split} {index.id(number)}: {one.problem}", file=sys.stdout)
            for number in np.flatnonzero(index.labels < 0).tolist():
                bad.append(f"{split}\t{index.id(number)}\tunknown label {index.entry(number).label!r}")
    found = survey(indices, video=video, measured=measured)
    print(found.table())
    if bad:
        _write_lines(report, bad)
    else:
        with write_errors_as_user_error(report), contextlib.suppress(FileNotFoundError):
            os.remove(report)
    others = f"; {report} lists the problems" if bad else ""
    unreadable = sum(len(split.unreadable) for split in found.splits)
    print(f"{total - unreadable:,} of {total:,} examples can be read{others}")
    if then and not found.errors:
        print(f"next: {then}")
    return 1 if bad or found.errors else 0


def _measured(index: Index, workers: int) -> Iterator[tuple[int, Measured]]:
    """Yield the number and `Measured` of every example, even if it kills its decoder."""
    numbers = range(len(index))
    found = in_processes(
        functools.partial(_measure, index),
        numbers,
        workers,
        ahead=_AHEAD,
        on_death=lambda worker: _KILLED,
        setup=configure_decoding,
    )
    with contextlib.closing(found):
        yield from zip(numbers, found, strict=True)


def _measure(index: Index, number: int, note: Note) -> Measured:
    del note  # a worker reads one example at a time
    return measure(index, number)

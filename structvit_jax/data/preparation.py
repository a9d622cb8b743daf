"""Write lists to train from, and check a data set before training: `structvit prepare`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from structvit_jax.data import folder, idx_files
from structvit_jax.data.annotations import DATA_SETS, read_annotations
from structvit_jax.data.idx_files import IdxImages
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import LABELS, Index, class_names_of, read_list
from structvit_jax.data.media import configure_decoding
from structvit_jax.data.survey import Measured, measure, survey
from structvit_jax.data.transcode import transcode
from structvit_jax.data.workers import in_processes
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.paths import check_local, write_errors_as_user_error

_AHEAD = 16  # largest number of examples in the queue of each worker
_KILLED = Measured(problem="kills the process that decodes it")


class Request(NamedTuple):
    """The arguments of a `structvit prepare` command."""

    source: str  # "folder", "list", or one of `DATA_SETS`
    paths: Sequence[str]  # the folder, the lists, or the folders of annotations and of media
    out: str = ""  # folder to write lists to; "" writes none
    check: bool = False  # decode three frames of every example
    transcode: int | None = None  # copy videos to files with this short side, and list the copies
    workers: int = 1  # number of processes that decode
    images: bool = False  # treat the examples as images; False: the kind of most of them decides
    train_split: str = "train"  # this field and the next two are only for the source "folder"
    test_split: str = "val"
    val_fraction: float = 0.1  # of the training examples, held out if there is no test split


def run(request: Request) -> int:
    """Write the lists of a data set, check it, or both; return the exit code.

    Raises:
      UserError: there is nothing to do, or the data are missing, empty or not understood.
    """
    if not (request.out or request.check or request.transcode):
        raise UserError("nothing to do: add --out=DIR for lists, --check to test every example, or both")
    if request.transcode and not request.out:
        raise UserError(
            f"--transcode={request.transcode} needs --out=DIR, the folder for the copies and their lists"
        )
    check_local(request.out)
    configure_decoding()
    if request.source == "folder" and idx_files.is_idx(request.paths[0]):
        return _check_idx(request)
    if request.source == "folder":
        splits, video = _read_folder(request)
    elif request.source == "list":
        splits, video = _read_lists(request.paths, request.images)
    else:
        splits, video = _read_published(request), request.source != "imagenet"
    if request.out:
        _check_out(request.out, splits)
        if request.transcode:
            splits = _transcode(request, request.transcode, splits)
        _write_lists(request.out, splits)
    if not request.check:
        return 0
    report = _report_path(request)
    return check(splits, request.workers, report, video=video, next_command=_next_command(request))


def _check_idx(request: Request) -> int:
    """Check the images of a folder of IDX files."""
    root = request.paths[0]
    if request.out:
        raise UserError(f"{root} has IDX files, which are read without lists; replace --out by --check")
    train, test = idx_files.read_splits(_layout(request))
    splits = {_split_name(request.train_split): train, _split_name(request.test_split): test}
    return check(
        splits, request.workers, _report_path(request), video=False, next_command=_next_command(request)
    )


def _transcode(request: Request, short_side: int, splits: Mapping[str, Index]) -> dict[str, Index]:
    """Copy videos to files that decode fast; return the splits with the copies."""
    is_list = request.source == "list"
    base = os.path.dirname(os.path.abspath(request.paths[0])) if is_list else request.paths[-1]
    searched = [] if is_list else request.paths
    return transcode(splits, base, searched, request.out, short_side, request.workers)


def _report_path(request: Request) -> str:
    """Return the path of the list of unreadable examples, which differs between data sets."""
    if request.out:
        return os.path.join(request.out, "bad_files.txt")
    paths = [os.path.abspath(path) for path in request.paths]
    name = os.path.splitext(os.path.basename(paths[-1]))[0] or request.source
    return f"bad_files-{name}-{hashlib.sha256(' '.join(paths).encode(errors='replace')).hexdigest()[:6]}.txt"


def _next_command(request: Request) -> str:
    """Return the command that trains on the data, or "" if there is no folder to train from."""
    root = request.out or (request.paths[0] if request.source == "folder" else "")
    if not root:
        return ""
    name = request.source if request.source in DATA_SETS else "folder"
    config = "finegym" if name.startswith("finegym") else name
    command = f"structvit train --config={config} --config.data.root={shlex.quote(root)}"
    if not request.out:
        for key in ("train_split", "test_split", "val_fraction"):
            if (value := getattr(request, key)) != Request._field_defaults[key]:
                command += f" --config.data.{key}={shlex.quote(str(value))}"
    if name not in ("folder", "imagenet"):  # these recipes start from trained weights
        command += " --config.init_from=RUN_OR_FILE"
    return command


def _read_published(request: Request) -> dict[str, Index]:
    """Return the splits of a published data set, and print their sizes beside the published ones."""
    media = request.paths[-1]
    found = read_annotations(request.source, request.paths[0], media)
    published = DATA_SETS[request.source].published
    splits = {}
    for split, annotated in found.splits.items():
        entries = [e._replace(path=found.files[e.path]) for e in annotated if e.path in found.files]
        line = f"{split}: {len(entries):,} examples"
        if split in published:
            line += f", published {published[split]:,} ({len(entries) / published[split]:.1%})"
        if missing := len(annotated) - len(entries):
            line += f", {missing:,} more are annotated, but their files do not exist"
            if request.out:
                names = {entry.path for entry in annotated} - found.files.keys()
                _write_lines(os.path.join(request.out, f"missing-{split}.txt"), sorted(names))
        print(line)
        if not entries:
            raise UserError(f"none of the files annotated for {split} is in {media}")
        splits[split] = Index("", entries, found.class_names)
    return splits


def _read_folder(request: Request) -> tuple[dict[str, Index], bool]:
    """Return the splits of a folder, and whether the examples are videos. A split "test" is read too."""
    root = request.paths[0]
    layout = _layout(request)
    video = not request.images and folder.is_video(layout)
    train, test = folder.read_splits(layout, video=video)
    splits = {_split_name(request.train_split): train, _split_name(request.test_split): test}
    if "test" not in splits and (name := layout.find("test", "test")):
        try:
            entries, notes = folder.read_split(root, name, video=video)
            splits["test"] = Index(root, entries, train.class_names, notes=notes)
        except UserError as error:  # test splits may have no labels
            print(f"test is left out: {error}")
    return splits, video


def _layout(request: Request) -> folder.Layout:
    return folder.Layout(
        request.paths[0], request.train_split, request.test_split, request.val_fraction, option="--"
    )


def _split_name(split: str) -> str:
    """Return the name of a split in lists, shards and reports."""
    return os.path.splitext(os.path.basename(split.rstrip("/")))[0].strip(".") or "train"


def _read_lists(paths: Sequence[str], images: bool) -> tuple[dict[str, Index], bool]:
    """Return one split per list, and whether at least half of the training examples are videos."""
    roots = {os.path.dirname(os.path.abspath(path)) for path in paths}
    if len(roots) > 1:
        raise UserError("the lists are in different folders; check them one by one")
    splits = {}
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"no list {path!r}")
        splits[_split_name(path)] = entries = list(read_list(path))
        if not entries:
            raise UserError(f"{path} is empty")
    root, train = roots.pop(), next(iter(splits.values()))
    names = class_names_of(root, train)
    pictures = sum(entry.path.lower().endswith(IMAGES) for entry in train)
    video = not images and 2 * pictures <= len(train)
    return {name: Index(root, entries, names) for name, entries in splits.items()}, video


def _check_out(out: str, splits: Mapping[str, Index]) -> None:
    root = next(iter(splits.values())).root
    if root and os.path.realpath(out) == os.path.realpath(root):
        raise UserError(f"{out} holds the data themselves; choose another folder for the lists")


def _write_lists(out: str, splits: Mapping[str, Index]) -> None:
    """Write lists and class names. Paths of files below `out` are relative to it, others are absolute."""
    train = next(iter(splits.values()))
    here = os.path.abspath(out) + os.sep
    _write_lines(os.path.join(out, LABELS), train.class_names)
    for name, index in splits.items():
        rows = []
        for i in range(len(index)):
            path = os.path.abspath(index.path(i)).removeprefix(here)
            row = index.entry(i)._replace(path=path)._asdict()
            rows.append(json.dumps({key: value for key, value in row.items() if value is not None}))
        _write_lines(os.path.join(out, f"{name}.jsonl"), rows)
    lists = ", ".join(f"{name}.jsonl" for name in splits)
    print(f"{out}: {lists}, {LABELS} ({len(train.class_names)} classes)")


def _write_lines(path: str, lines: Iterable[str]) -> None:
    """Write a text file atomically, even if several processes do so at the same time."""
    unfinished = f"{path}.{os.getpid()}.tmp"
    with write_errors_as_user_error(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        os.replace(unfinished, path)


def check(
    splits: Mapping[str, Index | IdxImages],
    workers: int,
    report: str,
    *,
    video: bool = True,
    next_command: str = "",
) -> int:
    """Decode frames of every example and print a survey of the data set.

    Args:
      splits: the splits by name; the first is the training split.
      workers: number of processes that decode.
      report: path of the list of unreadable examples; an earlier list is replaced or removed.
      video: whether examples are videos rather than images.
      next_command: the command to run next, printed if the data can be trained on.

    Returns:
      1 if an example cannot be read or training would be pointless, else 0.
    """
    bad = []
    total = sum(map(len, splits.values()))
    measured: dict[str, dict[int, Measured]] = {}
    with tqdm(total=total, unit="file", file=sys.stderr, desc="checking") as bar:
        for split, index in splits.items():
            measured[split] = {}
            with contextlib.closing(_measure_all(index, workers)) as results:
                for number, one in enumerate(results):
                    bar.update()
                    measured[split][number] = one
                    if one.problem:
                        bad.append(f"{split}\t{index.id(number)}\t{one.problem}")
                        bar.write(f"{split} {index.id(number)}: {one.problem}", file=sys.stdout)
            if isinstance(index, Index):
                unknown = ((n, index.entry(n).label) for n in np.flatnonzero(index.labels < 0).tolist())
                bad += [f"{split}\t{index.id(n)}\tunknown label {label!r}" for n, label in unknown]
    found = survey(splits, video=video, measured=measured)
    print(found.table())
    if bad:
        _write_lines(report, bad)
    else:
        with write_errors_as_user_error(report), contextlib.suppress(FileNotFoundError):
            os.remove(report)
    readable = total - sum(len(split.unreadable) for split in found.splits)
    more = f"; {report} lists the problems" if bad else ""
    print(f"{readable:,} of {total:,} examples can be read{more}")
    if next_command and not found.errors:
        print(f"next: {next_command}")
    return 1 if bad or found.errors else 0


def _measure_all(index: Index | IdxImages, workers: int) -> Generator[Measured]:
    """Measure every example, in order; continue if one of them kills the process that decodes it."""
    return in_processes(
        lambda number, note: measure(index, number),
        range(len(index)),
        workers,
        ahead=_AHEAD,
        on_death=lambda worker: _KILLED,
        setup=configure_decoding,
    )

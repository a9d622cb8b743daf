"""Read the annotation files of the paper's data sets, in the form in which they are distributed.

Each reader takes a folder of annotations and a folder of media, and searches both recursively. The readers
are tested on small files of the documented format; the full sets were not available.
"""

from __future__ import annotations

import collections
import csv
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from structvit_jax.data.container import VIDEOS
from structvit_jax.data.folder import walk
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import Entry
from structvit_jax.data.media import frame_names
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import parse_json


class Annotations(NamedTuple):
    """The examples of annotation files.

    Attributes:
      class_names: in the distributed order.
      splits: examples by split; their paths are names of media files without extension.
      files: paths of media files by name.
    """

    class_names: tuple[str, ...]
    splits: dict[str, list[Entry]]
    files: dict[str, str]


def kinetics400(annotations: str, media: str) -> Annotations:
    """Read CSV files `label,youtube_id,time_start,time_end,split`.

    Video files are ID_START_END.mp4, where the times are seconds with six digits, or ID.mp4.
    """
    files = _files_by_name(media, VIDEOS)
    splits: dict[str, list[Entry]] = {}
    for split, names in (("train", ("train.csv",)), ("val", ("val.csv", "validate.csv", "validation.csv"))):
        prefixes = ("", "kinetics400_", "kinetics-400_", "kinetics_400_")
        path = _find(annotations, *(prefix + name for prefix in prefixes for name in names))
        rows = _rows(path, "label", "youtube_id", "time_start", "time_end")
        splits[split] = [Entry(_kinetics_name(row, files), row["label"]) for row in rows]
    return Annotations(_sorted_labels(*splits.values()), splits, files)


def _kinetics_name(row: dict[str, str], files: dict[str, str]) -> str:
    start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
    name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
    return row["youtube_id"] if name not in files and row["youtube_id"] in files else name


def something_v1(annotations: str, media: str) -> Annotations:
    """Read CSV files `id;label` without a header, and a CSV file of labels, one per line.

    Videos are folders of frames ID/00001.jpg.
    """
    folders = {os.path.basename(here): here for here, names in _walk(media) if frame_names(names)}
    return _something(annotations, "v1", folders)


def something_v2(annotations: str, media: str) -> Annotations:
    """Read JSON files [{"id", "template", ...}], and a JSON file {label: number}.

    CSV files in the form of V1 are accepted too. Video files are ID.webm.
    """
    return _something(annotations, "v2", _files_by_name(media, VIDEOS))


def _something(annotations: str, version: str, files: dict[str, str]) -> Annotations:
    splits: dict[str, list[Entry]] = {}
    for split, name in (("train", "train"), ("val", "validation")):
        path = _find_something(annotations, version, name)
        if path.endswith(".json"):
            # Labels are templates without the brackets around their placeholders.
            rows = _rows(path, "id", "template")
            splits[split] = [Entry(str(row["id"]), re.sub(r"[\[\]]", "", row["template"])) for row in rows]
        else:
            cells = _semicolon_rows(path)
            if wrong := [row for row in cells if len(row) != 2]:
                raise UserError(f"{path}: a line is not 'id;label': {';'.join(wrong[0])!r}")
            splits[split] = [Entry(name, label) for name, label in cells]
    path = _find_something(annotations, version, "labels")
    if path.endswith(".json"):
        numbers = {label: int(number) for label, number in _json(path).items()}
        labels = sorted(numbers, key=numbers.__getitem__)
    else:
        labels = [row[0].strip() for row in _semicolon_rows(path) if row[0].strip()]
    return Annotations(tuple(labels), splits, files)


def _find_something(annotations: str, version: str, name: str) -> str:
    stem = f"something-something-{version}-{name}"
    return _find(annotations, f"{stem}.json", f"{stem}.csv", f"{name}.json", f"{name}.csv")


def diving48(annotations: str, media: str) -> Annotations:
    """Read JSON files [{"vid_name", "label", ...}] of V2, and a JSON vocabulary of four phases per class.

    Video files are NAME.mp4.
    """
    vocabulary = [" / ".join(phases) for phases in _json(_find(annotations, "Diving48_vocab.json"))]
    splits: dict[str, list[Entry]] = {}
    for split, name in (("train", "train"), ("val", "test")):
        path = _find(annotations, f"Diving48_V2_{name}.json")
        rows = _rows(path, "vid_name", "label")
        if beyond := [row for row in rows if not 0 <= int(row["label"]) < len(vocabulary)]:
            raise UserError(f"{path}: {beyond[0]['vid_name']} has a label outside the vocabulary")
        splits[split] = [Entry(row["vid_name"], vocabulary[int(row["label"])]) for row in rows]
    return Annotations(tuple(vocabulary), splits, _files_by_name(media, VIDEOS))


def finegym(annotations: str, media: str, classes: int) -> Annotations:
    """Read lists of clips, a list of categories, and a JSON file with the times of all events and clips.

    A line of a list of clips is "VIDEO_E_START_END_A_START_END LABEL"; a line of the list of categories is
    "Clabel: N; ...; (XX) NAME". Categories with the same name become the classes "NAME [N]". Media files are
    whole videos, VIDEO.mp4. The times of a clip are relative to the start of its event.
    """
    lines = _lines(_find(annotations, f"gym{classes}_categories.txt"))
    matches = [re.match(r"Clabel:\s*(\d+);.*?(\([A-Z]+\).*)", line) for line in lines]
    numbered = {int(match[1]): match[2].strip() for match in matches if match}
    counts = collections.Counter(numbered.values())
    names = tuple(
        name if counts[name] == 1 else f"{name} [{label}]" for label, name in sorted(numbered.items())
    )
    if len(names) != classes:
        raise UserError(f"gym{classes}_categories.txt has {len(names)} classes instead of {classes}")
    events = _json(_find(annotations, "finegym_annotation_info_v1.1.json"))
    splits: dict[str, list[Entry]] = {}
    for split in ("train", "val"):
        stem = f"gym{classes}_{split}_element"
        path = _find(annotations, f"{stem}_v1.1.txt", f"{stem}.txt")
        splits[split] = list(_finegym_clips(path, events, names))
    return Annotations(names, splits, _files_by_name(media, VIDEOS))


def _finegym_clips(path: str, events: dict[str, Any], names: tuple[str, ...]) -> Iterator[Entry]:
    for number, line in enumerate(_lines(path), 1):
        match = re.fullmatch(r"(.+)_(E_\d+_\d+)_(A_\d+_\d+)\s+(\d+)\s*", line)
        try:
            if match is None:
                raise ValueError(line)
            video, event, action, label = match.groups()
            begin = events[video][event]["timestamps"][0][0]
            inside = events[video][event]["segments"][action]["timestamps"]
            yield Entry(video, names[int(label)], begin + inside[0][0], begin + inside[-1][1])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}:{number}: the annotations have no clip {line.strip()!r}") from error


def imagenet(annotations: str, media: str) -> Annotations:
    """Read ILSVRC 2012: train/SYNSET/*.JPEG, and val in the same form, or flat with LOC_val_solution.csv.

    Classes are the sorted synsets, the usual order of the 1000 classes.
    """
    train, val = (_image_folder(media, split) for split in ("train", "val"))
    train_files, val_files = _files_by_name(train, IMAGES), _files_by_name(val, IMAGES)
    splits = {"train": _label_by_folder(train, train_files), "val": _label_by_folder(val, val_files)}
    if not splits["val"]:
        rows = _rows(_find(annotations, "LOC_val_solution.csv"), "ImageId", "PredictionString")
        splits["val"] = [Entry(row["ImageId"], row["PredictionString"].split()[0]) for row in rows]
    return Annotations(_sorted_labels(splits["train"]), splits, train_files | val_files)


def _label_by_folder(top: str, files: dict[str, str]) -> list[Entry]:
    """Return the files in folders below `top`, labelled with the name of their folder."""
    folders = {name: os.path.dirname(path) for name, path in files.items()}
    return [Entry(name, os.path.basename(folder)) for name, folder in folders.items() if folder != top]


class DataSet(NamedTuple):
    """The reader of a data set, and its published number of examples by split."""

    read: Callable[[str, str], Annotations]
    published: dict[str, int]


DATA_SETS = {
    "kinetics400": DataSet(kinetics400, {"train": 240_436, "val": 19_796}),  # in mmaction2's copy
    "something_v1": DataSet(something_v1, {"train": 86_017, "val": 11_522}),
    "something_v2": DataSet(something_v2, {"train": 168_913, "val": 24_777}),
    "diving48": DataSet(diving48, {"train": 15_027, "val": 1_970}),
    "finegym99": DataSet(functools.partial(finegym, classes=99), {"train": 26_320, "val": 8_521}),
    "finegym288": DataSet(functools.partial(finegym, classes=288), {"train": 29_334, "val": 9_646}),
    "imagenet": DataSet(imagenet, {"train": 1_281_167, "val": 50_000}),
}


def read_annotations(name: str, annotations: str, media: str) -> Annotations:
    """Read the annotation files of one of `DATA_SETS`.

    Raises:
      UserError: files are missing, or differ from the distributed ones in form.
    """
    try:
        return DATA_SETS[name].read(annotations, media)
    except UserError:
        raise
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: the annotations in {annotations} are not as distributed: {reason}"
        ) from error


def _sorted_labels(*splits: list[Entry]) -> tuple[str, ...]:
    return tuple(sorted({entry.label for split in splits for entry in split}))


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    if not os.path.isdir(top):
        raise UserError(f"no folder {top!r}")
    return walk(os.path.abspath(top))


def _files_by_name(top: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Return the absolute paths of files below `top` with one of these extensions, by name without it."""
    return {
        os.path.splitext(name)[0]: os.path.join(here, name)
        for here, names in _walk(top)
        for name in names
        if name.lower().endswith(endings)
    }


def _find(top: str, *names: str) -> str:
    """Find a file below `top` by the first of these names that exists; prefer files nearer to `top`."""
    found = [
        (names.index(name), here.count(os.sep), os.path.join(here, name))
        for here, files in _walk(top)
        for name in files
        if name in names
    ]
    if not found:
        raise UserError(f"{top} has no file {' or '.join(names)}")
    return min(found)[2]


def _image_folder(top: str, name: str) -> str:
    """Return the folder `name` below `top` that has images; annotation folders may have this name too."""
    for here, _ in _walk(top):
        folder = os.path.join(here, name)
        if os.path.isdir(folder) and any(frame_names(files) for _, files in _walk(folder)):
            return folder
    raise UserError(f"{top} has no folder {name!r} with images in it")


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read().splitlines()


def _json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return parse_json(file.read())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error


def _rows(path: str, *keys: str) -> list[dict[str, Any]]:
    """Return a JSON list of objects, or the rows of a CSV file with a header, that have these keys."""
    rows = _json(path) if path.endswith(".json") else list(csv.DictReader(_lines(path)))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or any(row.get(key) is None for key in keys):
            raise UserError(f"{path}: entry {number} lacks one of {', '.join(keys)}")
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _semicolon_rows(path: str) -> list[list[str]]:
    """Return the rows of a CSV file without a header, whose cells are separated by semicolons."""
    return [row for row in csv.reader(_lines(path), delimiter=";") if row]

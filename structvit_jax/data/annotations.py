"""Read the annotation files of the paper's data sets, as they are distributed, into lists of examples.

Each reader takes a folder of annotations and a folder of media, searches both recursively, and returns the
splits and the class names in the distributed order. The readers are tested on small files of the documented
format; the full sets were not available.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from structvit_jax.data.container import VIDEOS
from structvit_jax.data.image import IMAGES
from structvit_jax.data.index import Entry, walk
from structvit_jax.data.media import frame_names
from structvit_jax.utils.errors import UserError, parse_json


class Prepared(NamedTuple):
    """The examples of annotation files."""

    splits: dict[str, list[Entry]]  # paths are absolute
    missing: dict[str, list[str]]  # names of annotated files that do not exist
    class_names: tuple[str, ...]

    def add(self, split: str, annotated: Iterable[tuple[str, Entry]], files: dict[str, str]) -> None:
        """Add annotated examples, given as the name of a file and an entry, to a split.

        Args:
          split: its name.
          annotated: names without extensions, and entries without paths.
          files: paths by name.
        """
        entries, missing = self.splits.setdefault(split, []), self.missing.setdefault(split, [])
        for name, entry in annotated:
            if name in files:
                entries.append(entry._replace(path=files[name]))
            else:
                missing.append(name)


def kinetics400(annotations: str, media: str) -> Prepared:
    """Read CSV files `label,youtube_id,time_start,time_end,split`.

    Video files are ID_START_END.mp4, with whole seconds of six digits, or ID.mp4.
    """
    files = _files_by_name(media, VIDEOS)
    result = Prepared({}, {}, ())
    labels: set[str] = set()
    for split, names in (("train", ("train.csv",)), ("val", ("val.csv", "validate.csv", "validation.csv"))):
        path = _find(
            annotations, *names, *(f"kinetics{mark}400_{name}" for mark in ("", "-", "_") for name in names)
        )
        rows = _csv(path, "label", "youtube_id", "time_start", "time_end")
        labels |= {row["label"] for row in rows}
        result.add(split, ((_kinetics_name(row, files), Entry("", row["label"])) for row in rows), files)
    return result._replace(class_names=tuple(sorted(labels)))


def _kinetics_name(row: dict[str, str], files: dict[str, str]) -> str:
    start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
    name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
    return row["youtube_id"] if name not in files and row["youtube_id"] in files else name


def something_v1(annotations: str, media: str) -> Prepared:
    """Read CSV files `id;label` without a header, and a CSV file of labels, one per line.

    Videos are folders of frames ID/00001.jpg.
    """
    folders = {os.path.basename(here): here for here, names in _walk(media) if frame_names(names)}
    return _something(annotations, "v1", folders)


def something_v2(annotations: str, media: str) -> Prepared:
    """Read JSON files [{"id", "template", ...}], or CSV as V1, and a JSON file {label: number}.

    Video files are ID.webm.
    """
    return _something(annotations, "v2", _files_by_name(media, VIDEOS))


def _something(annotations: str, version: str, files: dict[str, str]) -> Prepared:
    result = Prepared({}, {}, _something_labels(annotations, version))
    for split, name in (("train", "train"), ("val", "validation")):
        stems = (f"something-something-{version}-{name}", name)
        path = _find(annotations, *(stem + ending for stem in stems for ending in (".json", ".csv")))
        if path.endswith(".json"):
            # Labels are templates without the brackets around their placeholders.
            rows = _json_rows(path, "id", "template")
            pairs = [(str(row["id"]), re.sub(r"[\[\]]", "", row["template"])) for row in rows]
        else:
            cells = [row for row in csv.reader(_lines(path), delimiter=";") if row]
            if wrong := [row for row in cells if len(row) != 2]:
                raise UserError(f"{path}: a line is not 'id;label': {';'.join(wrong[0])!r}")
            pairs = [(row[0], row[1]) for row in cells]
        result.add(split, ((name, Entry("", label)) for name, label in pairs), files)
    return result


def _something_labels(annotations: str, version: str) -> tuple[str, ...]:
    stem = f"something-something-{version}-labels"
    path = _find(annotations, f"{stem}.json", f"{stem}.csv", "labels.json", "labels.csv")
    if path.endswith(".csv"):
        rows = csv.reader(_lines(path), delimiter=";")  # as the examples: names with commas may be quoted
        return tuple(row[0].strip() for row in rows if row and row[0].strip())
    numbers = {label: int(number) for label, number in _json(path).items()}
    return tuple(sorted(numbers, key=numbers.__getitem__))


def diving48(annotations: str, media: str) -> Prepared:
    """Read JSON files [{"vid_name", "label", ...}] of V2, and a JSON vocabulary of four phases per class.

    Video files are NAME.mp4.
    """
    vocabulary = [" / ".join(phases) for phases in _json(_find(annotations, "Diving48_vocab.json"))]
    files, result = _files_by_name(media, VIDEOS), Prepared({}, {}, tuple(vocabulary))
    for split, name in (("train", "train"), ("val", "test")):
        path = _find(annotations, f"Diving48_V2_{name}.json")
        rows = _json_rows(path, "vid_name", "label")
        if beyond := [row for row in rows if not 0 <= int(row["label"]) < len(vocabulary)]:
            raise UserError(f"{path}: {beyond[0]['vid_name']} has a label outside the vocabulary")
        pairs = ((row["vid_name"], Entry("", vocabulary[int(row["label"])])) for row in rows)
        result.add(split, pairs, files)
    return result


def finegym(annotations: str, media: str, classes: int) -> Prepared:
    """Read lists "VIDEO_E_START_END_A_START_END LABEL", categories "Clabel: N; ...; (XX) NAME", JSON times.

    Files are whole videos, VIDEO.mp4; the times of a clip are relative to those of its event.
    """
    lines = _lines(_find(annotations, f"gym{classes}_categories.txt"))
    matches = [re.match(r"Clabel:\s*(\d+);.*?(\([A-Z]+\).*)", line) for line in lines]
    numbered = {int(match[1]): match[2].strip() for match in matches if match}
    names = tuple(numbered[number] for number in sorted(numbered))
    if len(names) != classes:
        raise UserError(f"gym{classes}_categories.txt names {len(names)} classes")
    events = _json(_find(annotations, "finegym_annotation_info_v1.1.json"))
    files, result = _files_by_name(media, VIDEOS), Prepared({}, {}, names)
    for split in ("train", "val"):
        stems = (f"gym{classes}_{split}_element_v1.1.txt", f"gym{classes}_{split}_element.txt")
        result.add(split, _finegym_clips(_find(annotations, *stems), events, names), files)
    return result


def _finegym_clips(path: str, events: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, Entry]]:
    for number, line in enumerate(_lines(path), 1):
        match = re.fullmatch(r"(.+)_(E_\d+_\d+)_(A_\d+_\d+)\s+(\d+)\s*", line)
        try:
            if match is None:
                raise ValueError(line)
            video, event, action, label = match.groups()
            begin = events[video][event]["timestamps"][0][0]
            inside = events[video][event]["segments"][action]["timestamps"]
            yield video, Entry("", names[int(label)], begin + inside[0][0], begin + inside[-1][1])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}:{number}: no clip of the annotations: {line.strip()!r}") from error


def imagenet(annotations: str, media: str) -> Prepared:
    """Read ILSVRC 2012: train/SYNSET/*.JPEG, and val either likewise or flat with LOC_val_solution.csv.

    Classes are the sorted synsets, the usual order of the 1000 classes.
    """
    train, val = (_image_folder(media, split) for split in ("train", "val"))
    result = Prepared({"train": _class_folders(train), "val": _class_folders(val)}, {}, ())
    if not result.splits["val"]:
        path = _find(annotations, "LOC_val_solution.csv")
        rows = _csv(path, "ImageId", "PredictionString")
        pairs = ((row["ImageId"], Entry("", row["PredictionString"].split()[0])) for row in rows)
        result.add("val", pairs, _files_by_name(val, IMAGES))
    return result._replace(class_names=tuple(sorted({entry.label for entry in result.splits["train"]})))


def _class_folders(folder: str) -> list[Entry]:
    labels = [label for label in sorted(os.listdir(folder)) if os.path.isdir(os.path.join(folder, label))]
    return [Entry(path, label) for label in labels for path in _files(os.path.join(folder, label), IMAGES)]


class DataSet(NamedTuple):
    """The reader of a data set, and the number of examples that it is published to have."""

    read: Callable[[str, str], Prepared]
    published: dict[str, int]


DATA_SETS = {
    "kinetics400": DataSet(kinetics400, {"train": 240_436, "val": 19_796}),  # of the copy of mmaction2
    "something_v1": DataSet(something_v1, {"train": 86_017, "val": 11_522}),
    "something_v2": DataSet(something_v2, {"train": 168_913, "val": 24_777}),
    "diving48": DataSet(diving48, {"train": 15_027, "val": 1_970}),
    "finegym99": DataSet(lambda a, m: finegym(a, m, 99), {"train": 20_484, "val": 8_521}),
    "finegym288": DataSet(lambda a, m: finegym(a, m, 288), {}),
    "imagenet": DataSet(imagenet, {"train": 1_281_167, "val": 50_000}),
}


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    if not os.path.isdir(top):
        raise UserError(f"no folder {top!r}")
    return walk(os.path.abspath(top))


def _files(top: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Yield the absolute path of every file below `top` with one of these extensions."""
    return (
        os.path.join(here, name)
        for here, names in _walk(top)
        for name in names
        if name.lower().endswith(endings)
    )


def _files_by_name(top: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Return the absolute paths of media files below `top` by name without extension."""
    return {os.path.splitext(os.path.basename(path))[0]: path for path in _files(top, endings)}


def _find(top: str, *names: str) -> str:
    """Return the file below `top` with the first of these names, of several the one nearest to `top`."""
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
    """Return the folder `name` below `top` that contains images; annotations use the same names."""
    for here, _ in _walk(top):
        folder = os.path.join(here, name)
        if os.path.isdir(folder) and any(_files(folder, IMAGES)):
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


def _csv(path: str, *keys: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header that has these columns."""
    return _checked(list(csv.DictReader(_lines(path))), keys, path)


def _json_rows(path: str, *keys: str) -> list[dict[str, Any]]:
    """Return a JSON list of objects that have these keys."""
    return _checked(_json(path), keys, path)


def _checked(rows: list[dict[str, Any]], keys: tuple[str, ...], path: str) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or any(row.get(key) is None for key in keys):
            raise UserError(f"{path}: entry {number} lacks one of {', '.join(keys)}")
    if not rows:
        raise UserError(f"{path} is empty")
    return rows

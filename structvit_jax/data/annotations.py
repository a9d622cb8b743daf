"""The annotation files of the paper's data sets, as they are distributed, made into lists of examples.

Each reader takes a folder of annotations and a folder of media, both searched to any depth, and returns the
splits and the class names in the distributed order. These readers are tested on small files of the documented
shape; the full sets were not at hand.
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
    """What a reader found."""

    splits: dict[str, list[Entry]]  # paths are absolute
    missing: dict[str, list[str]]  # names of annotated files that are not there
    class_names: tuple[str, ...]


def _split(name: str, wanted: Iterable[tuple[str, Entry]], files: dict[str, str], into: Prepared) -> None:
    """Sorts annotated examples into those whose file is there and those whose file is not."""
    entries, missing = into.splits.setdefault(name, []), into.missing.setdefault(name, [])
    for key, entry in wanted:
        if key in files:
            entries.append(entry._replace(path=files[key]))
        else:
            missing.append(key)


def kinetics400(annotations: str, media: str) -> Prepared:
    """CSV `label,youtube_id,time_start,time_end,split`; files ID_START_END.mp4, in whole seconds of six
    digits, or ID.mp4."""
    files = _media(media, VIDEOS)
    result = Prepared({}, {}, ())
    labels: set[str] = set()
    for split, names in (("train", ("train.csv",)), ("val", ("val.csv", "validate.csv", "validation.csv"))):
        path = _find(
            annotations, *names, *(f"kinetics{mark}400_{name}" for mark in ("", "-", "_") for name in names)
        )
        rows = list(csv.DictReader(_lines(path)))
        _need(rows, ("label", "youtube_id", "time_start", "time_end"), path)
        labels |= {row["label"] for row in rows}
        _split(split, ((_kinetics_name(row, files), Entry("", row["label"])) for row in rows), files, result)
    return result._replace(class_names=tuple(sorted(labels)))


def _kinetics_name(row: dict[str, str], files: dict[str, str]) -> str:
    start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
    name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
    return row["youtube_id"] if name not in files and row["youtube_id"] in files else name


def something_v1(annotations: str, media: str) -> Prepared:
    """CSV `id;label` without a header and a CSV of labels, one a line; folders of frames ID/00001.jpg."""
    return _something(annotations, media, "v1", dict(_folders(media)))


def something_v2(annotations: str, media: str) -> Prepared:
    """JSON [{"id", "template", ...}] (or CSV as V1) and JSON {label: number}; files ID.webm."""
    return _something(annotations, media, "v2", _media(media, VIDEOS))


def _something(annotations: str, media: str, version: str, files: dict[str, str]) -> Prepared:
    result = Prepared({}, {}, _something_labels(annotations, version))
    for split, name in (("train", "train"), ("val", "validation")):
        stems = (f"something-something-{version}-{name}", name)
        path = _find(annotations, *(stem + ending for stem in stems for ending in (".json", ".csv")))
        if path.endswith(".json"):
            rows = _json(path)
            _need(rows, ("id", "template"), path)
            # Labels are templates without the brackets around their blanks.
            pairs = [(str(row["id"]), re.sub(r"[\[\]]", "", row["template"])) for row in rows]
        else:
            rows = [row for row in csv.reader(_lines(path), delimiter=";") if row]
            if wrong := [row for row in rows if len(row) != 2]:
                raise UserError(f"{path}: a line is not 'id;label': {';'.join(wrong[0])!r}")
            pairs = [(row[0], row[1]) for row in rows]
        _split(split, ((name, Entry("", label)) for name, label in pairs), files, result)
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
    """JSON [{"vid_name", "label", ...}] of V2, a JSON vocabulary of four phases per class; files NAME.mp4."""
    vocabulary = [" / ".join(phases) for phases in _json(_find(annotations, "Diving48_vocab.json"))]
    files, result = _media(media, VIDEOS), Prepared({}, {}, tuple(vocabulary))
    for split, name in (("train", "train"), ("val", "test")):
        path = _find(annotations, f"Diving48_V2_{name}.json")
        rows = _json(path)
        _need(rows, ("vid_name", "label"), path)
        if beyond := [row for row in rows if not 0 <= int(row["label"]) < len(vocabulary)]:
            raise UserError(f"{path}: {beyond[0]['vid_name']} has a label outside the vocabulary")
        pairs = ((row["vid_name"], Entry("", vocabulary[int(row["label"])])) for row in rows)
        _split(split, pairs, files, result)
    return result


def finegym(annotations: str, media: str, classes: int) -> Prepared:
    """Lists "VIDEO_E_START_END_A_START_END LABEL", categories "Clabel: N; ...; (XX) NAME", a JSON with times.

    Files are whole videos, VIDEO.mp4; a clip's times are those of its event plus those inside it.
    """
    lines = _lines(_find(annotations, f"gym{classes}_categories.txt"))
    matches = [re.match(r"Clabel:\s*(\d+);.*?(\([A-Z]+\).*)", line) for line in lines]
    numbered = {int(match[1]): match[2].strip() for match in matches if match}
    names = tuple(numbered[number] for number in sorted(numbered))
    if len(names) != classes:
        raise UserError(f"gym{classes}_categories.txt names {len(names)} classes")
    events = _json(_find(annotations, "finegym_annotation_info_v1.1.json"))
    files, result = _media(media, VIDEOS), Prepared({}, {}, names)
    for split in ("train", "val"):
        stems = (f"gym{classes}_{split}_element_v1.1.txt", f"gym{classes}_{split}_element.txt")
        path = _find(annotations, *stems)
        _split(split, _finegym_clips(path, events, names), files, result)
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
    """ILSVRC 2012: train/SYNSET/*.JPEG, and val either likewise or flat with LOC_val_solution.csv.

    Classes are synsets, sorted, which is the usual order of the 1000 classes.
    """
    result = Prepared({}, {}, ())
    result.splits["train"] = list(_class_folders(_image_folder(media, "train")))
    val = _image_folder(media, "val")
    result.splits["val"] = list(_class_folders(val))
    if not result.splits["val"]:
        rows = list(csv.DictReader(_lines(_find(annotations, "LOC_val_solution.csv"))))
        _need(rows, ("ImageId", "PredictionString"), "LOC_val_solution.csv")
        pairs = ((row["ImageId"], Entry("", row["PredictionString"].split()[0])) for row in rows)
        _split("val", pairs, _media(val, IMAGES), result)
    return result._replace(class_names=tuple(sorted({entry.label for entry in result.splits["train"]})))


def _class_folders(folder: str) -> Iterator[Entry]:
    for label in sorted(os.listdir(folder)):
        if os.path.isdir(os.path.join(folder, label)):
            for here, files in walk(os.path.abspath(os.path.join(folder, label))):
                yield from (
                    Entry(os.path.join(here, name), label) for name in files if name.lower().endswith(IMAGES)
                )


class DataSet(NamedTuple):
    """How a data set is read, and how many examples it is published to have."""

    read: Callable[[str, str], Prepared]
    published: dict[str, int]


DATA_SETS = {
    "kinetics400": DataSet(kinetics400, {"train": 240_436, "val": 19_796}),  # as mmaction2 counts its copy
    "something_v1": DataSet(something_v1, {"train": 86_017, "val": 11_522}),
    "something_v2": DataSet(something_v2, {"train": 168_913, "val": 24_777}),
    "diving48": DataSet(diving48, {"train": 15_027, "val": 1_970}),
    "finegym99": DataSet(lambda a, m: finegym(a, m, 99), {"train": 20_484, "val": 8_521}),
    "finegym288": DataSet(lambda a, m: finegym(a, m, 288), {}),
    "imagenet": DataSet(imagenet, {"train": 1_281_167, "val": 50_000}),
}


def _find(top: str, *names: str) -> str:
    """The file below `top` with the first of these names; of several the highest."""
    if not os.path.isdir(top):
        raise UserError(f"no folder {top!r}")
    found = [
        (rank, here.count(os.sep), os.path.join(here, name))
        for here, files in walk(top)
        for name in files
        for rank, wanted in enumerate(names)
        if name == wanted
    ]
    if not found:
        raise UserError(f"{top} has no file {' or '.join(names)}")
    return min(found)[2]


def _image_folder(top: str, name: str) -> str:
    """The folder of this name below `top` that has images in it; annotations have folders named alike."""
    if not os.path.isdir(top):
        raise UserError(f"no folder {top!r}")
    for here, _ in walk(top):
        folder = os.path.join(here, name)
        if os.path.isdir(folder) and any(_images_below(folder)):
            return folder
    raise UserError(f"{top} has no folder {name!r} with images in it")


def _images_below(folder: str) -> Iterator[str]:
    return (name for _, files in walk(folder) for name in files if name.lower().endswith(IMAGES))


def _media(top: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Name without its ending -> absolute path of every media file below `top`."""
    if not os.path.isdir(top):
        raise UserError(f"no folder {top!r}")
    return {
        os.path.splitext(name)[0]: os.path.join(here, name)
        for here, files in walk(os.path.abspath(top))
        for name in files
        if name.lower().endswith(endings)
    }


def _folders(top: str) -> Iterator[tuple[str, str]]:
    """Name and absolute path of every folder below `top` that holds images."""
    if not os.path.isdir(top):
        raise UserError(f"no folder {top!r}")
    return (
        (os.path.basename(here), here) for here, files in walk(os.path.abspath(top)) if frame_names(files)
    )


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read().splitlines()


def _json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return parse_json(file.read())
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from error


def _need(rows: list[Any], keys: tuple[str, ...], path: str) -> None:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or any(row.get(key) is None for key in keys):
            raise UserError(f"{path}: entry {number} lacks one of {', '.join(keys)}")
    if not rows:
        raise UserError(f"{path} is empty")

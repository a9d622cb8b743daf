"""Damaged and unusual lists of examples, class names and annotation files."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from attacks.case import Case, Result
from attacks.commands import IMAGE_FOLDER, case
from attacks.damage import Prepare, steps, text
from attacks.names import DEEP, NINES
from attacks.users import without_privileges

_case = functools.partial(case, "lists")

_GOOD = "".join(f"files/{name}/{n}.png,{name}\n" for name in ("one", "three", "two two") for n in range(4))
_ROW = "files/one/0.png,"
# Content of train.csv, and whether it can be used.
_LISTS: dict[str, tuple[str | bytes, bool | None]] = {
    "good": (_GOOD, True),
    "byte order mark": ("\ufeff" + _GOOD, True),
    "header and byte order mark": ("\ufeffpath,label\n" + _GOOD, True),
    "UTF-16": (_GOOD.encode("utf-16"), False),
    "Latin-1": (_GOOD.encode() + "train/caf\u00e9.png,one\n".encode("latin-1"), False),
    "NUL": (_GOOD.encode() + b"train/\0.png,one\n", None),
    "carriage returns": (_GOOD.replace("\n", "\r"), None),
    "empty": ("", False),
    "blank lines": ("\n\n\n", False),
    "header alone": ("path,label\n", False),
    "header of other columns": ("a,b\n1,2\n", None),
    "header twice": ("path,path,label,label\n" + _GOOD, None),
    "no label": ("files/one/0.png\n", False),
    "empty label": (_ROW + "\n", False),
    "label of 5,000 digits": (_GOOD + _ROW + NINES + "\n", None),
    "labels of 5,000 digits": (_ROW + NINES + "\n", None),
    "label of 20 digits": (_ROW + "9" * 20 + "\n" + _ROW + "0\n", None),
    "label that is a superscript": (_ROW + "\u00b2\n" + _ROW + "1\n", None),
    "label with escapes": (_GOOD + _ROW + "\x1b[31mred\x1b[0m\n", None),
    "label of a million letters": (_ROW + "x" * 10**6 + "\n", None),
    "quote that stays open": (_GOOD + 'files/one/0.png,"one\n' + _GOOD, None),
    "too many cells": (_ROW + "one,1,2,3,4,5\n", False),
    "start nan": (_ROW + "one,nan,nan\n", None),
    "start inf": (_ROW + "one,inf,inf\n", None),
    "start 1e400": (_ROW + "one,1e400,1e401\n", None),
    "start after end": (_ROW + "one,5,1\n", None),
    "start negative": (_ROW + "one,-5,-1\n", None),
    "start is text": (_ROW + "one,x,y\n", False),
    "path of a folder": (_GOOD + "files,one\n", None),
    "path of a device": (_GOOD + "/dev/zero,one\n", None),
    "path of this process": (_GOOD + "/proc/self/mem,one\n", None),
    "path of 5,000 letters": (_GOOD + "x" * 5000 + ".png,one\n", None),
    "path upwards": (_GOOD + "../../../../../../etc/passwd,one\n", None),
    "the same line twice": (_GOOD * 2, None),
    "noise": (random.Random(0).randbytes(5000), None),
}
_JSON_LISTS = {
    "good": "".join(
        '{{"path": "{}", "label": "{}"}}\n'.format(*line.split(",")) for line in _GOOD.split("\n")[:-1]
    ),
    "nested": DEEP,
    "nested objects": '{"a":' * 100_000,
    "a list": "[1, 2]\n",
    "a number": "5\n",
    "a number of 5,000 digits": f'{{"path": "files/one/0.png", "label": {NINES}}}\n',
    "NaN": '{"path": "files/one/0.png", "label": "one", "start": NaN}\n',
    "path is a list": '{"path": ["x"], "label": "one"}\n',
    "label is an object": '{"path": "files/one/0.png", "label": {"a": 1}}\n',
    "surrogate": '{"path": "train/\\ud800.png", "label": "\\ud800"}\n',
    "NUL": '{"path": "train/\\u0000.png", "label": "one"}\n',
    "start is a list": '{"path": "files/one/0.png", "label": "one", "start": [1]}\n',
    "start is true": '{"path": "files/one/0.png", "label": "one", "start": true}\n',
    "UTF-16": '{"path": "x"}'.encode("utf-16"),
    "half a line": '{"path": "files/one/0.pn',
}
# Content of labels.txt.
_LABELS: dict[str, tuple[str | bytes, bool | None]] = {
    "good": ("one\nthree\ntwo two\n", True),
    "byte order mark": ("\ufeffone\nthree\ntwo two\n", True),
    "Windows": ("one\r\nthree\r\ntwo two\r\n", True),
    "UTF-16": ("one\nthree\ntwo two\n".encode("utf-16"), False),
    "Latin-1": ("one\nthree\ntwo two\ncaf\u00e9\n".encode("latin-1"), False),
    "NUL": ("one\nthree\ntwo two\n\0\n", None),
    "noise": (random.Random(1).randbytes(1000), False),
    "empty": ("", None),
    "twice": ("one\none\nthree\ntwo two\n", False),
    "others": ("a\nb\n", False),
    "escapes": ("one\nthree\ntwo two\n\x1b[31m\n", None),
    "a million": ("one\nthree\ntwo two\n" + "".join(f"{n}\n" for n in range(10**6)), None),
}
# Things that replace a file.
THINGS: dict[str, Prepare] = {
    "a folder": lambda at, _: at.mkdir(),
    "a fifo": lambda at, _: os.mkfifo(at),
    "a device": lambda at, _: at.symlink_to("/dev/zero"),
    "a link to itself": lambda at, _: at.symlink_to(at.name),
    "a link to nothing": lambda at, _: at.symlink_to("nowhere"),
    "not readable": lambda at, _: (at.write_text("x"), at.chmod(0)),
}


# Exit codes of `prepare --check` and of `show` for usable data, unusable data, and either (None). `show` does
# not survey the data.
_CHECK = {True: (0,), False: (1, 2), None: (0, 1, 2)}
_SHOW = {True: (0,), False: (0, 2), None: (0, 2)}


def cases() -> Iterator[Case]:
    lists = [("train.csv", *row) for row in ((name, *value) for name, value in _LISTS.items())]
    lists += [("train.jsonl", name, content, None) for name, content in _JSON_LISTS.items()]
    for file, name, content, usable in lists:
        prepare = steps(_without_folders, text(f"images/{file}", content))
        yield from _commands(file, name, prepare, usable)
    for name, (labels, usable) in _LABELS.items():
        yield from _on_labels(name, text("images/labels.txt", labels), usable)
    for name, make in THINGS.items():
        put = functools.partial(_make, make, "train.csv")
        yield from _commands("train.csv", name, steps(_without_folders, put), None, first=without_privileges)
        put = functools.partial(_make, make, "labels.txt")
        yield from _commands("labels.txt", name, put, None, first=without_privileges)
    yield from _annotations()


def _on_labels(name: str, prepare: Prepare, usable: bool | None) -> Iterator[Case]:
    yield from _commands("labels.txt", name, prepare, usable)
    if usable:
        yield _case(
            f"labels.txt, {name}: rewritten",
            "prepare folder",
            "<here>/images",
            "--images",
            "--out=<here>/out",
            codes=(0,),
            copies=("images",),
            prepare=prepare,
            check=_same_names,
        )


def _commands(
    file: str, name: str, prepare: Prepare, usable: bool | None, first: Callable[[], None] | None = None
) -> Iterator[Case]:
    """Attack the commands that read the lists of a data set."""
    options = {"copies": ("images",), "prepare": prepare, "first": first, "seconds": 30}
    check = ("<here>/images", "--check", "--images", "--workers=1")
    yield _case(f"{file}, {name}: check", "prepare folder", *check, codes=_CHECK[usable], **options)
    show = (IMAGE_FOLDER[0], "--config.data.root=<here>/images")
    yield _case(f"{file}, {name}: show", "show", *show, codes=_SHOW[usable], **options)


def _without_folders(here: Path, chance: random.Random) -> None:
    """Rename the folder of the training split, so that a list replaces it."""
    del chance
    (here / "images" / "train").rename(here / "images" / "files")


def _make(make: Prepare, file: str, here: Path, chance: random.Random) -> None:
    make(here / "images" / file, chance)


def _same_names(here: Path, result: Result) -> str:
    names = (here / "out" / "labels.txt").read_text().splitlines() if result.code == 0 else []
    return "" if names in ([], ["one", "three", "two two"]) else f"classes are now {names}"


_K400 = "label,youtube_id,time_start,time_end,split\n"
_GYM = "".join(f"Clabel: {n}; set: 1; ; (VT) name {n}\n" for n in range(99))
# Annotations of published data sets: name, files by path.
_ANNOTATIONS: tuple[tuple[str, dict[str, str | bytes]], ...] = (
    ("kinetics400", {"train.csv": _K400, "val.csv": _K400}),
    ("kinetics400", {"train.csv": b"\xff\xfe\0", "val.csv": b"\xff"}),
    ("kinetics400", {"train.csv": f"{_K400}x,y,z,w,v\n", "val.csv": f"{_K400}x,y,nan,inf,v\n"}),
    ("kinetics400", {"train.csv": f"{_K400}x,y,{NINES},1e400,v\n", "val.csv": f"{_K400}x\n"}),
    ("kinetics400", {"train.csv": "x" * 200_000 + "\n", "val.csv": "\0"}),
    ("something_v1", {"labels.csv": b"\xff", "train.csv": b"\0", "validation.csv": ""}),
    ("something_v1", {"labels.csv": "a\nb\n", "train.csv": "x;y;z\n", "validation.csv": "1;a\n"}),
    ("something_v2", {"labels.json": DEEP, "train.json": DEEP, "validation.json": DEEP}),
    ("something_v2", {"labels.json": "[1]", "train.json": "[1]", "validation.json": "[1]"}),
    ("something_v2", {"labels.json": '{"a": "x"}', "train.json": "[]", "validation.json": "[]"}),
    ("something_v2", {"labels.json": '{"a": "1"}', "train.json": '[{"id": 1, "template": 5}]'}),
    ("diving48", {"Diving48_vocab.json": DEEP}),
    ("diving48", {"Diving48_vocab.json": "5"}),
    ("diving48", {"Diving48_vocab.json": "[5]"}),
    (
        "diving48",
        {"Diving48_vocab.json": '[["a"]]', "Diving48_V2_train.json": '[{"vid_name": 1, "label": "x"}]'},
    ),
    ("finegym99", {"gym99_categories.txt": b"\xff"}),
    ("finegym99", {"gym99_categories.txt": f"Clabel: {NINES}; (VT) x\n"}),
    ("finegym99", {"gym99_categories.txt": _GYM, "finegym_annotation_info_v1.1.json": DEEP}),
    (
        "finegym99",
        {
            "gym99_categories.txt": _GYM,
            "finegym_annotation_info_v1.1.json": "[]",
            "gym99_train_element.txt": f"x_E_1_1_A_1_1 {NINES}\n",
        },
    ),
    ("imagenet", {"train/x/y.txt": "", "LOC_val_solution.csv": b"\xff"}),
    ("nonsense", {"x": ""}),
)


def _annotations() -> Iterator[Case]:
    for number, (name, files) in enumerate(_ANNOTATIONS):
        prepare = steps(*(text(f"annotations/{path}", content) for path, content in files.items()))
        yield _case(
            f"annotations of {name}, {number}",
            f"prepare {name}",
            "<here>/annotations",
            "<clips>",
            "--out=<here>/out",
            prepare=prepare,
        )
    yield _case(
        "annotations that are missing", "prepare kinetics400", "<here>/missing", "<clips>", "--out=<here>/out"
    )

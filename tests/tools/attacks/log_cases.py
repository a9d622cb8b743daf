"""Damaged files in a workdir, which a run resumes from and a report reads."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attacks.case import Case
from attacks.commands import IMAGE_FOLDER, case, shown, train
from attacks.damage import DELETED, Prepare, change, edit_json, folder, remove, steps, text
from attacks.names import DEEP, TRAP

_case = functools.partial(case, "logs")
_train = functools.partial(train, "logs")

# Files in a workdir, and contents that replace them.
_TEXT_FILES = (
    "metrics.jsonl",
    "goodput.json",
    "skipped.jsonl",
    "unreadable.tsv",
    "result.json",
    "config.json",
    "lock.json",
    "predictions.npz",
)
_CONTENTS: dict[str, str | bytes] = {
    "empty": "",
    "not UTF-8": b"\xff\xfe\n",
    "NUL": "\0",
    "list": "[]\n",
    "nested": DEEP,
    "5,000 digits": '{"step": ' + "9" * 5000 + "}\n",
    "1e400": '{"step": 1e400}\n',
    "escapes": "train\tx\x1b[31m\tred\n",
}
_GOODPUT: tuple[Any, ...] = (
    {"seconds": 5},
    {"seconds": {"step": "x"}},
    {"seconds": {"step": None}},
    {"seconds": {"step": math.nan}},
    {"seconds": {"nonsense": 5.0}},
    {"seconds": {"step": -1e308, "input": 1e308}},
    {"seconds": []},
    {"sessions": "x"},
    {"sessions": None},
    {"at_save": 5},
    {"at_save": {"x": 5}},
    {"at_save": {"2": "x"}},
    {"at_save": []},
    {"at_save": {"-1": 1.0}},
    {"seconds": {"step": [1]}},
)
_METRICS = (
    '{"step": -1}',
    '{"step": 1e308}',
    '{"step": 1, "loss": "x"}',
    '{"step": 1, "loss": NaN}',
    '{"step": 1, "loss": Infinity}',
    '{"step": true}',
    '{"step": 3, "loss": 1}\n{"step": 3, "loss": 2}',
    '{"step": 99999999999999999999, "loss": 1}',
    '{"loss": 1}',
    '{"step": null}',
)
_LOCKS: tuple[Any, ...] = (
    {"pid": "x"},
    {"pid": -1},
    {"pid": 1},
    {"pid": 10**30},
    {"pid": []},
    {"born": 5},
    {"token": None},
    {"pid": "../self", "born": "1"},
)


def cases() -> Iterator[Case]:
    for start, file in enumerate(_TEXT_FILES):
        for name, content in list(_CONTENTS.items())[start % 2 :: 2]:
            yield from _resume_and_report(f"{file} {name}", text(f"image_run/{file}", content), file)
        yield from _resume_and_report(f"{file} a folder", folder(f"image_run/{file}"), file)
    for turn, value in enumerate(_GOODPUT):
        name = f"goodput.json {shown(value)}"
        yield (_resume, _report)[turn % 2](name, text("image_run/goodput.json", json.dumps(value)))
    for turn, line in enumerate(_METRICS):
        name = f"metrics.jsonl {line!r}"
        yield (_resume, _report)[turn % 2](name, text("image_run/metrics.jsonl", line + "\n"))
    for value in _LOCKS:
        prepare = _lock(value)
        yield _resume(f"lock.json {shown(value)}", prepare, codes=(0, 2, 75))
    for key, value in (("train", 5), ("model.name", 5), ("data.size", "x"), ("model", DELETED), ("data", [])):
        prepare = edit_json("image_run/config.json", key, value)
        yield from _resume_and_report(f"config.json with {key} {shown(value)}", prepare, "")
    for name, arrays in _predictions().items():
        prepare = functools.partial(_save_predictions, arrays)
        yield _case(
            f"report with predictions of {name}",
            "report",
            "<here>/image_run",
            "--out=<here>/out.html",
            copies=("image_run",),
            prepare=prepare,
            codes=(0, 2),
            megabytes=800,
        )
    for way in ("cut_50", "flip_10", "zero_middle", "noise"):
        yield _report(f"predictions.npz {way}", change("image_run/predictions.npz", way))


def _resume_and_report(name: str, prepare: Prepare, file: str) -> Iterator[Case]:
    if file != "predictions.npz":
        yield _resume(name, prepare)
    if file not in ("lock.json", "skipped.jsonl", "unreadable.tsv"):
        yield _report(name, prepare)


def _resume(name: str, prepare: Prepare, codes: tuple[int, ...] = (0, 2)) -> Case:
    """Resume a run without its latest checkpoint, so that it reads the logs of removed steps."""
    rewound = steps(remove("image_run/checkpoints/4"), prepare)
    return _train(
        f"resume with {name}",
        "--config.data.root=<images>",
        "--workdir=<here>/image_run",
        config=IMAGE_FOLDER[0],
        copies=("image_run",),
        prepare=rewound,
        codes=codes,
        seconds=100,
    )


def _report(name: str, prepare: Prepare) -> Case:
    return _case(
        f"report with {name}",
        "report",
        "<here>/image_run",
        "--out=<here>/out.html",
        copies=("image_run",),
        prepare=prepare,
        codes=(0, 2),
    )


def _lock(changes: dict[str, Any]) -> Prepare:
    """Write the lock of a dead process of this machine, with some values changed."""

    def prepare(here: Path, chance: random.Random) -> None:
        from structvit_jax.runtime.lock import WorkdirLock

        owner = WorkdirLock(here / "image_run")._owner | {"pid": 2**22, "born": "1", "token": "x", "beat": 1}
        text("image_run/lock.json", json.dumps(owner | changes))(here, chance)

    return prepare


def _predictions() -> dict[str, dict[str, Any]]:
    """Return changes of the arrays in predictions.npz."""
    few = np.array([f"class {number}" for number in range(10_000)])
    return {
        "10,000 classes": {
            "ids": np.array([f"val/{n}.png" for n in range(20)]),
            "labels": np.arange(20),
            "scores": np.zeros((20, 10_000), np.float32),
            "class_names": few,
        },
        "labels beyond": {"labels": np.array([0, 1, 2, 99, 0, 1])},
        "labels below": {"labels": np.array([0, 1, 2, -99, 0, 1])},
        "labels that are floats": {"labels": np.full(6, math.nan)},
        "scores of another shape": {"scores": np.zeros((2, 2, 2), np.float32)},
        "scores of nothing": {"scores": np.zeros((0, 0), np.float32)},
        "scores of NaN": {"scores": np.full((6, 3), math.nan, np.float32)},
        "scores of infinity": {"scores": np.full((6, 3), math.inf, np.float32)},
        "scores of text": {"scores": np.full((6, 3), "x")},
        "objects": {"ids": np.array([{"a": 1}] * 6, dtype=object)},
        "ids upwards": {"ids": np.array(["../../../../etc/passwd"] * 6)},
        "names with markup": {"class_names": np.array([TRAP, "b\x1b[31m", "c"])},
        "nothing": dict.fromkeys(("ids", "labels", "scores", "class_names"), np.zeros(0)),
    }


def _save_predictions(changes: dict[str, Any], here: Path, chance: random.Random) -> None:
    del chance
    path = here / "image_run" / "predictions.npz"
    with np.load(path, allow_pickle=False) as found:
        arrays = dict(found)
    np.savez(path, **(arrays | changes))

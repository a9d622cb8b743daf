"""What a run leaves, and what is loaded from elsewhere: checkpoints, logs, label maps, shards, compiled code."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attacks.case import Case, Result
from attacks.commands import DIGITS, IMAGE, IMAGE_FOLDER, case, main, nothing_executed
from attacks.damage import (
    DELETED,
    Prepare,
    change,
    damaged,
    edit_json,
    folder,
    remove,
    sign,
    steps,
    text,
)
from attacks.users import without_privileges

_STEP = "image_run/checkpoints/4"
_CARD = f"{_STEP}/card/metadata"
_DEEP = "[" * 100_000
_LONG = "x" * 5000
_TRAP = "<script>alert(1)</script><!--<script>"
_MANY = tuple(str(number) for number in range(10**5))
_NAN, _INF = float("nan"), float("inf")

# What a card that was signed again says: key, value, exit codes of `predict`.
_CARDS: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("config", DELETED, (2,)), ("config", {}, (2,)), ("config", [], (2,)), ("config", "x", (2,)),
    ("config", None, (2,)), ("config", 5, (2,)), ("class_names", DELETED, (0, 2)), ("class_names", None, (0, 2)),
    ("class_names", [], (0, 2)), ("class_names", 5, (2,)), ("class_names", "abc", (0, 2)),
    ("class_names", {"a": 1}, (2,)), ("class_names", [1, 2, 3], (0, 2)), ("class_names", ["a"], (2,)),
    ("class_names", ["a", "a", "a"], (0, 2)), ("class_names", [None, [], {}], (0, 2)), ("class_names", _MANY, (2,)),
    ("class_names", ["a\x1b[31m", "b\nc", "d\x07"], (0, 2)), ("class_names", ["\ud800", "b", "c"], (0, 2)),
    ("class_names", [_TRAP, "b", "c"], (0, 2)), ("class_names", [_LONG, "b", "c"], (0, 2)),
    ("config.model", DELETED, (2,)), ("config.model", [], (2,)), ("config.model", 5, (2,)),
    ("config.model.name", DELETED, (2,)), ("config.model.name", 5, (2,)), ("config.model.name", "", (2,)),
    ("config.model.name", "nonsense", (2,)), ("config.model.name", _LONG, (2,)),
    ("config.model.name", "structvit_tiny_4_1", (2,)), ("config.model.widths", "x", (2,)),
    ("config.model.widths", [], (2,)), ("config.model.widths", [1e9], (2,)), ("config.model.widths", [-1], (2,)),
    ("config.model.widths", [_NAN], (2,)), ("config.model.widths", [[16]], (2,)), ("config.model.widths", 16, (2,)),
    ("config.model.widths", ["16"], (2,)), ("config.model.widths", [10**9], (2,)), ("config.model.depths", [0], (2,)),
    ("config.model.depths", [10**6], (2,)), ("config.model.remat", "full", (0, 2)), ("config.model.dtype", "x", (2,)),
    ("config.model.structure_dim", 10**9, (2,)), ("config.model.drop_path", 5, (0, 2)),
    ("config.data", DELETED, (2,)), ("config.data", 5, (2,)), ("config.data.size", DELETED, (0, 2)),
    ("config.data.size", "x", (2,)), ("config.data.size", 0, (2,)), ("config.data.size", -1, (2,)),
    ("config.data.size", 10**6, (2,)), ("config.data.size", 10**12, (2,)), ("config.data.size", 1e39, (2,)),
    ("config.data.size", None, (2,)), ("config.data.size", 24.0, (0, 2)), ("config.data.size", True, (2,)),
    ("config.data.size", [24], (2,)), ("config.data.mean", "x", (2,)), ("config.data.mean", [], (2,)),
    ("config.data.mean", ["x"] * 3, (2,)), ("config.data.mean", [_NAN] * 3, (2,)), ("config.data.mean", 5, (2,)),
    ("config.data.mean", [[1]] * 3, (2,)), ("config.data.std", [0, 0, 0], (2,)), ("config.data.std", [1e-39] * 3, (0, 2)),
    ("config.data.std", [-1] * 3, (2,)), ("config.data.frames", 8, (2,)), ("config.data.frames", 10**9, (2,)),
    ("config.data.frames", -1, (2,)), ("config.data.channels", "xyz", (2,)), ("config.data.channels", 5, (2,)),
    ("config.data.test_clips", 10**9, (2,)), ("config.data.test_crops", 3, (0, 2)), ("config.data.test_crops", 2, (2,)),
    ("config.data.short_side", 10**9, (0, 2)), ("config.data.crop_fraction", 0, (2,)),
    ("config.data.crop_fraction", 1e-12, (2,)), ("config.data.sampling", "nonsense", (0, 2)),
    ("config.data.name", "nonsense", (0, 2)), ("config.data.root", 5, (0, 2)), ("config.data.root", "/etc", (0, 2)),
    ("config.data.root", "\0", (0, 2)), ("config.data.label_maps", "/etc", (0, 2)),
    ("config.data.workers", 1000, (0, 2)), ("config.data.workers", "x", (0, 2)), ("config.data.workers", -1, (0, 2)),
    ("config.eval.batch_size", 10**12, (0, 2)), ("config.eval.batch_size", 0, (2,)),
    ("config.eval.batch_size", "x", (2,)), ("config.eval.average", "nonsense", (2,)), ("config.eval.average", 5, (2,)),
    ("config.eval.ema", "x", (0, 2)), ("config.train.seed", _INF, (0, 2)), ("config.train.seed", -1, (0, 2)),
    ("config.train.duration", 5, (0, 2)), ("config.mesh.device", "gpu", (0, 2)), ("config.mesh.device", 5, (0, 2)),
    ("config.mesh.data", 7, (0, 2)), ("config.mesh.fsdp", 10**9, (0, 2)), ("config.mesh.heartbeat", -1, (0, 2)),
    ("config.mesh.compilation_cache", 5, (0, 2)), ("config.init_from", "/etc/passwd", (0, 2)),
    ("config.profile", "0:1", (0, 2)), ("config.topologies", ["v5e:2x4"], (0, 2)), ("config.nonsense", {"a": 1}, (0, 2)),
    ("config.augment", 5, (0, 2)), ("config.optimizer.freeze", 5, (0, 2)), ("version", 5, (0, 2)),
    ("version", "999.0", (0, 2)), ("metrics", "x", (0, 2)), ("metrics", {"top1": "x"}, (0, 2)),
)  # fmt: skip
_CARD_TEXTS: dict[str, str | bytes] = {
    "empty": "", "null": "null", "list": "[]", "number": "5", "nested": _DEEP, "not UTF-8": b"\xff\xfe{}",
    "byte order mark": "\ufeff{}", "NUL": "\0", "half": '{"class_names": ["a"', "1e400": '{"config": 1e400}',
    "5,000 digits": '{"config": ' + "9" * 5000 + "}", "keys twice": '{"config": {}, "config": 5}',
}  # fmt: skip
_READERS = {  # commands that read a card, besides predict
    "evaluate": ("<here>/image_run",),
    "explain": ("--checkpoint=<here>/image_run", IMAGE, "--out=<here>/out"),
    "export": ("--checkpoint=<here>/image_run", "<here>/out.jax", "--platforms=cpu"),
    "convert": ("<here>/image_run", "<here>/out"),
    "report": ("<here>/image_run", "--out=<here>/out.html"),
}
_EVERY_READER = (  # of these edits
    ("config", DELETED), ("class_names", None), ("class_names", 5), ("class_names", [_TRAP, "b", "c"]),
    ("class_names", ["a\x1b[31m", "b\nc", "\ud800"]), ("config.model.name", 5), ("config.data.size", "x"),
    ("config.data.size", 10**9), ("config.mesh.device", "tpu"), ("config.data.workers", "x"),
)  # fmt: skip


def cases() -> Iterator[Case]:
    yield from _cards()
    yield from _checkpoint_files()
    yield from _logs()
    yield from _label_maps()
    yield from _shards()
    yield from _native()


def _signed(*prepares: Prepare) -> Prepare:
    return steps(*prepares, sign(_STEP))


def _predict(name: str, prepare: Prepare, **options: Any) -> Case:
    return case("cards" if "card" in name else "checkpoints", f"predict by {name}", "predict",
                "--checkpoint=<here>/image_run", IMAGE, copies=("image_run",), prepare=prepare, **options)  # fmt: skip


def _cards() -> Iterator[Case]:
    for key, value, codes in _CARDS:
        name = f"a card with {key} {_told(value)}"
        yield _predict(name, _signed(edit_json(_CARD, key, value)), codes=codes, seconds=40)
    for name, content in _CARD_TEXTS.items():
        yield _predict(f"a card of {name}", _signed(text(_CARD, content)))
    for command, arguments in _READERS.items():
        for key, value in _EVERY_READER:
            prepare = _signed(edit_json(_CARD, key, value), edit_config(key, value))
            yield case("cards", f"{command} by a card with {key} {_told(value)}", command, *arguments,
                       copies=("image_run",), prepare=prepare, codes=(0, 2), check=_no_trap, seconds=40)  # fmt: skip
    cache = _signed(_cache_in_card)
    for command, arguments in {"predict": ("--checkpoint=<here>/image_run", IMAGE), **_READERS}.items():
        yield case("cards", f"{command} by a card that names a cache of programs", command, *arguments,
                   copies=("image_run",), prepare=cache, check=_cache_unused, codes=(0, 2))  # fmt: skip
    yield main("cards", "start from a card of no class names", "--config.data.root=<images>",
               "--config.init_from=<here>/image_run", config=IMAGE_FOLDER[0], copies=("image_run",),
               prepare=_signed(edit_json(_CARD, "class_names", DELETED)), codes=(0, 2))  # fmt: skip
    for key, value in (("config", 5), ("config.model.name", 5), ("class_names", 5), ("config.data", DELETED)):
        yield main("cards", f"resume from a card with {key} {_told(value)}", "--config.data.root=<images>",
                   "--config.train.duration=6 steps", "--workdir=<here>/image_run", config=IMAGE_FOLDER[0],
                   copies=("image_run",), prepare=_signed(edit_json(_CARD, key, value)), codes=(0, 2))  # fmt: skip


def edit_config(key: str, value: Any) -> Prepare:
    """The same edit of the run's config.json, where it has the key."""

    def prepare(here: Path, chance: random.Random) -> None:
        if key.startswith("config."):
            edit_json("image_run/config.json", key.removeprefix("config."), value)(here, chance)

    return prepare


def _cache_in_card(here: Path, chance: random.Random) -> None:
    edit_json(_CARD, "config.mesh.compilation_cache", str(here / "foreign_cache"))(here, chance)


def _cache_unused(here: Path, result: Result) -> str:
    del result
    return "the card's folder was used for compiled programs" if (here / "foreign_cache").exists() else ""


def _no_trap(here: Path, result: Result) -> str:
    """No page holds a class name that its parser would take for markup."""
    del result
    pages = [*here.glob("out/*.html"), *here.glob("out*.html")]
    wrong = [path.name for path in pages if re.search(r"<!--<script>|<script>alert", path.read_text())]
    return f"{wrong[0]} holds a class name unescaped" if wrong else ""


def _told(value: Any) -> str:
    if value is DELETED:
        return "deleted"
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:20]}... ({len(shown)})"


# Files of a checkpoint, as patterns, each damaged in these ways, as they are and signed again.
_FILES = (
    "sha256.json", "_CHECKPOINT_METADATA", "card/metadata", "card/commit_success.txt", "weights/_METADATA",
    "weights/_sharding", "weights/manifest.ocdbt", "weights/d/*", "weights/ocdbt.process_0/manifest.ocdbt",
    "weights/ocdbt.process_0/d/*", "optimizer/_METADATA", "optimizer/manifest.ocdbt", "metrics/metrics",
)  # fmt: skip
_WAYS = ("empty", "cut_50", "flip_1", "zero_middle", "noise")


def _checkpoint_files() -> Iterator[Case]:
    for file in _FILES:
        for way in _WAYS:
            if file == "metrics/metrics":
                continue
            where = f"{_STEP}/{file}"
            name = f"{file} {way}"
            # An older checkpoint takes the place of one that is damaged.
            yield _predict(name, change(where, way), codes=(0, 2))
            if file != "sha256.json":
                yield _predict(f"{name}, signed", _signed(change(where, way)), codes=(0, 2))
        yield _predict(f"{file} missing", remove(f"{_STEP}/{file}"), codes=(0, 2))
        yield _predict(f"{file} a folder", folder(f"{_STEP}/{file.replace('*', 'x')}"), codes=(0, 2))
    both = steps(*(change(f"image_run/checkpoints/{step}/weights/_METADATA", "flip_1") for step in (2, 4)))
    yield _predict("both checkpoints damaged", both)
    both = steps(*(text(f"image_run/checkpoints/{step}/sha256.json", "[]") for step in (2, 4)))
    yield _predict("digests that are a list", both)
    for value in (5, None, [], {"a": 5}, _DEEP):
        one = text(f"{_STEP}/sha256.json", value if isinstance(value, str) else json.dumps(value))
        yield _predict(f"digests {_told(value)}", one, codes=(0, 2))
    upwards = json.dumps({"../../../../../../../../etc/passwd": "0" * 64})
    yield _predict("digests of a file elsewhere", text(f"{_STEP}/sha256.json", upwards), codes=(0, 2))
    nested = text(f"{_STEP}/weights/_METADATA", _DEEP)
    yield _predict("weights/_METADATA nested, signed", _signed(nested), codes=(2,))
    yield _predict(
        "a checkpoint of superscript two", text("image_run/checkpoints/\u00b2/x", ""), codes=(0, 2)
    )
    yield _predict("a checkpoint of 4,000 digits", folder("image_run/checkpoints/" + "9" * 200), codes=(0, 2))
    yield _predict("a file for a checkpoint", text("image_run/checkpoints/99", ""), codes=(0, 2))
    file = steps(remove("image_run/checkpoints"), text("image_run/checkpoints", "x"))
    yield _predict("a file for all checkpoints", file)
    link = steps(remove("image_run/checkpoints"), _link_to_itself)
    yield _predict("a link to itself for all checkpoints", link)
    yield main("checkpoints", "train where checkpoints is a file", prepare=text("run/checkpoints", "x"))
    closed = _close
    yield _predict("the newest checkpoint is not readable", closed, first=without_privileges, codes=(2,))
    yield main("checkpoints", "resume where the newest is not readable", "--config.data.root=<images>",
               "--config.train.duration=6 steps", "--workdir=<here>/image_run", config=IMAGE_FOLDER[0],
               copies=("image_run",), prepare=closed, first=without_privileges)  # fmt: skip


def _link_to_itself(here: Path, chance: random.Random) -> None:
    del chance
    (here / "image_run/checkpoints").symlink_to("checkpoints")


def _close(here: Path, chance: random.Random) -> None:
    """Takes read permission from the newest checkpoint."""
    del chance
    (here / _STEP).chmod(0)


# Files in a workdir, and what they are replaced by.
_TEXT_FILES = ("metrics.jsonl", "goodput.json", "skipped.jsonl", "unreadable.tsv", "result.json", "config.json",
               "lock.json", "predictions.npz")  # fmt: skip
_CONTENTS: dict[str, str | bytes] = {
    "empty": "", "not UTF-8": b"\xff\xfe\n", "NUL": "\0", "null": "null\n", "list": "[]\n", "number": "5\n",
    "string": '"x"\n', "nested": _DEEP, "half": '{"step": 1, "lo', "5,000 digits": '{"step": ' + "9" * 5000 + "}\n",
    "1e400": '{"step": 1e400}\n', "a tab": "\t\n", "escapes": "train\tx\x1b[31m\tred\n",
}  # fmt: skip
_GOODPUT: tuple[Any, ...] = (
    {"seconds": 5}, {"seconds": {"step": "x"}}, {"seconds": {"step": None}}, {"seconds": {"step": _NAN}},
    {"seconds": {"nonsense": 5.0}}, {"seconds": {"step": -1e308, "input": 1e308}}, {"seconds": []},
    {"sessions": "x"}, {"sessions": None}, {"at_save": 5}, {"at_save": {"x": 5}}, {"at_save": {"2": "x"}},
    {"at_save": []}, {"at_save": {"-1": 1.0}}, {"seconds": {"step": [1]}},
)  # fmt: skip
_METRICS = ('{"step": -1}', '{"step": 1e308}', '{"step": 1, "loss": "x"}', '{"step": 1, "loss": NaN}',
            '{"step": 1, "loss": Infinity}', '{"step": true}', '{"step": 3, "loss": 1}\n{"step": 3, "loss": 2}',
            '{"step": 99999999999999999999, "loss": 1}', '{"loss": 1}', '{"step": null}')  # fmt: skip
_LOCKS: tuple[Any, ...] = (
    {"pid": "x"}, {"pid": -1}, {"pid": 1}, {"pid": 10**30}, {"pid": []}, {"born": 5}, {"token": None},
    {"pid": "../self", "born": "1"},
)  # fmt: skip


def _logs() -> Iterator[Case]:
    for file in _TEXT_FILES:
        for name, content in _CONTENTS.items():
            yield from _resume_and_report(f"{file} {name}", text(f"image_run/{file}", content), file)
        yield from _resume_and_report(f"{file} a folder", folder(f"image_run/{file}"), file)
    for value in _GOODPUT:
        prepare = text("image_run/goodput.json", json.dumps(value))
        yield from _resume_and_report(f"goodput.json {_told(value)}", prepare, "goodput.json")
    for line in _METRICS:
        yield from _resume_and_report(
            f"metrics.jsonl {line!r}", text("image_run/metrics.jsonl", line + "\n"), ""
        )
    for value in _LOCKS:
        prepare = _lock(value)
        yield _resume(f"lock.json {_told(value)}", prepare, codes=(0, 2, 75))
    for key, value in (("train", 5), ("model.name", 5), ("data.size", "x"), ("model", DELETED), ("data", [])):
        prepare = edit_json("image_run/config.json", key, value)
        yield from _resume_and_report(f"config.json with {key} {_told(value)}", prepare, "")
    for name, arrays in _predictions().items():
        prepare = functools.partial(_save_predictions, arrays)
        yield case("logs", f"report with predictions of {name}", "report", "<here>/image_run",
                   "--out=<here>/out.html", copies=("image_run",), prepare=prepare, codes=(0, 2))  # fmt: skip
    for way in ("cut_50", "flip_10", "zero_middle", "noise"):
        yield _report(f"predictions.npz {way}", change("image_run/predictions.npz", way))


def _resume_and_report(name: str, prepare: Prepare, file: str) -> Iterator[Case]:
    if file != "predictions.npz":
        yield _resume(name, prepare)
    if file not in ("lock.json", "skipped.jsonl", "unreadable.tsv"):
        yield _report(name, prepare)


def _resume(name: str, prepare: Prepare, codes: tuple[int, ...] = (0, 2)) -> Case:
    """A run of which the later checkpoint is not there, so that it has to read what it wrote before."""
    rewound = steps(remove("image_run/checkpoints/4"), prepare)
    return main("logs", f"resume with {name}", "--config.data.root=<images>", "--workdir=<here>/image_run",
                config=IMAGE_FOLDER[0], copies=("image_run",), prepare=rewound, codes=codes, seconds=100)  # fmt: skip


def _report(name: str, prepare: Prepare) -> Case:
    return case("logs", f"report with {name}", "report", "<here>/image_run", "--out=<here>/out.html",
                copies=("image_run",), prepare=prepare, codes=(0, 2))  # fmt: skip


def _lock(changes: dict[str, Any]) -> Prepare:
    """A lock of a process of this machine that is gone, with odd values."""

    def prepare(here: Path, chance: random.Random) -> None:
        from structvit_jax.training.lock import WorkdirLock

        owner = WorkdirLock(here / "image_run")._owner | {"pid": 2**22, "born": "1", "token": "x", "beat": 1}
        text("image_run/lock.json", json.dumps(owner | changes))(here, chance)

    return prepare


def _predictions() -> dict[str, dict[str, Any]]:
    """Arrays of predictions.npz that are changed."""
    few = np.array([f"class {number}" for number in range(10_000)])
    return {
        "10,000 classes": {
            "ids": np.array([f"val/{n}.png" for n in range(20)]), "labels": np.arange(20),
            "scores": np.zeros((20, 10_000), np.float32), "class_names": few,
        },
        "labels beyond": {"labels": np.array([0, 1, 2, 99, 0, 1])},
        "labels below": {"labels": np.array([0, 1, 2, -99, 0, 1])},
        "labels that are floats": {"labels": np.full(6, _NAN)},
        "scores of another shape": {"scores": np.zeros((2, 2, 2), np.float32)},
        "scores of nothing": {"scores": np.zeros((0, 0), np.float32)},
        "scores of NaN": {"scores": np.full((6, 3), _NAN, np.float32)},
        "scores of infinity": {"scores": np.full((6, 3), _INF, np.float32)},
        "scores of text": {"scores": np.full((6, 3), "x")},
        "objects": {"ids": np.array([{"a": 1}] * 6, dtype=object)},
        "ids upwards": {"ids": np.array(["../../../../etc/passwd"] * 6)},
        "names with markup": {"class_names": np.array([_TRAP, "b\x1b[31m", "c"])},
        "nothing": dict.fromkeys(("ids", "labels", "scores", "class_names"), np.zeros(0)),
    }  # fmt: skip


def _save_predictions(changes: dict[str, Any], here: Path, chance: random.Random) -> None:
    del chance
    path = here / "image_run" / "predictions.npz"
    with np.load(path, allow_pickle=False) as found:
        arrays = dict(found)
    np.savez(path, **(arrays | changes))


_MAP_CARDS: tuple[tuple[str, Any], ...] = (
    ("ids", DELETED), ("ids", 5), ("ids", ""), ("images", "x"), ("images", DELETED), ("class_names", DELETED),
    ("class_names", 5), ("class_names", [[]]), ("class_names", ["one"]), ("class_names", ["one", "one", "three"]),
    ("class_names", ["one", "three", "two two", "one"]), ("teacher", 5), ("teacher", DELETED),
)  # fmt: skip


def _label_maps() -> Iterator[Case]:
    yield _student("as they are", steps(), codes=(0,))
    for key, value in _MAP_CARDS:
        codes = (0, 2) if key in ("teacher", "images") else (2,)
        yield _student(f"with {key} {_told(value)}", edit_json("maps/maps.json", key, value), codes=codes)
    for name, content in _CARD_TEXTS.items():
        yield _student(f"whose card is {name}", text("maps/maps.json", content))
    for array in ("classes", "scores"):
        path = f"maps/{array}.npy"
        for way in ("empty", "cut_50", "cut_99", "flip_header", "noise"):
            yield _student(f"with {array}.npy {way}", change(path, way), codes=(0, 2))
        yield _student(f"without {array}.npy", remove(path))
        yield _student(f"with a folder for {array}.npy", folder(path))
        for name, value in _arrays().items():
            yield _student(f"with {array}.npy of {name}", functools.partial(_save, path, value))
    high = functools.partial(_save_like, "maps/classes.npy", 60_000)
    yield _student("of classes beyond", high)
    nan = functools.partial(_save_like, "maps/scores.npy", _NAN)
    yield _student("of NaN alone", nan, codes=(0, 2))
    half = steps(remove("maps/maps.json"), functools.partial(_save_like, "maps/scores.npy", 0, 6))
    yield case("label maps", "another teacher goes on with maps half done", "label_maps", "<here>/structvit_run",
               "<here>/maps", copies=("maps", "structvit_run"), prepare=half)  # fmt: skip
    yield case("label maps", "into a folder of data", "label_maps", "<structvit_run>", "<here>/images",
               copies=("images",))  # fmt: skip
    yield case("label maps", "into a folder of maps", "label_maps", "<structvit_run>", "<here>/maps",
               copies=("maps",))  # fmt: skip


def _student(name: str, prepare: Prepare, codes: tuple[int, ...] = (2,)) -> Case:
    config = IMAGE_FOLDER[0].replace(":images", ":structvit")
    return main("label maps", f"maps {name}", "--config.data.root=<images>", "--config.model.token_labels=True",
                "--config.train.duration=2 steps", "--config.data.label_maps=<here>/maps", config=config,
                copies=("maps",), prepare=prepare, codes=codes)  # fmt: skip


def _arrays() -> dict[str, np.ndarray]:
    return {
        "two axes": np.zeros((12, 2), np.float16),
        "one image": np.zeros((1, 1, 1, 3), np.float16),
        "text": np.full((12, 1, 1, 3), "x"),
        "objects": np.full((12, 1, 1, 3), None),
        "complex numbers": np.zeros((12, 1, 1, 3), np.complex64),
    }


def _save(path: str, array: np.ndarray, here: Path, chance: random.Random) -> None:
    del chance
    np.save(here / path, array, allow_pickle=True)


def _save_like(path: str, value: float, *rest: Any) -> None:
    """Sets the values of an array, from the image on that `rest` may begin with."""
    *start, here, _ = rest
    array = np.load(here / path)
    array[slice(*start, None)] = value
    np.save(here / path, array)


def _shards() -> Iterator[Case]:
    version = "shards/clips/1.0.0"
    for number in range(10):
        yield _on_shards(f"flipped bits, {number}", functools.partial(_damage_shard, "flip_1", str(number)))
    for way in ("empty", "cut_50", "cut_99", "flip_100", "zero_start", "zero_end", "noise"):
        yield _on_shards(f"{way}", functools.partial(_damage_shard, way, ""))
    for file in ("features.json", "dataset_info.json", "ids-train.txt", "ids-val.txt", "label.labels.txt"):
        yield _on_shards(f"without {file}", remove(f"{version}/{file}"))
        for name in ("empty", "nested", "not UTF-8", "number", "list"):
            yield _on_shards(f"{file} {name}", text(f"{version}/{file}", _CONTENTS[name]))
    modules = (("evil.Evil", "names a module"), ("os.system", "names a function"), (5, "names a number"),
               ("../evil", "names a path"), ("tensorflow_datasets.core.features.text_feature.Text", "another"))  # fmt: skip
    for value, name in modules:
        edit = steps(edit_json(f"{version}/features.json", "pythonClassName", value), _evil)
        yield _on_shards(f"features.json {name}", edit, check=nothing_executed)
        inner = steps(functools.partial(_inner_feature, value), _evil)
        yield _on_shards(f"features.json {name} inside", inner, check=nothing_executed)
    for key in (
        "splits.0.numBytes",
        "splits.0.shardLengths",
        "splits.0.name",
        "fileFormat",
        "name",
        "version",
    ):
        for value in ("x", "99999999999999999999", [], None):
            edit = edit_json(f"{version}/dataset_info.json", key, value)
            yield _on_shards(f"dataset_info.json with {key} {value}", edit)
    yield case("shards", "written again", "data.shards", "<here>/images", "<here>/shards", "--images",
               copies=("images", "shards"), codes=(0, 2))  # fmt: skip
    yield case("shards", "written again without ids", "data.shards", "<here>/images", "<here>/shards", "--images",
               copies=("images", "shards"), prepare=remove(f"{version}/ids-train.txt"), codes=(0, 2))  # fmt: skip


def _on_shards(name: str, prepare: Prepare, **options: Any) -> Case:
    return main("shards", name, "--config.data.root=<here>/shards", "--config.data.workers=0",
                config=IMAGE_FOLDER[0], copies=("shards",), prepare=prepare, codes=(0, 2), **options)  # fmt: skip


def _damage_shard(way: str, salt: str, here: Path, chance: random.Random) -> None:
    path = next(iter(sorted(here.glob("shards/clips/1.0.0/*train.array_record*"))))
    chance = random.Random(f"{chance.random()}{salt}")
    path.write_bytes(damaged(path.read_bytes(), way, chance))


def _evil(here: Path, chance: random.Random) -> None:
    """A module in the working directory that leaves a mark when it is imported."""
    marker = here.parent.parent / "executed"
    text("evil.py", f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")(here, chance)


def _inner_feature(value: Any, here: Path, chance: random.Random) -> None:
    del chance
    path = here / "shards/clips/1.0.0/features.json"
    content = json.loads(path.read_text())
    next(iter(content["featuresDict"]["features"].values()))["pythonClassName"] = value
    path.write_text(json.dumps(content))


def _native() -> Iterator[Case]:
    for way in ("empty", "cut_50", "cut_99", "flip_header", "flip_100", "zero_middle", "noise"):
        yield _on_native(way, change("native/structvit_jax/*.so", way))
    yield _on_native("a folder", _native_folder)
    yield _on_native("a library of other symbols", _other_library)


def _on_native(name: str, prepare: Prepare) -> Case:
    return main("compiled code", f"the cached library: {name}", config=DIGITS, copies=("native",),
                prepare=prepare, codes=(0,), environment={"XDG_CACHE_HOME": "<here>/native"}, seconds=120,
                check=_fast)  # fmt: skip


def _native_folder(here: Path, chance: random.Random) -> None:
    path = next(here.glob("native/structvit_jax/*.so"))
    folder(str(path.relative_to(here)))(here, chance)


def _other_library(here: Path, chance: random.Random) -> None:
    """Puts a library of the system in the place of ours."""
    del chance
    found = [path for path in Path("/lib").rglob("libm.so.6") if path.is_file()]
    next(here.glob("native/structvit_jax/*.so")).write_bytes(found[0].read_bytes())


def _fast(here: Path, result: Result) -> str:
    del here
    return "it is slow, and blames the compiler" if "no C++ compiler" in result.stdout else ""

"""Checkpoints with changed cards, whose digests are recomputed, and with damaged files."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks.case import Case, Result
from attacks.commands import IMAGE, IMAGE_FOLDER, case, shown, train
from attacks.damage import DELETED, Prepare, change, edit_json, folder, remove, sign, steps, text
from attacks.names import DEEP, JSON_TEXTS, LONG, TRAP
from attacks.users import without_privileges

_STEP = "image_run/checkpoints/4"
_CARD = f"{_STEP}/card/metadata"

# Changes of a card: key, value, exit codes of `predict`.
_CARDS: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("config", DELETED, (2,)),
    ("config", {}, (2,)),
    ("config", [], (2,)),
    ("config", "x", (2,)),
    ("config", None, (2,)),
    ("config", 5, (2,)),
    ("class_names", DELETED, (0, 2)),
    ("class_names", None, (0, 2)),
    ("class_names", [], (0, 2)),
    ("class_names", 5, (2,)),
    ("class_names", "abc", (0, 2)),
    ("class_names", {"a": 1}, (2,)),
    ("class_names", [1, 2, 3], (0, 2)),
    ("class_names", ["a"], (2,)),
    ("class_names", ["a", "a", "a"], (0, 2)),
    ("class_names", [None, [], {}], (0, 2)),
    ("class_names", [*map(str, range(10**5))], (2,)),
    ("class_names", ["a\x1b[31m", "b\nc", "d\x07"], (0, 2)),
    ("class_names", ["\ud800", "b", "c"], (0, 2)),
    ("class_names", [TRAP, "b", "c"], (0, 2)),
    ("class_names", [LONG, "b", "c"], (0, 2)),
    ("config.model", DELETED, (2,)),
    ("config.model", [], (2,)),
    ("config.model", 5, (2,)),
    ("config.model.name", DELETED, (2,)),
    ("config.model.name", 5, (2,)),
    ("config.model.name", "", (2,)),
    ("config.model.name", "nonsense", (2,)),
    ("config.model.name", LONG, (2,)),
    ("config.model.name", "structvit_tiny_4_1", (2,)),
    ("config.model.widths", "x", (2,)),
    ("config.model.widths", [], (2,)),
    ("config.model.widths", [1e9], (2,)),
    ("config.model.widths", [-1], (2,)),
    ("config.model.widths", [math.nan], (2,)),
    ("config.model.widths", [[16]], (2,)),
    ("config.model.widths", 16, (2,)),
    ("config.model.widths", ["16"], (2,)),
    ("config.model.widths", [10**9], (2,)),
    ("config.model.depths", [0], (2,)),
    ("config.model.depths", [10**6], (2,)),
    ("config.model.remat", "full", (0, 2)),
    ("config.model.dtype", "x", (2,)),
    ("config.model.structure_dim", 10**9, (2,)),
    ("config.model.drop_path", 5, (0, 2)),
    ("config.data", DELETED, (2,)),
    ("config.data", 5, (2,)),
    ("config.data.size", DELETED, (0, 2)),
    ("config.data.size", "x", (2,)),
    ("config.data.size", 0, (2,)),
    ("config.data.size", -1, (2,)),
    ("config.data.size", 10**6, (2,)),
    ("config.data.size", 10**12, (2,)),
    ("config.data.size", 1e39, (2,)),
    ("config.data.size", None, (2,)),
    ("config.data.size", 24.0, (0, 2)),
    ("config.data.size", True, (2,)),
    ("config.data.size", [24], (2,)),
    ("config.data.mean", "x", (2,)),
    ("config.data.mean", [], (2,)),
    ("config.data.mean", ["x"] * 3, (2,)),
    ("config.data.mean", [math.nan] * 3, (2,)),
    ("config.data.mean", 5, (2,)),
    ("config.data.mean", [[1]] * 3, (2,)),
    ("config.data.std", [0, 0, 0], (2,)),
    ("config.data.std", [1e-39] * 3, (0, 2)),
    ("config.data.std", [-1] * 3, (2,)),
    ("config.data.frames", 8, (2,)),
    ("config.data.frames", 10**9, (2,)),
    ("config.data.frames", -1, (2,)),
    ("config.data.channels", "xyz", (2,)),
    ("config.data.channels", 5, (2,)),
    ("config.data.test_clips", 10**9, (2,)),
    ("config.data.test_crops", 3, (0, 2)),
    ("config.data.test_crops", 2, (2,)),
    ("config.data.short_side", 10**9, (0, 2)),
    ("config.data.crop_fraction", 0, (2,)),
    ("config.data.crop_fraction", 1e-12, (2,)),
    ("config.data.sampling", "nonsense", (0, 2)),
    ("config.data.name", "nonsense", (0, 2)),
    ("config.data.root", 5, (0, 2)),
    ("config.data.root", "/etc", (0, 2)),
    ("config.data.root", "\0", (0, 2)),
    ("config.data.label_maps", "/etc", (0, 2)),
    ("config.data.workers", 1000, (0, 2)),
    ("config.data.workers", "x", (0, 2)),
    ("config.data.workers", -1, (0,)),
    ("config.data.cache", "nonsense", (0, 2)),
    ("config.data.cache_gib", "x", (0, 2)),
    ("config.eval.batch_size", 10**12, (0, 2)),
    ("config.eval.batch_size", 0, (2,)),
    ("config.eval.batch_size", "x", (2,)),
    ("config.eval.average", "nonsense", (2,)),
    ("config.eval.average", 5, (2,)),
    ("config.eval.ema", "x", (0, 2)),
    ("config.train.seed", math.inf, (0, 2)),
    ("config.train.seed", -1, (0, 2)),
    ("config.train.duration", 5, (0, 2)),
    ("config.mesh.device", "gpu", (0, 2)),
    ("config.mesh.device", 5, (0, 2)),
    ("config.mesh.data", 7, (0, 2)),
    ("config.mesh.fsdp", 10**9, (0, 2)),
    ("config.mesh.heartbeat", -1, (0, 2)),
    ("config.mesh.compilation_cache", 5, (0, 2)),
    ("config.init_from", "/etc/passwd", (0, 2)),
    ("config.model.nonsense", True, (0, 2)),
    ("config.bench", {"only": ""}, (0, 2)),
    ("config.profile", "0:1", (0, 2)),
    ("config.topologies", ["v5e:2x4"], (0, 2)),
    ("config.nonsense", {"a": 1}, (0, 2)),
    ("config.augment", 5, (0, 2)),
    ("config.optimizer.freeze", 5, (0, 2)),
    ("version", 5, (0, 2)),
    ("version", "999.0", (0, 2)),
    ("metrics", "x", (0, 2)),
    ("metrics", {"top1": "x"}, (0, 2)),
)
_READERS = {  # commands that read a card, in addition to predict
    "evaluate": ("<here>/image_run",),
    "explain": ("<here>/image_run", IMAGE, "--out=<here>/out"),
    "export": ("<here>/image_run", "<here>/out.jax", "--platforms=cpu"),
    "convert": ("<here>/image_run", "<here>/out"),
    "report": ("<here>/image_run", "--out=<here>/out.html"),
}
_EVERY_READER = (  # changes that all of them are attacked with
    ("config", DELETED),
    ("class_names", None),
    ("class_names", 5),
    ("class_names", [TRAP, "b", "c"]),
    ("class_names", ["a\x1b[31m", "b\nc", "\ud800"]),
    ("config.model.name", 5),
    ("config.data.size", "x"),
    ("config.data.size", 10**9),
    ("config.mesh.device", "tpu"),
    ("config.data.workers", "x"),
)


def cases() -> Iterator[Case]:
    yield from _cards()
    yield from _checkpoint_files()


def _signed(*prepares: Prepare) -> Prepare:
    return steps(*prepares, sign(_STEP))


def _predict(name: str, prepare: Prepare, **options: Any) -> Case:
    return case(
        "cards" if name.startswith("a card") else "checkpoints",
        f"predict by {name}",
        "predict",
        "<here>/image_run",
        IMAGE,
        copies=("image_run",),
        prepare=prepare,
        **options,
    )


def _cards() -> Iterator[Case]:
    for key, value, codes in _CARDS:
        name = f"a card with {key} {shown(value)}"
        yield _predict(name, _signed(edit_json(_CARD, key, value)), codes=codes, seconds=40)
    for name, content in JSON_TEXTS.items():
        yield _predict(f"a card of {name}", _signed(text(_CARD, content)))
    for command, arguments in _READERS.items():
        for key, value in _EVERY_READER:
            prepare = _signed(edit_json(_CARD, key, value), edit_config(key, value))
            yield case(
                "cards",
                f"{command} by a card with {key} {shown(value)}",
                command,
                *arguments,
                copies=("image_run",),
                prepare=prepare,
                codes=(0, 2),
                check=_no_trap,
                seconds=40,
            )
    cache = _signed(_cache_in_card)
    for command, arguments in {"predict": ("<here>/image_run", IMAGE), **_READERS}.items():
        yield case(
            "cards",
            f"{command} by a card that names a cache of programs",
            command,
            *arguments,
            copies=("image_run",),
            prepare=cache,
            check=_cache_unused,
            codes=(0, 2),
        )
    yield train(
        "cards",
        "start from a card of no class names",
        "--config.data.root=<images>",
        "--config.init_from=<here>/image_run",
        config=IMAGE_FOLDER[0],
        copies=("image_run",),
        prepare=_signed(edit_json(_CARD, "class_names", DELETED)),
        codes=(0, 2),
    )
    for key, value in (("config", 5), ("config.model.name", 5), ("class_names", 5), ("config.data", DELETED)):
        yield train(
            "cards",
            f"resume from a card with {key} {shown(value)}",
            "--config.data.root=<images>",
            "--config.train.duration=6 steps",
            "--workdir=<here>/image_run",
            config=IMAGE_FOLDER[0],
            copies=("image_run",),
            prepare=_signed(edit_json(_CARD, key, value)),
            codes=(0, 2),
        )


def edit_config(key: str, value: Any) -> Prepare:
    """Make the same change in the run's config.json if it is a key of the configuration."""

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
    """Check that pages escape a class name that would hide the end of a script."""
    del result
    pages = [*here.glob("out/*.html"), *here.glob("out*.html")]
    wrong = [path.name for path in pages if "<!--<script" in path.read_text()]
    return f"{wrong[0]} holds a class name unescaped" if wrong else ""


# Files of a checkpoint, as patterns, and damages. Each runs with old and with recomputed digests.
_FILES = (
    "sha256.json",
    "_CHECKPOINT_METADATA",
    "card/metadata",
    "card/commit_success.txt",
    "weights/_METADATA",
    "weights/_sharding",
    "weights/manifest.ocdbt",
    "weights/d/*",
    "weights/ocdbt.process_0/manifest.ocdbt",
    "weights/ocdbt.process_0/d/*",
    "optimizer/_METADATA",
    "optimizer/manifest.ocdbt",
)
_WAYS = ("empty", "cut_50", "flip_1", "noise")


def _checkpoint_files() -> Iterator[Case]:
    for file in _FILES:
        for way in _WAYS:
            where = f"{_STEP}/{file}"
            name = f"{file} {way}"
            # An older checkpoint replaces a damaged one.
            yield _predict(name, change(where, way), codes=(0, 2))
            if file != "sha256.json":
                yield _predict(f"{name}, signed", _signed(change(where, way)), codes=(0, 2))
        yield _predict(f"{file} missing", remove(f"{_STEP}/{file}"), codes=(0, 2))
        yield _predict(f"{file} a folder", folder(f"{_STEP}/{file.replace('*', 'x')}"), codes=(0, 2))
    both = steps(*(change(f"image_run/checkpoints/{step}/weights/_METADATA", "flip_1") for step in (2, 4)))
    yield _predict("both checkpoints damaged", both)
    both = steps(*(text(f"image_run/checkpoints/{step}/sha256.json", "[]") for step in (2, 4)))
    yield _predict("digests that are a list", both)
    for value in (5, None, [], {"a": 5}, DEEP):
        one = text(f"{_STEP}/sha256.json", value if isinstance(value, str) else json.dumps(value))
        yield _predict(f"digests {shown(value)}", one, codes=(0, 2))
    upwards = json.dumps({"../../../../../../../../etc/passwd": "0" * 64})
    yield _predict("digests of a file elsewhere", text(f"{_STEP}/sha256.json", upwards), codes=(0, 2))
    nested = text(f"{_STEP}/weights/_METADATA", DEEP)
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
    yield train("checkpoints", "train where checkpoints is a file", prepare=text("run/checkpoints", "x"))
    closed = _close
    yield _predict("the newest checkpoint is not readable", closed, first=without_privileges, codes=(2,))
    yield train(
        "checkpoints",
        "resume where the newest is not readable",
        "--config.data.root=<images>",
        "--config.train.duration=6 steps",
        "--workdir=<here>/image_run",
        config=IMAGE_FOLDER[0],
        copies=("image_run",),
        prepare=closed,
        first=without_privileges,
    )


def _link_to_itself(here: Path, chance: random.Random) -> None:
    del chance
    (here / "image_run/checkpoints").symlink_to("checkpoints")


def _close(here: Path, chance: random.Random) -> None:
    """Take read permission from the newest checkpoint."""
    del chance
    (here / _STEP).chmod(0)

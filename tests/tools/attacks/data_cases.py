"""Damaged label maps, shards and compiled code."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attacks.case import Case, Result
from attacks.commands import DIGITS, IMAGE_FOLDER, case, nothing_executed, shown, train
from attacks.damage import DELETED, Prepare, change, damaged, edit_json, folder, remove, steps, text
from attacks.names import JSON_TEXTS, MARKER

_MAP_CARDS: tuple[tuple[str, Any], ...] = (
    ("ids", DELETED),
    ("ids", 5),
    ("ids", ""),
    ("images", "x"),
    ("images", DELETED),
    ("class_names", DELETED),
    ("class_names", 5),
    ("class_names", [[]]),
    ("class_names", ["one"]),
    ("class_names", ["one", "one", "three"]),
    ("class_names", ["one", "three", "two two", "one"]),
    ("teacher", 5),
    ("teacher", DELETED),
)


def cases() -> Iterator[Case]:
    yield from _label_maps()
    yield from _shards()
    yield from _native()


def _label_maps() -> Iterator[Case]:
    yield _student("as they are", steps(), codes=(0,))
    for key, value in _MAP_CARDS:
        codes = (0, 2) if key in ("teacher", "images") else (2,)
        yield _student(f"with {key} {shown(value)}", edit_json("maps/maps.json", key, value), codes=codes)
    for name, content in JSON_TEXTS.items():
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
    nan = functools.partial(_save_like, "maps/scores.npy", math.nan)
    yield _student("of NaN alone", nan, codes=(0, 2))
    half = steps(remove("maps/maps.json"), functools.partial(_save_like, "maps/scores.npy", 0, 6))
    yield case(
        "label maps",
        "another teacher resumes maps half done",
        "prepare label_maps",
        "<here>/structvit_run",
        "<here>/maps",
        copies=("maps", "structvit_run"),
        prepare=half,
    )
    yield case(
        "label maps",
        "into a folder of data",
        "prepare label_maps",
        "<structvit_run>",
        "<here>/images",
        copies=("images",),
    )
    yield case(
        "label maps",
        "into a folder of maps",
        "prepare label_maps",
        "<structvit_run>",
        "<here>/maps",
        copies=("maps",),
    )


def _student(name: str, prepare: Prepare, codes: tuple[int, ...] = (2,)) -> Case:
    config = IMAGE_FOLDER[0].replace(":images", ":structvit")
    return train(
        "label maps",
        f"maps {name}",
        "--config.data.root=<images>",
        "--config.model.token_labels=True",
        "--config.train.duration=2 steps",
        "--config.data.label_maps=<here>/maps",
        config=config,
        copies=("maps",),
        prepare=prepare,
        codes=codes,
    )


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
    """Set the values of an array, from the image whose index `rest` may start with."""
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
            yield _on_shards(f"{file} {name}", text(f"{version}/{file}", JSON_TEXTS[name]))
    modules = (
        ("evil.Evil", "names a module"),
        ("os.system", "names a function"),
        (5, "names a number"),
        ("../evil", "names a path"),
        ("tensorflow_datasets.core.features.text_feature.Text", "another"),
    )
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
    yield case(
        "shards",
        "written again",
        "prepare shards",
        "<here>/images",
        "<here>/shards",
        "--images",
        copies=("images", "shards"),
        codes=(0, 2),
    )
    yield case(
        "shards",
        "written again without ids",
        "prepare shards",
        "<here>/images",
        "<here>/shards",
        "--images",
        copies=("images", "shards"),
        prepare=remove(f"{version}/ids-train.txt"),
        codes=(0, 2),
    )


def _on_shards(name: str, prepare: Prepare, **options: Any) -> Case:
    return train(
        "shards",
        name,
        "--config.data.root=<here>/shards",
        "--config.data.workers=0",
        config=IMAGE_FOLDER[0],
        copies=("shards",),
        prepare=prepare,
        codes=(0, 2),
        **options,
    )


def _damage_shard(way: str, salt: str, here: Path, chance: random.Random) -> None:
    path = next(iter(sorted(here.glob("shards/clips/1.0.0/*train.array_record*"))))
    chance = random.Random(f"{chance.random()}{salt}")
    path.write_bytes(damaged(path.read_bytes(), way, chance))


def _evil(here: Path, chance: random.Random) -> None:
    """Write a module to the working directory that creates the marker when it is imported."""
    marker = here.parent.parent / MARKER
    text("evil.py", f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")(here, chance)


def _inner_feature(value: Any, here: Path, chance: random.Random) -> None:
    del chance
    path = here / "shards/clips/1.0.0/features.json"
    content = json.loads(path.read_text())
    next(iter(content["featuresDict"]["features"].values()))["pythonClassName"] = value
    path.write_text(json.dumps(content))


def _native() -> Iterator[Case]:
    for way in ("empty", "cut_50", "cut_99", "flip_header", "flip_100", "zero_middle", "noise"):
        yield _on_native(way, change("native/structvit_jax/native/*.so", way))
    yield _on_native("a folder", _native_folder)
    yield _on_native("a library of other symbols", _other_library)


def _on_native(name: str, prepare: Prepare) -> Case:
    return train(
        "compiled code",
        f"the cached library: {name}",
        config=DIGITS,
        copies=("native",),
        prepare=prepare,
        codes=(0,),
        environment={"XDG_CACHE_HOME": "<here>/native"},
        seconds=120,
        check=_fast,
    )


def _native_folder(here: Path, chance: random.Random) -> None:
    path = next(here.glob("native/structvit_jax/native/*.so"))
    folder(str(path.relative_to(here)))(here, chance)


def _other_library(here: Path, chance: random.Random) -> None:
    """Replace the library by another one."""
    del chance
    found = [path for path in Path("/lib").rglob("libm.so.6") if path.is_file()]
    next(here.glob("native/structvit_jax/native/*.so")).write_bytes(found[0].read_bytes())


def _fast(here: Path, result: Result) -> str:
    del here
    return "it falls back to slow code and reports no compiler" if "no C++ compiler" in result.stdout else ""

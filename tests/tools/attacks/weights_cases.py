"""Weight files: .safetensors with false headers, .pth that hold other objects than weights."""

from __future__ import annotations

import functools
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks.case import Case, Result
from attacks.commands import IMAGE_FOLDER, case, nothing_executed, train
from attacks.damage import Prepare, change, steps, text
from attacks.list_cases import THINGS
from attacks.names import DEEP

_case = functools.partial(case, "weights")
_train = functools.partial(train, "weights")

_FILE = "weights/whole.safetensors"
_PICKLES = (
    "code",
    "plain_code",
    "sparse",
    "quantised",
    "meta",
    "complex",
    "strings",
    "integer_keys",
    "tuple_keys",
    "tensor",
    "list",
    "none",
    "empty",
    "nested",
    "nan",
    "bool",
    "float8",
    "scalar",
    "overlapping",
    "large",
    "noise",
    "nothing",
    "half",
)


def _header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def _tensor(kind: str, shape: list[Any], *offsets: int, name: str = "head.weight") -> dict[str, Any]:
    return {name: {"dtype": kind, "shape": shape, "data_offsets": list(offsets)}}


_HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "eight bytes": bytes(8),
    "a length of 2**63": _header({}, length=2**63),
    "a length of 100 GB": _header({}, length=10**11),
    "a header that is a list": _header([]),
    "a header that is a number": _header(5),
    "a header that is nested": _header(DEEP.encode()),
    "a header of nested objects": _header(b'{"a":' * 100_000),
    "a header that is not UTF-8": _header(b"\xff\xfe"),
    "an empty header": _header({}),
    "metadata of numbers": _header({"__metadata__": {"a": 5}} | _tensor("F32", [1], 0, 4), bytes(4)),
    "metadata that is nested": _header({"__metadata__": {"a": DEEP}} | _tensor("F32", [1], 0, 4), bytes(4)),
    "offsets beyond the end": _header(_tensor("F32", [1], 0, 400), bytes(4)),
    "offsets that are negative": _header(_tensor("F32", [1], -4, 0), bytes(4)),
    "offsets in reverse": _header(_tensor("F32", [1], 4, 0), bytes(4)),
    "a shape of another size": _header(_tensor("F32", [1000], 0, 4), bytes(4)),
    "a shape that overflows": _header(_tensor("F32", [2**32, 2**32], 0, 4), bytes(4)),
    "a shape of zero": _header(_tensor("F32", [0, 10**12], 0, 0)),
    "a shape that is negative": _header(_tensor("F32", [-1], 0, 4), bytes(4)),
    "a shape of text": _header(_tensor("F32", ["x"], 0, 4), bytes(4)),
    "overlapping tensors": _header(_tensor("F32", [1], 0, 4) | _tensor("F32", [1], 0, 4, name="b"), bytes(4)),
    "a name of 100,000 letters": _header(_tensor("F32", [1], 0, 4, name="x" * 100_000), bytes(4)),
    "a name with escapes": _header(_tensor("F32", [1], 0, 4, name="x\x1b[31m\n"), bytes(4)),
    "an unknown type": _header(_tensor("X5", [1], 0, 4), bytes(4)),
    "F8_E4M3": _header(_tensor("F8_E4M3", [4], 0, 4), bytes(4)),
    "F8_E5M2": _header(_tensor("F8_E5M2", [4], 0, 4), bytes(4)),
    "F4": _header(_tensor("F4", [8], 0, 4), bytes(4)),
    "BF16": _header(_tensor("BF16", [2], 0, 4), bytes(4)),
    "BOOL": _header(_tensor("BOOL", [4], 0, 4), bytes(4)),
    "C64": _header(_tensor("C64", [1], 0, 8), bytes(8)),
    "U64": _header(_tensor("U64", [1], 0, 8), bytes(8)),
}
_WAYS = ("cut_1", "cut_50", "cut_99", "flip_header", "flip_100", "zero_start", "appended", "noise")
_OTHER_THINGS = ("a folder", "a fifo", "a device")


def cases() -> Iterator[Case]:
    for name, content in _HEADERS.items():
        yield from _commands(name, text("weights/bad.safetensors", content), "<here>/weights/bad.safetensors")
    for way in _WAYS:
        codes = (0, 2) if way.startswith("flip_100") else (2,)
        yield from _commands(
            f"damage {way}", change(_FILE, way), f"<here>/{_FILE}", copies=("weights",), codes=codes
        )
    for thing in _OTHER_THINGS:
        for ending in ("safetensors", "pth"):
            path = f"bad.{ending}"
            make = functools.partial(_make, thing, path)
            yield from _commands(f"{thing} named .{ending}", make, f"<here>/{path}", seconds=30)
    for name in _PICKLES:
        codes = (0, 2) if name in ("overlapping", "nan") else (2,)
        yield from _commands(f"{name}.pth", steps(), f"<pickles>/{name}.pth", codes=codes)
    for ending in ("tar", "bin", "pt"):
        yield from _commands(f"text in .{ending}", text(f"bad.{ending}", "x"), f"<here>/bad.{ending}")


def _make(thing: str, path: str, here: Path, chance: random.Random) -> None:
    THINGS[thing](here / path, chance)


def _commands(name: str, prepare: Prepare, path: str, **options: Any) -> Iterator[Case]:
    """Attack the commands that read weight files."""
    options = {"codes": (2,), "check": _no_advice, "prepare": prepare} | options
    yield _case(f"convert {name}", "convert", path, "<here>/out", "--model=uniformer_tiny", **options)
    yield _train(
        f"start from {name}",
        "--config.data.root=<images>",
        f"--config.init_from={path}",
        config=IMAGE_FOLDER[0],
        **options,
    )


def _no_advice(here: Path, result: Result) -> str:
    """Check that no code was executed, and that no message suggests how to allow it."""
    if "weights_only" in result.stdout + result.stderr:
        return "the message names weights_only"
    return nothing_executed(here, result)

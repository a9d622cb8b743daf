"""Damage bytes and files. Functions that return a `Prepare` are for the field `prepare` of a case."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prepare = Callable[[Path, random.Random], None]


def damaged(content: bytes, kind: str, chance: random.Random) -> bytes:
    """Return the content with a damage of `names.DAMAGES`."""
    name, _, amount = kind.partition("_")
    size = len(content)
    if name == "cut":
        return content[: size * int(amount) // 100]
    if name == "flip":
        span, count = (64, 4) if amount == "header" else (size, int(amount))
        changed = bytearray(content)
        for _ in range(count):
            changed[chance.randrange(min(span, size))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if name == "zero":
        length = max(1, size // 4)
        start = {"start": 0, "middle": size // 2 - length // 2, "end": size - length}[amount]
        return content[:start] + bytes(length) + content[start + length :]
    others = {
        "empty": b"",
        "one": content[:1],
        "repeated": content * 3,
        "reversed": content[::-1],
        "noise": chance.randbytes(size),
        "appended": content + chance.randbytes(5000),
    }
    return others[name]


def steps(*prepares: Prepare) -> Prepare:
    """Run several functions, one after the other."""

    def prepare(here: Path, chance: random.Random) -> None:
        for step in prepares:
            step(here, chance)

    return prepare


def text(path: str, content: str | bytes) -> Prepare:
    """Write a file."""

    def prepare(here: Path, chance: random.Random) -> None:
        del chance
        target = _at(here, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def change(path: str, kind: str) -> Prepare:
    """Apply a damage of `names.DAMAGES` to a file; a pattern selects its first match."""

    def prepare(here: Path, chance: random.Random) -> None:
        target = _at(here, path)
        target.write_bytes(damaged(target.read_bytes(), kind, chance))

    return prepare


def remove(path: str) -> Prepare:
    """Remove a file or folder."""

    def prepare(here: Path, chance: random.Random) -> None:
        del chance
        target = _at(here, path)
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)

    return prepare


def folder(path: str) -> Prepare:
    """Replace a path by an empty folder."""

    def prepare(here: Path, chance: random.Random) -> None:
        remove(path)(here, chance)
        (here / path).mkdir(parents=True)

    return prepare


def edit_json(path: str, key: str, value: Any) -> Prepare:
    """Set a key of a JSON file, as "config.data.size"; the value DELETED removes it."""

    def prepare(here: Path, chance: random.Random) -> None:
        del chance
        target = _at(here, path)
        content = json.loads(target.read_text())
        *sections, last = key.split(".")
        section = content
        for name in sections:
            section = section[int(name) if isinstance(section, list) else name]
        if value is DELETED:
            del section[last]
        else:
            section[last] = value
        target.write_text(json.dumps(content))

    return prepare


def sign(checkpoint: str) -> Prepare:
    """Recompute the digests of a checkpoint, so that they match damaged files."""

    def prepare(here: Path, chance: random.Random) -> None:
        del chance
        top = _at(here, checkpoint)
        files = [path for path in sorted(top.rglob("*")) if path.is_file() and path.name != "sha256.json"]
        digests = {
            str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
        (top / "sha256.json").write_text(json.dumps(digests))

    return prepare


def _at(here: Path, path: str) -> Path:
    return next(iter(sorted(here.glob(path))), here / path) if "*" in path else here / path


DELETED = object()

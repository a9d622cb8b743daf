"""Fingerprints that identify the data of a run, small enough to keep with every checkpoint.

The fingerprint of a split has a digest of all ids, one of all labels, and a sample: the label and a digest of
the stored bytes of the 64 examples whose ids have the smallest SHA-256. Two samples show how much two data
sets have in common, whatever was added or removed. Ids are taken without the folder that all share and
without extensions, so that the same data have the same fingerprint in another folder, as lists, or as shards.

Data made on the fly are identified by their name and options.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from structvit_jax.data.media import IMAGES, VIDEOS
from structvit_jax.data.types import Source
from structvit_jax.utils.errors import DecodeError, decoding

SAMPLED = 64
_PART = 2**18  # bytes read at the beginning and at the end of larger files
_EXTENSION = re.compile(
    rf"(?:{'|'.join(map(re.escape, IMAGES + VIDEOS))})(?=(?:#[\d.e+]+-[\d.e+]*)?$)",
    re.IGNORECASE | re.MULTILINE,
)
Fingerprint = Mapping[str, Any]


def fingerprint_of(source: Source) -> dict[str, Any]:
    """Return the fingerprint of a split, in plain types. Reads at most 64 examples."""
    examples = len(source)
    if made := getattr(source, "made_from", None):
        return {"examples": examples, "made_from": made}
    ids = _EXTENSION.sub("", "\n".join(_ids(source))).split("\n")  # in one call: there may be a million
    shared = _shared_folder(ids)
    ids = [name[shared:] for name in ids]
    return {
        "examples": examples,
        "ids": _digest_of_all(ids),
        "labels": _digest_of_labels(source, ids),
        "sample": _sample(source, ids),
    }


def _ids(source: Source) -> list[str]:
    listed = getattr(source, "ids", None)
    return listed() if listed else [source.id(i) for i in range(len(source))]


def _shared_folder(ids: Sequence[str]) -> int:
    """Return the length of the folder that all ids share, in characters."""
    if not ids:
        return 0
    first, last = min(ids), max(ids)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(character for character, _ in same).rfind("/") + 1


def _digest_of_all(lines: Sequence[str]) -> str:
    return hashlib.sha256(_encoded("\n".join(sorted(lines)))).hexdigest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _digest_of_labels(source: Source, ids: Sequence[str]) -> str | None:
    """Return a digest of all labels, or None if reading labels takes reading the examples."""
    labels = getattr(source, "labels", None)
    if labels is None:
        return None
    names = (*source.class_names, "")  # -1: none of the classes
    return _digest_of_all(
        [f"{name}\t{names[label]}" for name, label in zip(ids, labels.tolist(), strict=True)]
    )


def _sample(source: Source, ids: Sequence[str]) -> dict[str, str]:
    """Return digests "LABEL BYTES" by the digest of an id; BYTES is "" for a part of a file."""
    keyed = ((hashlib.sha256(_encoded(name)).digest(), i) for i, name in enumerate(ids))
    chosen = heapq.nsmallest(SAMPLED, keyed)
    return {key.hex()[:16]: _stored(source, i) for key, i in chosen}


def _stored(source: Any, index: int) -> str:
    try:
        label, files = source.stored(index)
        digest = "" if files is None else bytes_digest(files)
    except DecodeError:
        return "unreadable"
    return f"{hashlib.sha256(_encoded(label)).hexdigest()[:8]} {digest}"


def bytes_digest(files: Sequence[str | bytes]) -> str:
    """Return a digest of the sizes and bytes of an example's first, middle and last file.

    Args:
      files: paths or contents. Of large files the beginning and the end are read.

    Raises:
      DecodeError: one of them cannot be read.
    """
    digest = hashlib.sha256(str(len(files)).encode())
    with decoding():
        for index in sorted({0, len(files) // 2, len(files) - 1} if files else ()):
            size, parts = _parts(files[index])
            digest.update(f" {size} ".encode())
            digest.update(parts)
    return digest.hexdigest()[:16]


def _parts(file: str | bytes) -> tuple[int, bytes]:
    if isinstance(file, bytes):
        return len(file), file if len(file) <= 2 * _PART else file[:_PART] + file[-_PART:]
    if not os.path.isfile(file):
        raise DecodeError("no such file, or not a regular file")
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        if size <= 2 * _PART:
            return size, opened.read()
        start = opened.read(_PART)
        opened.seek(-_PART, os.SEEK_END)
        return size, start + opened.read()


@dataclasses.dataclass(frozen=True)
class SplitChange:
    """How a split differs from that of a run.

    Attributes:
      kind: the first of these that differs: where the examples come from, their number, ids, labels, or the
        bytes of sampled examples; None if the split is the same.
      old, new: the fingerprints.
      alike: number of examples of a common sample that are the same.
      sampled: size of that sample.
    """

    kind: Literal["origin", "number", "ids", "labels", "bytes"] | None
    old: Fingerprint
    new: Fingerprint
    alike: int
    sampled: int

    @property
    def described(self) -> str:
        """The change as text; "" if there is none."""
        old, new = self.old, self.new
        if self.kind is None:
            return ""
        if self.kind == "origin":
            return " instead of ".join(
                f"{one.get('made_from') or 'stored'} ({one['examples']:,} examples)" for one in (new, old)
            )
        change = {
            "number": f"{new['examples']:,} examples instead of {old['examples']:,}, ",
            "ids": "examples of other names, ",
            "labels": "other labels, ",
            "bytes": "",
        }[self.kind]
        return f"{change}{self.alike} of {self.sampled} sampled examples are the same"


@dataclasses.dataclass(frozen=True)
class Changes:
    """How data differ from those of a run, by split."""

    splits: Mapping[str, SplitChange]

    @property
    def same(self) -> bool:
        return all(change.kind is None for change in self.splits.values())

    @property
    def alike(self) -> int:
        return sum(change.alike for change in self.splits.values())

    @property
    def sampled(self) -> int:
        return sum(change.sampled for change in self.splits.values())

    @property
    def described(self) -> str:
        """The changes as text; "" if there are none."""
        return "; ".join(f"{name}: {one.described}" for name, one in self.splits.items() if one.kind)


def compare(old: Mapping[str, Fingerprint], new: Mapping[str, Fingerprint]) -> Changes:
    """Compare the fingerprints of the splits in `new` with those of a run, by name."""
    return Changes({split: _change(old[split], one) for split, one in new.items()})


def _change(old: Fingerprint, new: Fingerprint) -> SplitChange:
    alike, sampled = similarity(old, new)
    kind: Literal["origin", "number", "ids", "labels", "bytes"] | None = None
    if old.get("made_from") or new.get("made_from"):
        if any(old.get(key) != new.get(key) for key in ("made_from", "examples")):
            kind = "origin"
    elif old["examples"] != new["examples"]:
        kind = "number"
    elif old["ids"] != new["ids"]:
        kind = "ids"
    elif None not in (old["labels"], new["labels"]) and old["labels"] != new["labels"]:
        kind = "labels"
    elif alike < sampled:
        kind = "bytes"
    return SplitChange(kind, old, new, alike, sampled)


def similarity(old: Fingerprint, new: Fingerprint) -> tuple[int, int]:
    """Return how many examples of a common sample of two splits are the same, and the size of the sample."""
    before, after = old.get("sample", {}), new.get("sample", {})
    union = sorted(before.keys() | after.keys())[: max(len(before), len(after))]
    return sum(_is_same(before.get(key), after.get(key)) for key in union), len(union)


def _is_same(before: str | None, after: str | None) -> bool:
    if before is None or after is None or "unreadable" in (before, after):
        return before == after
    (label, content), (new_label, new_content) = before.split(" "), after.split(" ")
    return label == new_label and (content == new_content or "" in (content, new_content))

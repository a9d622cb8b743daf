"""Which data a run was trained on, small enough to keep with every checkpoint.

The fingerprint of a split has a digest of all ids, one of all labels, and a sample: of the 64 examples whose
ids have the smallest SHA-256, the label and a digest of the stored bytes. Two samples show how much two data
sets have in common, whatever was added or removed. Ids are taken without the folder that all share and
without extensions, so that the same data count as the same at another place, from lists, or from shards.

Data that are made, not stored, are identified by their name and options.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from structvit_jax.data.media import IMAGES, VIDEOS
from structvit_jax.data.types import Source
from structvit_jax.utils.errors import DecodeError, decoding

SAMPLED = 64
_PART = 2**18  # bytes: of larger files the beginning and the end are read
_EXTENSION = re.compile(
    rf"(?:{'|'.join(map(re.escape, IMAGES + VIDEOS))})(?=(?:#[\d.e+]+-[\d.e+]*)?$)",
    re.IGNORECASE | re.MULTILINE,
)
Fingerprint = Mapping[str, Any]


def fingerprint_of(source: Source) -> dict[str, Any]:
    """Return the fingerprint of a split, in plain types.

    Reads no more than 64 examples.
    """
    examples = len(source)
    if made := getattr(source, "made_from", None):
        return {"examples": examples, "made_from": made}
    ids = _EXTENSION.sub("", "\n".join(_ids(source))).split("\n")  # all at once: there may be a million
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
    """Return how many characters of all ids are the folder that they share."""
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
    """Return a digest of every example's label, None where labels are not known without reading examples."""
    labels = getattr(source, "labels", None)
    if labels is None:
        return None
    names = (*source.class_names, "")  # -1: none of the classes
    return _digest_of_all(
        [f"{name}\t{names[label]}" for name, label in zip(ids, labels.tolist(), strict=True)]
    )


def _sample(source: Source, ids: Sequence[str]) -> dict[str, str]:
    """Return digests "LABEL BYTES" by the digest of an id; BYTES is "" where they are not stored as such."""
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
    """Return a digest of an example's files (paths or contents): of the sizes and bytes of the first, the
    middle and the last; of large files the beginning and the end.

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
        raise DecodeError("no such file, or not a regular one")
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        if size <= 2 * _PART:
            return size, opened.read()
        start = opened.read(_PART)
        opened.seek(-_PART, os.SEEK_END)
        return size, start + opened.read()


class Changes(NamedTuple):
    """How data differ from those of a run."""

    described: str  # in words; "" if they are the same
    alike: int  # examples of a common sample that are the same
    sampled: int  # examples of that sample


def compare(old: Mapping[str, Fingerprint], new: Mapping[str, Fingerprint]) -> Changes:
    """Compare the fingerprints of the splits in `new` with those of a run, by name."""
    found = {split: difference(old[split], one) for split, one in new.items()}
    pairs = [similarity(old[split], one) for split, one in new.items()]
    described = "; ".join(f"{split}: {text}" for split, text in found.items() if text)
    return Changes(described, sum(alike for alike, _ in pairs), sum(sampled for _, sampled in pairs))


def difference(old: Fingerprint, new: Fingerprint) -> str:
    """Return how a split differs from that of a run, in words; "" if it is the same."""
    if old.get("made_from") or new.get("made_from"):
        same = all(old.get(key) == new.get(key) for key in ("made_from", "examples"))
        described = (
            f"{one.get('made_from') or 'stored'} ({one['examples']:,} examples)" for one in (new, old)
        )
        return "" if same else " instead of ".join(described)
    said = []
    if old["examples"] != new["examples"]:
        said.append(f"{new['examples']:,} examples instead of {old['examples']:,}")
    elif old["ids"] != new["ids"]:
        said.append("examples of other names")
    elif None not in (old["labels"], new["labels"]) and old["labels"] != new["labels"]:
        said.append("other labels")
    alike, sampled = similarity(old, new)
    if said or alike < sampled:
        said.append(f"{alike} of {sampled} sampled examples are the same")
    return ", ".join(said)


def similarity(old: Fingerprint, new: Fingerprint) -> tuple[int, int]:
    """Return how many examples of a common sample of two splits are the same, and the sample's size."""
    before, after = old.get("sample", {}), new.get("sample", {})
    union = sorted(before.keys() | after.keys())[: max(len(before), len(after))]
    return sum(_is_same(before.get(key), after.get(key)) for key in union), len(union)


def _is_same(before: str | None, after: str | None) -> bool:
    if before is None or after is None or "unreadable" in (before, after):
        return before == after
    (label, content), (new_label, new_content) = before.split(" "), after.split(" ")
    return label == new_label and (content == new_content or "" in (content, new_content))

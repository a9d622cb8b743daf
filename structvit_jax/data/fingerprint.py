"""Fingerprints that identify the data of a run, small enough to keep with every checkpoint.

The fingerprint of a split has a digest of all ids, a digest of all labels, and a sample: digests of the label
and of the stored bytes of the 64 examples whose ids have the smallest SHA-256. Two samples show how much two
data sets have in common, even if examples were added or removed. The folder that all ids share and their
extensions are removed, so that the same data have the same fingerprint in another folder, as lists, or as
shards.

Generated data are identified by their name and options.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from structvit_jax.data.media import IMAGES, VIDEOS
from structvit_jax.data.types import Source
from structvit_jax.utils.failures import DecodeError, decoding

_SAMPLED = 64  # examples
_END = 2**18  # bytes to read at the beginning and at the end of a file that is larger than both
_EXTENSION = re.compile(
    rf"(?:{'|'.join(map(re.escape, IMAGES + VIDEOS))})(?=(?:#[\d.e+]+-[\d.e+]*)?$)",
    re.IGNORECASE,
)
Fingerprint = Mapping[str, Any]


def fingerprint_of(source: Source) -> dict[str, Any]:
    """Return the fingerprint of a split, in plain types. Reads at most 64 examples."""
    examples = len(source)
    if made := getattr(source, "made_from", None):
        return {"examples": examples, "made_from": made}
    list_ids = getattr(source, "ids", None)
    ids = list_ids() if list_ids else [source.id(i) for i in range(examples)]
    ids = [_EXTENSION.sub("", name) for name in ids]
    shared = os.path.commonprefix(ids).rfind("/") + 1  # noqa: RUF071 - compare characters
    ids = [name[shared:] for name in ids]
    return {
        "examples": examples,
        "ids": _digest_of_all(ids),
        "labels": _digest_of_labels(source, ids),
        "sample": _sample(source, ids),
    }


def _digest_of_all(lines: Sequence[str]) -> str:
    return hashlib.sha256(_encode("\n".join(sorted(lines)))).hexdigest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _digest_of_labels(source: Source, ids: Sequence[str]) -> str | None:
    """Return a digest of all labels, or None if labels are stored with the examples."""
    labels = getattr(source, "labels", None)
    if labels is None:
        return None
    names = (*source.class_names, "")  # label -1 is not a class
    return _digest_of_all(
        [f"{name}\t{names[label]}" for name, label in zip(ids, labels.tolist(), strict=True)]
    )


def _sample(source: Any, ids: Sequence[str]) -> dict[str, str]:
    """Return "LABEL BYTES" digests by the digest of an id; BYTES is "" for a part of a file."""
    keyed = ((hashlib.sha256(_encode(name)).digest(), i) for i, name in enumerate(ids))
    sample = {}
    for key, i in heapq.nsmallest(_SAMPLED, keyed):
        try:
            label, files = source.stored(i)
            content = "" if files is None else bytes_digest(files)
            digest = f"{hashlib.sha256(_encode(label)).hexdigest()[:8]} {content}"
        except DecodeError:
            digest = "unreadable"
        sample[key.hex()[:16]] = digest
    return sample


def bytes_digest(files: Sequence[str | bytes]) -> str:
    """Return a digest of the sizes and bytes of an example's first, middle and last file.

    Args:
      files: paths, or contents as bytes. Only the beginning and the end of large files are read.

    Raises:
      DecodeError: one of them cannot be read.
    """
    digest = hashlib.sha256(str(len(files)).encode())
    with decoding():
        for index in sorted({0, len(files) // 2, len(files) - 1} if files else ()):
            size, content = _read_ends(files[index])
            digest.update(f" {size} ".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def _read_ends(file: str | bytes) -> tuple[int, bytes]:
    """Return the size of a file, and its bytes, or the beginning and the end of a large one."""
    if isinstance(file, bytes):
        return len(file), file if len(file) <= 2 * _END else file[:_END] + file[-_END:]
    if not os.path.isfile(file):
        raise DecodeError("no such file, or not a regular file")
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        if size <= 2 * _END:
            return size, opened.read()
        start = opened.read(_END)
        opened.seek(-_END, os.SEEK_END)
        return size, start + opened.read()


class Changes(NamedTuple):
    """The differences between data and the data of a run.

    Attributes:
      by_split: a description of the change of each split that differs.
      alike: number of sampled examples that are the same, summed over all splits.
      sampled: number of sampled examples.
    """

    by_split: dict[str, str]
    alike: int
    sampled: int

    @property
    def same(self) -> bool:
        return not self.by_split

    @property
    def described(self) -> str:
        """The changes as text; "" if there are none."""
        return "; ".join(f"{split}: {change}" for split, change in self.by_split.items())


def compare(old: Mapping[str, Fingerprint], new: Mapping[str, Fingerprint]) -> Changes:
    """Compare the fingerprints of the splits in `new` with those of a run, by name."""
    counts = {split: _count_alike(old[split], after) for split, after in new.items()}
    changes = {split: _describe_change(old[split], after, *counts[split]) for split, after in new.items()}
    return Changes(
        {split: change for split, change in changes.items() if change},
        sum(alike for alike, _ in counts.values()),
        sum(sampled for _, sampled in counts.values()),
    )


def _describe_change(old: Fingerprint, new: Fingerprint, alike: int, sampled: int) -> str:
    """Describe the first difference between two fingerprints of a split; "" if there is none."""
    if old.get("made_from") or new.get("made_from"):
        origins = [f"{one.get('made_from') or 'stored'} ({one['examples']:,} examples)" for one in (new, old)]
        return "" if origins[0] == origins[1] else " instead of ".join(origins)
    same = f"{alike} of {sampled} sampled examples are the same"
    if old["examples"] != new["examples"]:
        return f"{new['examples']:,} examples instead of {old['examples']:,}, {same}"
    if old["ids"] != new["ids"]:
        return f"examples with other names, {same}"
    if None not in (old["labels"], new["labels"]) and old["labels"] != new["labels"]:
        return f"other labels, {same}"
    return same if alike < sampled else ""


def _count_alike(old: Fingerprint, new: Fingerprint) -> tuple[int, int]:
    """Return how many examples of a common sample of two splits are the same, and the size of the sample."""
    before, after = old.get("sample", {}), new.get("sample", {})
    common = sorted(before.keys() | after.keys())[: max(len(before), len(after))]
    return sum(_is_same(before.get(key), after.get(key)) for key in common), len(common)


def _is_same(before: str | None, after: str | None) -> bool:
    if before is None or after is None or "unreadable" in (before, after):
        return before == after
    (label, content), (new_label, new_content) = before.split(" "), after.split(" ")
    return label == new_label and (content == new_content or "" in (content, new_content))

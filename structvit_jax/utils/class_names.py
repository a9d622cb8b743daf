"""Match the class names of two sources, which may differ in spelling."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# Published lists differ in quotes, in brackets around placeholders, and in underscores for blanks.
_IGNORED = str.maketrans("", "", " \t\ufeff_,\"'`’[](){}")


def match(names: Sequence[str], others: Sequence[str]) -> list[int] | None:
    """Return the position in `others` of each of `names`, or None if they do not name the same classes.

    Names match if all are equal, or if all are equal and still distinct after case, blanks, underscores,
    commas, quotes and brackets are dropped.
    """
    for key in (str, _spelling):
        own, theirs = ([key(name) for name in side] for side in (names, others))
        position = {name: index for index, name in enumerate(theirs)}
        if set(own) == position.keys() and len(set(own)) == len(own) == len(theirs):
            return [position[name] for name in own]
    return None


def difference(names: Sequence[str], others: Sequence[str], limit: int = 3) -> tuple[str, str]:
    """Describe which of `others` are missing in `names`, and which of `names` are new: up to `limit` each."""
    lacking, added = set(others) - set(names), set(names) - set(others)
    known = {_spelling(name) for name in lacking} & {_spelling(name) for name in added}
    if len(known) < max(len(lacking), len(added)):  # leave out those that differ in spelling alone
        lacking, added = (
            {name for name in side if _spelling(name) not in known} for side in (lacking, added)
        )
    return _some(sorted(lacking), limit), _some(sorted(added), limit)


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().translate(_IGNORED)


def _some(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more or "none"

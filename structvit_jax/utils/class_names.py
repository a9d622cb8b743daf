"""Match the class names of two sources, which may differ in spelling."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# Published lists of the same classes differ in quotes, commas, brackets around placeholders, and in whether
# they write blanks or underscores.
_IGNORED = str.maketrans("", "", " \t\ufeff_,\"'`’[](){}")


def match(names: Sequence[str], others: Sequence[str]) -> list[int] | None:
    """Return the position in `others` of each of `names`; None if the two lists do not name the same classes.

    The order of the names does not matter. If the names are not equal, they are compared again without case,
    blanks, underscores, commas, quotes and brackets; they match only if they are then still distinct.
    """
    for key in (str, _spelling):
        own, theirs = ([key(name) for name in side] for side in (names, others))
        position = {name: index for index, name in enumerate(theirs)}
        if set(own) == position.keys() and len(set(own)) == len(own) == len(theirs):
            return [position[name] for name in own]
    return None


def difference(names: Sequence[str], others: Sequence[str], limit: int = 3) -> tuple[str, str]:
    """List the names that only `others` has, and those that only `names` has; at most `limit` of each.

    Names that differ only in spelling are left out, if any other names remain.
    """
    lacking, added = set(others) - set(names), set(names) - set(others)
    respelled = {_spelling(name) for name in lacking} & {_spelling(name) for name in added}
    if len(respelled) < max(len(lacking), len(added)):
        lacking, added = (
            {name for name in side if _spelling(name) not in respelled} for side in (lacking, added)
        )
    return _enumerate(sorted(lacking), limit), _enumerate(sorted(added), limit)


def _spelling(name: str) -> str:
    """Return a name without the differences in spelling that `match` ignores."""
    return unicodedata.normalize("NFC", name).casefold().translate(_IGNORED)


def _enumerate(names: Sequence[str], limit: int) -> str:
    """Return the first `limit` names and the number of the others, or "none"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more or "none"

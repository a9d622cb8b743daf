"""The one exception for a user's mistake, and the words that help to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user wrote is wrong; the message is one line and names the way out."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the nearest of `known`, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
    return " Known: " + ", ".join(known) + "."

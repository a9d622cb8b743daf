"""Comma-separated shell patterns, as in config.optimizer.freeze."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

from structvit_jax.utils.errors import UserError


def matching(patterns: str, names: Collection[str], complaint: str) -> set[str]:
    """Return the names that patterns select. Later patterns win, and "!" in front deselects.

    Args:
      patterns: as "blocks1.*,!*.bias".
      names: to select from.
      complaint: error message for a pattern that matches nothing; its braces get the pattern.

    Raises:
      UserError: a pattern that matches nothing.
    """
    chosen: set[str] = set()
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        matched = set(fnmatch.filter(names, pattern.removeprefix("!")))
        if not matched:
            raise UserError(complaint.format(repr(pattern)))
        chosen = chosen - matched if pattern.startswith("!") else chosen | matched
    return chosen

"""Tables as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines: the first column aligned to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table in Markdown; the keys of the rows are its header."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

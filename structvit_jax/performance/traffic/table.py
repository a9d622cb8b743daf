"""Traffic of a compiled program as a table: `structvit plan --program`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from structvit_jax.performance.traffic import Traffic, count
from structvit_jax.utils.errors import UserError


def describe(
    path: str, *, trips: Sequence[str] = (), unknown: int | None = None, depth: int = 1, parts: int = 20
) -> str:
    """Return the traffic of a program as a table.

    Args:
      path: file with the text of compiled.as_text().
      trips: how often loops run, as "LOOP=N".
      unknown: how often other loops of unknown length run.
      depth: how many name scopes make a part.
      parts: how many parts to list, the largest first.

    Raises:
      UserError: a file that is not a program, or a loop of unknown length.
    """
    traffic = count(_read(path), trips=dict(map(_trip, trips)), unknown=unknown, depth=depth)
    return table(traffic, parts)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not a text'}"
        ) from error


def _trip(text: str) -> tuple[str, int]:
    loop, _, times = text.partition("=")
    if not times.isdecimal() or len(times) > 9:
        raise UserError(f"--trips {text!r} is not of the form LOOP=N")
    return loop.removeprefix("%"), int(times)


def table(traffic: Traffic, parts: int) -> str:
    """Return the largest parts and the total, in MB (10^6 bytes)."""
    rows: list[tuple[str, ...]] = [("part", "read MB", "written MB", "sent MB")]
    shown = [*list(traffic.by_part.items())[:parts], ("total", traffic[:3])]
    rows += [(name, *(f"{size / 1e6:,.3f}" for size in moved)) for name, moved in shown]
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{name:<{wide[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, wide[1:], strict=True))
        for name, *cells in rows
    )

"""Prints what a compiled program moves, from its text.

python -m structvit_jax.traffic PROGRAM.txt [--parts N] [--depth N] [--trips LOOP=N ...] [--unknown N]

PROGRAM.txt is what compiled.as_text() returns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from structvit_jax.errors import UserError, exit_in_one_line
from structvit_jax.traffic import Traffic, count


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m structvit_jax.traffic",
        description="What a compiled program moves: bytes from and to HBM, and to other devices.",
    )
    parser.add_argument("program", help="a file with what compiled.as_text() returns")
    parser.add_argument("--parts", type=int, default=20, help="how many parts to print, the largest first")
    parser.add_argument("--depth", type=int, default=1, help="how many name scopes make a part")
    parser.add_argument(
        "--trips",
        action="append",
        default=[],
        metavar="LOOP=N",
        help="how often a loop runs; may be repeated",
    )
    parser.add_argument("--unknown", type=int, metavar="N", help="how often other loops run that do not say")
    args = parser.parse_args(argv)
    with exit_in_one_line():
        trips = dict(map(_trip, args.trips))
        traffic = count(_read(args.program), trips=trips, unknown=args.unknown, depth=args.depth)
        print(table(traffic, args.parts))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}"
        ) from error


def _trip(text: str) -> tuple[str, int]:
    loop, _, times = text.partition("=")
    if not times.isdecimal() or len(times) > 9:
        raise UserError(f"--trips {text!r} is not of the form LOOP=N")
    return loop.removeprefix("%"), int(times)


def table(traffic: Traffic, parts: int) -> str:
    """The totals and the largest parts, in MB (10^6 bytes)."""
    rows: list[tuple[str, ...]] = [("part", "read MB", "written MB", "sent MB")]
    shown = [*list(traffic.by_part.items())[:parts], ("total", traffic[:3])]
    rows += [(name, *(f"{size / 1e6:,.3f}" for size in moved)) for name, moved in shown]
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{name:<{wide[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, wide[1:], strict=True))
        for name, *cells in rows
    )


if __name__ == "__main__":
    main(sys.argv[1:])

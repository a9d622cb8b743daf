"""Where layers declare what they compute: multiply-accumulates, from the shapes they really see."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = ("conv", "depthwise", "linear", "structure", "attention")


class Entry(NamedTuple):
    module: Any  # the layer that declares
    kind: str  # one of KINDS
    macs: int  # multiply-accumulates of the whole batch


_open: contextvars.ContextVar[list[Entry] | None] = contextvars.ContextVar("ledger", default=None)


@contextlib.contextmanager
def ledger() -> Iterator[list[Entry]]:
    """Collects what is declared inside the block."""
    entries: list[Entry] = []
    token = _open.set(entries)
    try:
        yield entries
    finally:
        _open.reset(token)


def declare(module: Any, kind: str, macs: int) -> None:
    """Notes `macs` multiply-accumulates for `module`; does nothing outside a `ledger` block."""
    entries = _open.get()
    if entries is not None:
        assert kind in KINDS, kind
        entries.append(Entry(module, kind, int(macs)))

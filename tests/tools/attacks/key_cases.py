"""Every key of a configuration with a value of another type, and with one at the end of its range."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from attacks.case import Case
from attacks.commands import DIGITS, case, short

# Values by the type of the default; each key gets the next one of both tables. The first are refused, the
# second may be accepted.
_REFUSED = {
    int: ("x", "", "1.5", "nan", "1e39", "None", "(1,)"),
    float: ("x", "", "None", "(1,)"),
    bool: ("x", "2"),
    tuple: ("x", "1", "(", "((((((((((((((((((((((((1"),
}
_ODD = {
    int: ("-2", "99999999999999999999"),
    float: ("nan", "inf", "-1", "1e39"),
    bool: ("True",),
    str: ("", "nonsense", "x" * 5000, "\udcff\n", "../../x"),
    tuple: ("()", "(nan,)", "('x',)", "(1e39,1e39)", "(None,)"),
    type(None): ("x", "-1", "nan", "(1,)"),
}
_TABLES = (("refused", _REFUSED), ("odd", _ODD))


def cases() -> Iterator[Case]:
    from structvit_jax.config import default_config

    turns = {(name, kind): itertools.cycle(words) for name, table in _TABLES for kind, words in table.items()}
    for key, value in _leaves(default_config()):
        for name, _ in _TABLES:
            if words := turns.get((name, type(value))):
                word = next(words)
                # The second row may be accepted, and so may a single word for an empty tuple.
                codes = (0, 2) if name == "odd" or value == () else (2,)
                name = short(f"{key}={word}")
                yield case("keys", name, "show", DIGITS, f"--config.{key}={word}", codes=codes)


def _leaves(section: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key, as "data.size", with its default."""
    for key in sorted(section.keys()):
        value = section[key]
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

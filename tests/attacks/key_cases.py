"""Every key of a configuration with values of another type, and at the ends of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_collections

from attacks.case import Case
from attacks.commands import main, short

# Values by the type of the default; the first row is refused, the second may be taken.
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


def cases() -> Iterator[Case]:
    from structvit_jax.config import default_config

    for key, value in _leaves(default_config()):
        kind = type(value)
        for table, codes in ((_REFUSED, (2,)), (_ODD, (0, 2))):
            if value == ():  # takes a single word for a tuple of it
                codes = (0, 2)
            for word in table.get(kind, ()):
                flag = f"--config.{key}={word}"
                yield main("keys", short(f"{key}={word}"), "--mode=show", flag, codes=codes)


def _leaves(section: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its default, by dots."""
    for key in sorted(section.keys()):
        value = section[key]
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

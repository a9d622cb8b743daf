"""Every key of a configuration with a value of another type, and with one at the end of its range."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

from attacks.case import Case
from attacks.commands import DIGITS, case, short

# Values by the type of the default. Each key is tested with the next value of both tables: one that must be
# refused, and one that may be accepted.
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
    from structvit_jax.config import default_config, keys_of

    tables = [{kind: itertools.cycle(texts) for kind, texts in table.items()} for table in (_REFUSED, _ODD)]
    for key, default in sorted(keys_of(default_config()), key=operator.itemgetter(0)):
        for table, codes in zip(tables, ((2,), (0, 2)), strict=True):
            if texts := table.get(type(default)):
                change = f"{key}={next(texts)}"
                yield case("keys", short(change), "show", DIGITS, f"--config.{change}", codes=codes)

"""Files that are not valid configurations."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from pathlib import Path

from attacks.case import Case
from attacks.commands import case
from attacks.damage import text

_case = functools.partial(case, "configurations")

_BEGIN = "from structvit_jax.config import default_config\n\ndef get_config(argument=None):\n    "
_TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "no function": "x = 1",
    "syntax error": "def get_config(:",
    "indentation error": "def get_config():\nreturn 1",
    "raises ValueError": "def get_config():\n    raise ValueError('two\\nlines')",
    "raises KeyError": "def get_config():\n    return {}['x']",
    "raises an error without a message": "def get_config():\n    assert False",
    "raises at import": "1 / 0",
    "recursion": "def get_config():\n    return get_config()",
    "exits": "import sys\ndef get_config():\n    sys.exit(5)",
    "imports what is not there": "import nonsense_module",
    "imports what raises": "from structvit_jax.config import nonsense",
    "returns nothing": "def get_config():\n    pass",
    "returns a dict": "def get_config():\n    return {'train': {}}",
    "returns a number": "def get_config():\n    return 5",
    "returns a class": "def get_config():\n    return int",
    "returns an empty configuration": (
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()"
    ),
    "lacks a section": f"{_BEGIN}c = default_config(); c.unlock(); del c.train; return c",
    "lacks a key": f"{_BEGIN}c = default_config(); c.unlock(); del c.train.seed; return c",
    "unknown key": f"{_BEGIN}c = default_config(); c.train.nonsense = 1; return c",
    "added key": f"{_BEGIN}c = default_config(); c.unlock(); c.nonsense = 1; return c",
    "wrong type": f"{_BEGIN}c = default_config(); c.train.seed = 'x'; return c",
    "type changed": f"{_BEGIN}c = default_config(); c.unlock(); c.train.seed = 'x'; return c",
    "number for a section": f"{_BEGIN}c = default_config(); c.unlock(); c.train = 5; return c",
    "None for a key": f"{_BEGIN}c = default_config(); c.unlock(); c.train.seed = None; return c",
    "object for a key": f"{_BEGIN}c = default_config(); c.unlock(); c.train.seed = object(); return c",
    "required argument": "def get_config(argument):\n    return 5",
    "two arguments": "def get_config(a, b):\n    return 5",
    "Latin-1": "# caf\u00e9\n".encode("latin-1"),
    "NUL": b"x = 1\0",
    "binary": bytes(range(256)),
    "nested": "x = " + "(" * 5000,
}
_STUDIES = {  # of `ablate`
    "a number": "5",
    "a list": "[]",
    "an unknown key": "{'arm': ()}",
    "a key that is a number": "{1: 2}",
    "a number for arms": "{'arms': 5}",
    "text for arms": "{'arms': 'abc'}",
    "numbers in arms": "{'arms': (1, 2)}",
    "text for seeds": "{'seeds': 'x'}",
    "no seeds": "{'seeds': 0}",
    "a number for lrs": "{'lrs': 1e-3}",
    "text in lrs": "{'lrs': ('x',)}",
    "None in lrs": "{'lrs': (None,)}",
    "a number for against": "{'arms': ('a: model.structure_dim=1', 'b: model.remat=full'), 'against': 5}",
}
_ENDINGS = {
    "missing": "missing.py",
    "no .py": "c.txt",
    "a folder": ".",
    "a fifo": "fifo.py",
    "zero": "zero.py",
}


def cases() -> Iterator[Case]:
    for command, more in (("show", ()), ("ablate", ("--workdir=<here>/run",))):
        for name, content in _TEXTS.items():
            if command == "show" or name in ("returns nothing", "raises KeyError", "syntax error"):
                codes = {"added key": (0, 2), "exits": (2, 5)}.get(name, (2,))
                yield _case(
                    f"{command}: {name}",
                    command,
                    "--config=<here>/c.py",
                    *more,
                    codes=codes,
                    prepare=text("c.py", content),
                )
        for name, path in _ENDINGS.items():
            yield _case(
                f"{command}: {name}",
                command,
                f"--config=<here>/{path}",
                *more,
                prepare=_odd_files,
                seconds=20,
            )
        for arguments in (("--config=",), ("--config",), ("--config=:x",), ("--config=<here>/c.py:x",), ()):
            yield _case(f"{command}: {' '.join(arguments) or 'none'}", command, *arguments, *more)
    yield from _studies()


def _studies() -> Iterator[Case]:
    for name, study in _STUDIES.items():
        content = f"{_BEGIN}return default_config()\n\nSTUDY = {study}\n"
        arguments = ("--config=<here>/c.py", "--workdir=<here>/run")
        yield _case(f"ablate: STUDY is {name}", "ablate", *arguments, prepare=text("c.py", content))


def _odd_files(here: Path, chance: random.Random) -> None:
    text("c.txt", "x = 1")(here, chance)
    os.mkfifo(here / "fifo.py")
    (here / "zero.py").symlink_to("/dev/zero")

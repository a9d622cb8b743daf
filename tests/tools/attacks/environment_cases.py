"""Environments: variables, streams, disks and users."""

from __future__ import annotations

import functools
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

from attacks.case import Case
from attacks.commands import COMMANDS, DIGITS, IMAGE, case, train
from attacks.damage import edit_json, sign, steps, text
from attacks.users import without_a_name, without_privileges

_case = functools.partial(case, "environments")
_train = functools.partial(train, "environments")

_PREDICT = COMMANDS["predict"]
_SOME = ("predict", "report", "evaluate", "prepare folder", "show")
_VARIABLES: dict[str, tuple[dict[str, str | None], tuple[int, ...]]] = {
    "HOME unset": ({"HOME": None}, (0,)),
    "HOME empty": ({"HOME": ""}, (0,)),
    "HOME missing": ({"HOME": "/nonexistent/x"}, (0,)),
    "HOME a file": ({"HOME": "/dev/null"}, (0,)),
    "caches in a file": ({"XDG_CACHE_HOME": "/dev/null", "JAX_COMPILATION_CACHE_DIR": None}, (0,)),
    "compilation cache in a file": ({"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"}, (0, 2)),
    "TMPDIR missing": ({"TMPDIR": "/nonexistent/x"}, (0,)),
    "TMPDIR a file": ({"TMPDIR": "/dev/null"}, (0,)),
    "COLUMNS zero": ({"COLUMNS": "0"}, (0,)),
    "no compiler on PATH": ({"PATH": "/nonexistent", "XDG_CACHE_HOME": "<here>/tmpcache"}, (0,)),
    "compiler that fails": ({"CXX": "/bin/false", "XDG_CACHE_HOME": "<here>/tmpcache"}, (0,)),
    "compiler that is missing": ({"CXX": "nonsense", "XDG_CACHE_HOME": "<here>/tmpcache"}, (0,)),
    "compiler with options": ({"CXX": "c++ -O0", "XDG_CACHE_HOME": "<here>/tmpcache"}, (0,)),
}
_STARTS: dict[str, tuple[dict[str, str | None], tuple[int, ...]]] = {  # read at the start of Python or JAX
    "LC_ALL=C": ({"LC_ALL": "C", "LANG": "C"}, (0,)),
    "output in ASCII": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, (0,)),
    "a locale that is not there": ({"LC_ALL": "nonsense"}, (0,)),
    "JAX_PLATFORMS=cuda": ({"JAX_PLATFORMS": "cuda"}, (2,)),
    "JAX_PLATFORMS=nonsense": ({"JAX_PLATFORMS": "nonsense"}, (2,)),
    "JAX_PLATFORMS empty": ({"JAX_PLATFORMS": ""}, (0,)),
    "HOME unset": ({"HOME": None}, (0,)),
    "TMPDIR missing": ({"TMPDIR": "/nonexistent/x"}, (0,)),
}
# Redirections of the shell and exit codes. A closed pipe ends a command silently.
_STREAMS: dict[str, tuple[int, ...]] = {
    "<&-": (0,),
    ">&-": (0, 1, 2, 75),
    "2>&-": (0,),
    "<&- >&- 2>&-": (0, 1, 2, 75),
    ">/dev/full": (1, 2, 75),
    "2>/dev/full": (0,),
    "| true": (0, 1, 2, 75),
}
_ACCENTS = "caf\u00e9 \u6f22\u5b57"


def cases() -> Iterator[Case]:
    for name, (variables, codes) in _VARIABLES.items():
        yield _train(f"train with {name}", environment=variables, codes=codes, seconds=90)
        yield _case(f"predict with {name}", "predict", *_PREDICT, environment=variables, codes=codes)
    for name, (variables, codes) in _STARTS.items():
        yield _case(
            f"predict, {name}",
            "predict",
            *_with_accents(),
            environment=variables,
            codes=codes,
            python=(),
            copies=("image_run",),
            prepare=_accents,
        )
        yield _train(f"train, {name}", environment=variables, codes=codes, python=())
    for redirect, codes in _STREAMS.items():
        for command in _SOME:
            yield _case(
                f"{command} {redirect}",
                command,
                *COMMANDS[command],
                redirect=redirect,
                codes=codes,
                python=(),
            )
        yield _train(f"train {redirect}", redirect=redirect, codes=codes, python=())
    yield _case("without docstrings", "show", *COMMANDS["show"], python=("-OO",), codes=(0,))
    yield _case("help without docstrings", "convert", "--help", python=("-OO",), codes=(0,))
    yield from _users()
    yield from _limits()


def _with_accents() -> tuple[str, ...]:
    return "<here>/image_run", "<here>/caf\u00e9.png", "--format=text"


def _accents(here: Path, chance: random.Random) -> None:
    """Write a class and a file with names that are not ASCII."""
    card = "image_run/checkpoints/4"
    names = edit_json(f"{card}/card/metadata", "class_names", [_ACCENTS, "b", "c"])
    steps(names, sign(card))(here, chance)
    source = here.parent.parent / "parts" / IMAGE.replace("<images>", "images")
    text("caf\u00e9.png", source.read_bytes())(here, chance)


def _users() -> Iterator[Case]:
    """Users without a name, as in containers, and folders without write permission."""
    options = {"first": without_a_name}
    nobody = {"HOME": None, "XDG_CACHE_HOME": None, "JAX_COMPILATION_CACHE_DIR": None, "USER": None}
    yield _train(
        "train as a user without a name and HOME", environment=nobody, codes=(0,), seconds=120, **options
    )
    yield _case(
        "predict as a user without a name and HOME",
        "predict",
        *_PREDICT,
        environment=nobody,
        codes=(0,),
        seconds=120,
        **options,
    )
    closed = {"first": without_privileges, "prepare": _closed}
    places = {
        "train": ("train", DIGITS, "--workdir={}"),
        "report": ("report", "<image_run>", "--out={}/x.html"),
        "export": ("export", *_PREDICT[:1], "{}/x.jax", "--platforms=cpu"),
        "convert": ("convert", "<structvit_run>", "{}/x"),
        "shards": ("prepare shards", "<images>", "{}/x", "--images"),
        "prepare": ("prepare folder", "<images>", "--images", "--out={}/x"),
        "features": ("predict", *_PREDICT, "--features={}/x"),
        "evaluate": ("evaluate", "<image_run>", "--out={}/x"),
    }
    for name, (command, *arguments) in places.items():
        filled = [argument.replace("{}", "<here>/closed") for argument in arguments]
        yield _case(
            f"{name} into a folder that is closed",
            command,
            *filled,
            environment={"XDG_CACHE_HOME": "<here>/home"},
            **closed,
        )


def _closed(here: Path, chance: random.Random) -> None:
    del chance
    (here / "closed").mkdir(mode=0o555)


def _limits() -> Iterator[Case]:
    """A limit on the size of files, as on a full disk, on open files, and a deleted working directory."""
    full = {"first": _small_files, "environment": {"JAX_COMPILATION_CACHE_DIR": None}}
    yield _train("train on a full disk", "--config.mesh.compilation_cache=", codes=(2, 75), **full)
    for command in ("export", "explain", "convert", "prepare shards", "report"):
        yield _case(
            f"{command} to a full disk",
            command,
            *COMMANDS[command],
            codes=(0, 2) if command == "convert" else (2,),
            **full,
        )
    for command in _SOME:
        yield _case(
            f"{command} with 64 open files", command, *COMMANDS[command], first=_few_files, codes=(0, 2)
        )
        yield _case(
            f"{command} in a folder that is gone", command, *COMMANDS[command], first=_gone, codes=(0, 2)
        )
        yield _case(f"{command} with umask 777", command, *COMMANDS[command], first=_umask, codes=(0, 2))


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def _gone() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def _umask() -> None:
    os.umask(0o777)

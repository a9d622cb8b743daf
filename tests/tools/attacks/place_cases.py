"""Checkpoints that do not exist, and outputs that cannot be written."""

from __future__ import annotations

import functools
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

from attacks.case import Case, Result
from attacks.commands import ARMS, COMMANDS, DIGITS, IMAGE, case, short
from attacks.damage import folder, text
from attacks.names import LONG, NINES

_case = functools.partial(case, "places")

_REMOTE = ("gs://bucket/x", "s3://bucket/x", "http://<silent>/x")

# Places that hold no checkpoint, for every command that takes one.
_NO_CHECKPOINT = (
    "",
    "<here>/missing",
    "<here>",
    "/dev/null",
    "/dev/null/x",
    "<images>",
    IMAGE,
    "<image_run>/checkpoints/99",
    f"<image_run>/checkpoints/{NINES}",
    "<image_run>/checkpoints/\u00b2",
    LONG,
    "\udcff",
    "~nobody/x",
)
_TAKE_CHECKPOINT = {
    "predict": ("{}", IMAGE),
    "explain": ("{}", IMAGE, "--out=<here>/out"),
    "export": ("{}", "<here>/out.jax"),
    "evaluate": ("{}",),
    "prepare label_maps": ("{}", "<here>/out"),
    "convert": ("{}", "<here>/out"),
    "report": ("{}", "--out=<here>/out.html"),
    "train": (DIGITS, "--config.init_from={}", "--workdir=<here>/run"),
}

# Outputs that cannot be written, for every command that writes.
_UNWRITABLE = ("<here>/file/x", f"<here>/{LONG}", "\udcff/../file/x")
_WRITE = {
    "train": ("train", DIGITS, "--workdir={}"),
    "show": ("show", DIGITS, "--data", "--workdir={}"),
    "plan": ("plan", DIGITS, "--workdir={}"),
    "features": ("predict", *COMMANDS["predict"], "--features={}"),
    "explain": ("explain", *COMMANDS["explain"][:2], "--out={}"),
    "export": ("export", "<image_run>", "--platforms=cpu", "{}"),
    "report": ("report", "<image_run>", "--out={}"),
    "evaluate": ("evaluate", "<image_run>", "--out={}"),
    "convert": ("convert", "<structvit_run>", "{}"),
    "convert to a file": ("convert", "<structvit_run>", "{}.safetensors"),
    "prepare": ("prepare folder", "<images>", "--images", "--out={}"),
    "shards": ("prepare shards", "<images>", "{}", "--images"),
    "label maps": ("prepare label_maps", "<structvit_run>", "{}"),
    "ablate": ("ablate", DIGITS, *ARMS, "--workdir={}"),
}
_WRITES_NOTHING = ("plan",)
_FILES = ("export", "report", "convert to a file")  # whose output is a file, not a folder


def cases() -> Iterator[Case]:
    for command, arguments in _TAKE_CHECKPOINT.items():
        for place in _NO_CHECKPOINT:
            if place or command != "train":  # whose config.init_from="" is valid
                filled = [argument.replace("{}", place) for argument in arguments]
                yield _case(f"{command} of {short(place)}", command, *filled)
        for place in _REMOTE:
            filled = [argument.replace("{}", place) for argument in arguments]
            name = f"{command} of {place}"
            yield _case(name, command, *filled, codes=(2, 75), first=_impatient)
    for name, (command, *arguments) in _WRITE.items():
        codes = (0, 2) if name in _WRITES_NOTHING else (2,)
        remote = (0, 2, 75) if name in _WRITES_NOTHING else (2, 75)
        places = [*_UNWRITABLE, *(["<here>/folder"] * (name in _FILES))]
        for place in places:
            filled = [argument.replace("{}", place) for argument in arguments]
            yield _case(f"{name} to {short(place)}", command, *filled, codes=codes, prepare=_file)
        for place in _REMOTE:
            filled = [argument.replace("{}", place) for argument in arguments]
            yield _case(f"{name} to {place}", command, *filled, codes=remote, first=_impatient)
        if name in ("export", "report") and os.geteuid() == 0:
            filled = [argument.replace("{}", "<here>/null") for argument in arguments]
            yield _case(
                f"{name} to a device",
                command,
                *filled,
                codes=(0, 2),
                prepare=_device,
                check=_still_a_device,
            )


def _file(here: Path, chance: random.Random) -> None:
    text("file", "")(here, chance)
    for name in ("folder", "folder.safetensors"):
        folder(name)(here, chance)


def _device(here: Path, chance: random.Random) -> None:
    """Make a second /dev/null, which an attacked command may replace."""
    del chance
    os.mknod(here / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def _still_a_device(here: Path, result: Result) -> str:
    del result
    return "" if stat.S_ISCHR(os.lstat(here / "null").st_mode) else "the device was replaced by a file"


def _impatient() -> None:
    """Try buckets as often as the client does, but without its minute of pauses."""
    from gcsfs import retry

    retry.min = lambda *pauses: 0.01

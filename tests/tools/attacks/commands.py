"""A valid command line of every command, for the tables to change; helpers that several tables use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attacks.case import Case, Result
from attacks.damage import DELETED
from attacks.names import MARKER
from attacks.sandbox import TINY

DIGITS = f"{TINY}:digits"
IMAGE = "<images>/val/one/0.png"
CLIP = "<clips>/val/one/0.mp4"
IMAGE_FOLDER = (f"{TINY}:images", "--config.data.root=<images>")
ARMS = ("--arms=a: model.structure_dim=1", "--arms=b: model.structure_dim=2")

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": (DIGITS, "--workdir=<here>/run"),
    "main": (DIGITS, "--workdir=<here>/run"),
    "show": (DIGITS,),
    "plan": (DIGITS,),
    "predict": ("<image_run>", IMAGE),
    "explain": ("<image_run>", IMAGE, "--out=<here>/out"),
    "export": ("<image_run>", "<here>/out.jax", "--platforms=cpu"),
    "report": ("<image_run>", "--out=<here>/out.html"),
    "evaluate": ("<image_run>",),
    "convert": ("<structvit_run>", "<here>/out.safetensors"),
    "prepare folder": ("<images>", "--images", "--out=<here>/out"),
    "prepare shards": ("<images>", "<here>/out", "--images"),
    "prepare label_maps": ("<structvit_run>", "<here>/out"),
    "ablate": (DIGITS, *ARMS, "--seeds=1", "--workdir=<here>/out"),
    "bench input": (CLIP, f"{TINY}:clips", "--rounds=1"),
    "plan --program": ("--program=<root>/tests/fixtures/programs/scanned.txt",),
    "check": ("--device=cpu",),
}
_MODULES = {"main": "structvit_jax.main"}  # all others are subcommands of structvit


def case(group: str, name: str, command: str, *arguments: str, **options: Any) -> Case:
    """Return a case of a command of `COMMANDS`."""
    if command in _MODULES:
        return Case(group, name, _MODULES[command], arguments, **options)
    subcommands = command.partition(" --")[0].split()
    return Case(group, name, "structvit_jax", (*subcommands, *arguments), **options)


def train(group: str, name: str, *arguments: str, config: str = DIGITS, **options: Any) -> Case:
    """Return a case of `structvit train`."""
    return case(group, name, "train", config, "--workdir=<here>/run", *arguments, **options)


def nothing_executed(here: Path, result: Result) -> str:
    """Check that no code of a file was executed."""
    del result
    marker = here.parent.parent / MARKER
    if marker.exists():
        marker.unlink()
        return "code that the file holds was executed"
    return ""


def shown(value: Any) -> str:
    """Return a value as the name of a case shows it."""
    if value is DELETED:
        return "deleted"
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)})"


def short(text: str) -> str:
    """Return an argument as the name of a case shows it."""
    text = text.encode("unicode_escape", "surrogatepass").decode()
    return text if len(text) <= 60 else f"{text[:20]}...{text[-10:]} ({len(text)})"

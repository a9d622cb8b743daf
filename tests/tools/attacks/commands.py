"""Every command with arguments that are right, for tables to change; and marks that cases check for."""

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
ARMS = "--config.ablate.arms=('a: model.structure_dim=1','b: model.structure_dim=2')"

COMMANDS: dict[str, tuple[str, ...]] = {
    "main": (DIGITS, "--mode=show"),
    "predict": ("--checkpoint=<image_run>", IMAGE),
    "explain": ("--checkpoint=<image_run>", IMAGE, "--out=<here>/out"),
    "export": ("--checkpoint=<image_run>", "<here>/out.jax", "--platforms=cpu"),
    "report": ("<image_run>", "--out=<here>/out.html"),
    "evaluate": ("<image_run>",),
    "convert": ("<structvit_run>", "<here>/out.safetensors"),
    "data.prepare": ("folder", "<images>", "--images", "--out=<here>/out"),
    "data.shards": ("<images>", "<here>/out", "--images"),
    "label_maps": ("<structvit_run>", "<here>/out"),
    "ablate": (DIGITS, ARMS, "--config.ablate.seeds=1", "--workdir=<here>/out"),
    "motion": ("<here>/out.png", "--clips=8"),
    "data.bench": (f"--video={CLIP}", f"--image={IMAGE}", "--clips=2", "--memory=0"),
    "traffic": ("<root>/tests/fixtures/programs/scanned.txt",),
}


def case(group: str, name: str, command: str, *arguments: str, **options) -> Case:
    """A case of a command of the package, by its name in `COMMANDS`."""
    return Case(group, name, f"structvit_jax.{command}", arguments, **options)


def main(group: str, name: str, *arguments: str, config: str = DIGITS, **options) -> Case:
    """A training, unless arguments name another mode."""
    return case(group, name, "main", config, "--workdir=<here>/run", *arguments, **options)


def nothing_executed(here: Path, result: Result) -> str:
    """For `check`: no code of a file has run."""
    del result
    marker = here.parent.parent / MARKER
    if marker.exists():
        marker.unlink()
        return "code that the file holds was executed"
    return ""


def shown(value: Any) -> str:
    """A value as it is shown in the name of a case."""
    if value is DELETED:
        return "deleted"
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:20]}... ({len(shown)})"


def short(value: str) -> str:
    """A value as it is shown in the name of a case."""
    value = value.encode("unicode_escape", "surrogatepass").decode()
    return value if len(value) <= 60 else f"{value[:20]}...{value[-10:]} ({len(value)})"

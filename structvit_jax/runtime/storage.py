"""Files of a run, on a disk or in a bucket: always written whole, never appended to."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from etils import epath

from structvit_jax.training.card import check_card
from structvit_jax.utils.errors import UnreachableError, UserError, is_transient, os_errors_as, parse_json
from structvit_jax.utils.paths import is_bucket

# What a run leaves in its workdir, for all that read it.
CONFIG, METRICS, RESULT, PREDICTIONS = "config.json", "metrics.jsonl", "result.json", "predictions.npz"


def write(path: epath.Path, content: str | bytes) -> None:
    """Write a file whole or not at all: an object in a bucket is, a file on a disk is renamed into place.

    Raises:
      UserError: there is something at `path` that is not a regular file, as a device or a link.
    """
    content = content.encode() if isinstance(content, str) else content
    check_replaceable(path)
    if is_bucket(path):
        path.write_bytes(content)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure may keep the name and lose the content
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def check_replaceable(path: epath.Path) -> None:
    """Raise UserError if there is something at `path` that is not a regular file: it is never replaced."""
    if is_bucket(path):
        return
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"{path} is {kind} and is not replaced; choose another output")


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    """Writes a value as indented JSON, see `write`."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """The object that a file holds; None where it holds none.

    Raises:
      OSError: it is not there, or cannot be read.
    """
    try:
        value = parse_json(path.read_bytes())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_card(checkpoint: epath.Path) -> dict[str, Any]:
    """Read the card of a checkpoint.

    Args:
      checkpoint: the folder of its step.

    Raises:
      UserError: it is missing, or not a valid card.
    """
    path = checkpoint / "card" / "metadata"  # as Orbax names the JSON of an item
    try:
        return check_card(read_json(path), path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {checkpoint} is no checkpoint of structvit_jax") from error


def io_errors_as_user_error(workdir: epath.Path) -> AbstractContextManager[None]:
    """Turn what a disk or a bucket refuses into one line.

    Raises:
      UserError: names the file and the reason; what was saved before is kept.
      UnreachableError: a bucket does not answer.
    """
    return os_errors_as(
        lambda error, reason: unusable_error(
            getattr(error, "filename", None) or workdir, reason, workdir, error
        )
    )


def unusable_error(place: Any, reason: str, workdir: epath.Path, error: Exception) -> UserError:
    """Return the error for a file that cannot be read or written; resumable if it may pass by itself."""
    inside = str(place).startswith(f"{workdir}/")  # so that the workdir was there
    if inside and not is_bucket(workdir) and not workdir.exists():
        return UserError(
            f"{workdir} is gone: it was removed or renamed while the run was using it; put it back and"
            " re-run the command to resume, or start again"
        )
    reason = f"{place} cannot be used: {' '.join(reason.split())[:300]}"
    kept = f"What was saved before in {workdir} is as it was"
    if is_transient(error, reason if is_bucket(workdir) else ""):
        return UnreachableError(f"{reason}. {kept}; the same command resumes")
    advice = "resolve that and re-run the command to resume, or choose another --workdir"
    return UserError(f"{reason}. {kept}; {advice}")

"""Read and write the files of a run, on a disk or in a bucket. Writes are atomic."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from etils import epath

from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import UnreachableError, is_transient, os_errors_as, parse_json
from structvit_jax.utils.paths import is_bucket

# Files of a run in its workdir.
CONFIG, METRICS, RESULT, PREDICTIONS = "config.json", "metrics.jsonl", "result.json", "predictions.npz"


def write(path: epath.Path, content: str | bytes) -> None:
    """Write a file atomically.

    On a disk, a temporary file is written and renamed. In a bucket, all writes are atomic.

    Raises:
      UserError: `path` exists and is not a regular file; see `check_replaceable`.
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
            os.fsync(file.fileno())  # otherwise the file could be empty after a power failure
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def check_replaceable(path: epath.Path) -> None:
    """Raise UserError if `path` is a folder, link or device. These are never replaced."""
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
    """Write a value as indented JSON; see `write`."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file holds anything else.

    Raises:
      OSError: the file does not exist or cannot be read.
    """
    try:
        value = parse_json(path.read_bytes())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def io_errors_as_user_error(workdir: epath.Path) -> AbstractContextManager[None]:
    """Turn errors of a disk or a bucket into user errors, for the files of a run.

    Raises:
      UserError: a file cannot be used; the message names it and the reason.
      UnreachableError: a bucket does not answer.
    """

    def to_error(error: Exception, reason: str) -> UserError:
        return unusable_error(getattr(error, "filename", None) or workdir, reason, workdir, error)

    return os_errors_as(to_error)


def unusable_error(path: object, reason: str, workdir: epath.Path, error: Exception) -> UserError:
    """Return the error for a file of a run that cannot be used.

    Its exit code is that of a resumable run if a retry may succeed.
    """
    is_inside = str(path).startswith(f"{workdir}/")  # if so, the workdir existed before
    if is_inside and not is_bucket(workdir) and not workdir.exists():
        return UserError(
            f"{workdir} is gone: it was removed or renamed while the run was using it; put it back and"
            " re-run the command to resume, or start again"
        )
    problem = f"{path} cannot be used: {' '.join(reason.split())[:300]}"
    kept = f"Earlier files in {workdir} are unchanged"
    if is_transient(error, reason if is_bucket(workdir) else ""):
        return UnreachableError(f"{problem}. {kept}; re-run the command to resume")
    advice = "fix the cause and re-run the command to resume, or choose another --workdir"
    return UserError(f"{problem}. {kept}; {advice}")

"""Files of a run, on a disk or in a bucket: always written whole, never appended to."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from structvit_jax.errors import UnreachableError, UserError

# What a run leaves in its workdir, for all that read it.
CONFIG, METRICS, RESULT, PREDICTIONS = "config.json", "metrics.jsonl", "result.json", "predictions.npz"
_CLIENTS = ("gcsfs", "aiohttp", "google")  # whose exceptions are a bucket's failures
# What passes by itself: no answer, or one of the server's own troubles.
_PASSING = r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED)\b|\b(?:429|50[0-4])\b"


def is_bucket(path: epath.Path) -> bool:
    """Whether a path is a URL, as gs://BUCKET/PATH."""
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path that Orbax takes."""
    return path if is_bucket(path) else path.resolve()


def write(path: epath.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: an object of a bucket is, a file of a disk is renamed into place."""
    content = content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        path.write_bytes(content)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses power may keep the name and not the content
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    """Writes a value as indented JSON, see `write`."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """The object that a file holds; None where it holds none.

    Raises:
      OSError: it is not there, or cannot be read.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def naming_failures(workdir: epath.Path) -> Iterator[None]:
    """Turns what a disk or bucket refuses into one line.

    Raises:
      UserError: names the file and the reason; what was saved before stays as it was.
      UnreachableError: a bucket does not answer.
    """
    try:
        yield
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        raise unusable(error.filename or workdir, error.strerror or str(error), workdir, error) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        raise unusable(workdir, str(error) or type(error).__name__, workdir, error) from error


def unusable(place: Any, reason: str, workdir: epath.Path, error: Exception) -> UserError:
    """What to raise for a file that cannot be read or written: a mistake, unless it may pass by itself."""
    inside = str(place).startswith(f"{workdir}/")  # so that the workdir was there
    if inside and not is_bucket(workdir) and not workdir.exists():
        return UserError(
            f"{workdir} is gone: it was removed or renamed while the run was using it; put it back and"
            " re-run the command to resume, or start again"
        )
    reason = f"{place} cannot be used: {' '.join(reason.split())[:300]}"
    kept = f"What was saved before in {workdir} is as it was"
    code = getattr(error, "code", getattr(error, "status", reason if is_bucket(workdir) else ""))
    if isinstance(error, TimeoutError | ConnectionError) or re.search(_PASSING, str(code)):
        return UnreachableError(f"{reason}. {kept}; the same command resumes")
    return UserError(f"{reason}. {kept}; mend that and the same command goes on, or choose another --workdir")

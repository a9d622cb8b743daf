"""Files of a run, on a disk or in a bucket: always written whole, never appended to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from structvit_jax.errors import UserError

_CLIENTS = ("gcsfs", "aiohttp", "google")  # whose exceptions are a bucket's failures


def is_bucket(path: epath.Path) -> bool:
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    return path if is_bucket(path) else path.resolve()


def write(path: epath.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: an object of a bucket is, a file of a disk is renamed into place."""
    content = content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
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
    """
    try:
        yield
    except OSError as error:
        raise unusable(error.filename or workdir, error.strerror or str(error), workdir) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        raise unusable(workdir, str(error) or type(error).__name__, workdir) from error


def unusable(place: Any, reason: str, workdir: epath.Path) -> UserError:
    return UserError(
        f"{place} cannot be used: {' '.join(reason.split())[:300]}. What was saved before in {workdir} is as"
        " it was; mend that and the same command goes on, or choose another --workdir"
    )

"""Paths on a disk, or in a bucket as gs://BUCKET/PATH."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from importlib.util import find_spec

from etils import epath

from structvit_jax.utils.errors import UnreachableError, UserError, is_transient, os_errors_as


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL, as gs://BUCKET/PATH."""
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """Return the path in the form that Orbax takes."""
    return path if is_bucket(path) else path.resolve()


def parse_path(text: str) -> epath.Path:
    """Return the path of a file or folder to read or write, on a disk or in a bucket.

    Raises:
      UserError: another kind of URL, as s3:// or http://, or a bucket without its client.
    """
    scheme, separator, _ = text.partition("://")
    if separator and scheme != "gs":
        raise UserError(f"{text!r} cannot be used: name a folder, or gs://BUCKET/PATH")
    if separator and find_spec("gcsfs") is None:
        raise UserError(f"{text!r} needs gcsfs: pip install 'structvit_jax[gcs]'")
    if separator:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what matters it raises
    return epath.Path(text)


def write_errors_as_user_error(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Turn what refuses an output, a file or a folder on a disk or in a bucket, into one line.

    Raises:
      UserError: names the path and the reason.
      UnreachableError: a bucket does not answer.
    """

    def to_error(error: Exception, reason: str) -> UserError:
        place = getattr(error, "filename", None)
        where = place if isinstance(place, str) and place.startswith(f"{path}{os.sep}") else path
        line = f"{where} cannot be written: {reason}"
        if is_transient(error, reason if is_bucket(path) else ""):
            return UnreachableError(f"{line}; try again")
        return UserError(f"{line}; choose another place")

    return os_errors_as(to_error)


def check_local(path: str) -> None:
    """Check that the path of an output is on a local disk.

    Raises:
      UserError: it is a URL, as gs://BUCKET/PATH.
    """
    if is_bucket(path):
        raise UserError(f"{path} cannot be written: choose a path on a local disk")

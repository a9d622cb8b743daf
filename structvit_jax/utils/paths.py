"""Paths on a local disk, or in a bucket (gs://BUCKET/PATH)."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from importlib.util import find_spec

from etils import epath

from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import UnreachableError, is_transient, os_errors_as


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL, such as gs://BUCKET/PATH."""
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """Return the absolute path, which Orbax requires."""
    return path if is_bucket(path) else path.resolve()


def parse_path(text: str) -> epath.Path:
    """Return the path of a file or folder on a local disk or in a bucket.

    Raises:
      UserError: the path is another kind of URL, such as s3:// or http://; or it is in a bucket, and gcsfs is
        not installed.
    """
    if is_bucket(text):
        if not text.startswith("gs://"):
            raise UserError(f"{text!r} cannot be used: use a local path, or gs://BUCKET/PATH")
        if find_spec("gcsfs") is None:
            raise UserError(f"{text!r} needs gcsfs: pip install 'structvit_jax[gcs]'")
        for name in ("gcsfs", "google.auth"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they raise every error that they log, too
    return epath.Path(text)


def write_errors_as_user_error(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Turn errors of writing to a file or folder into user errors, on a local disk or in a bucket.

    Raises:
      UserError: the path cannot be written; the message names it and the reason.
      UnreachableError: a bucket does not answer.
    """

    def to_error(error: Exception, reason: str) -> UserError:
        inner = getattr(error, "filename", None)
        is_inside = isinstance(inner, str) and inner.startswith(f"{path}{os.sep}")
        line = f"{inner if is_inside else path} cannot be written: {reason}"
        if is_transient(error, reason if is_bucket(path) else ""):
            return UnreachableError(f"{line}; try again")
        return UserError(f"{line}; choose another path")

    return os_errors_as(to_error)


def check_local(path: str) -> None:
    """Raise UserError for an output that is not on a local disk."""
    if is_bucket(path):
        raise UserError(f"{path} cannot be written: choose a path on a local disk")

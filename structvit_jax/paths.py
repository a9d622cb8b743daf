"""Paths on a disk, or in a bucket as gs://BUCKET/PATH."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec

from etils import epath

from structvit_jax.errors import UnreachableError, UserError, may_pass, system_failure


def is_bucket(path: epath.Path) -> bool:
    """Whether a path is a URL, as gs://BUCKET/PATH."""
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path that Orbax takes."""
    return path if is_bucket(path) else path.resolve()


def workplace(text: str) -> epath.Path:
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


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what refuses an output, a file or a folder on a disk or in a bucket, into one line.

    Raises:
      UserError: names the path and the reason.
      UnreachableError: a bucket does not answer.
    """
    try:
        yield
    except BrokenPipeError:  # of standard output
        raise
    except Exception as error:
        if not (reason := system_failure(error)):
            raise
        place = getattr(error, "filename", None)
        where = place if isinstance(place, str) and place.startswith(f"{path}{os.sep}") else path
        line = f"{where} cannot be written: {reason}"
        if may_pass(error, reason if "://" in str(path) else ""):
            raise UnreachableError(f"{line}; try again") from error
        raise UserError(f"{line}; choose another place") from error


def check_local(path: str) -> None:
    """Check that an output that is written to a local disk alone is not given as a URL.

    Raises:
      UserError: it is, as gs://BUCKET/PATH.
    """
    if "://" in path:
        raise UserError(f"{path} cannot be written: choose a path on a local disk")

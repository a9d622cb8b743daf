"""Failures of decoders, the operating system and services as exceptions with a one-line reason."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from structvit_jax.utils.errors import EXIT_RESUMABLE, UserError

_BUCKET_CLIENTS = ("gcsfs", "aiohttp", "google")  # packages whose exceptions report that a bucket failed
# Status codes of services that do not answer or are overloaded.
_TRANSIENT = r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED)\b|\b(?:429|50[0-4])\b"


class UnreachableError(UserError):
    """A service does not answer; the same command may work later."""

    exit_code = EXIT_RESUMABLE


class DecodeError(Exception):
    """An example cannot be read; the message is the reason, without the name of the file."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turn every exception except MemoryError into `DecodeError`.

    On damaged files, decoders raise exceptions of any type.
    """
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        raise DecodeError(_reason(error)) from error


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document.

    Raises:
      ValueError: the document is invalid or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def system_failure(error: BaseException) -> str:
    """Return the message of an error of the operating system or of a bucket's client; "" for other errors."""
    is_system = isinstance(error, OSError) or type(error).__module__.split(".")[0] in _BUCKET_CLIENTS
    return _reason(error)[:300] if is_system else ""


def _reason(error: BaseException) -> str:
    """Return the message of an exception as one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())


@contextlib.contextmanager
def os_errors_as(to_error: Callable[[Exception, str], UserError]) -> Iterator[None]:
    """Raise `to_error(error, reason)` for an error of the operating system or of a bucket's client.

    All other exceptions are raised unchanged. So is BrokenPipeError, which means that standard output was
    closed.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if not (reason := system_failure(error)):
            raise
        raise to_error(error, reason) from error


def is_transient(error: BaseException, reason: str = "") -> bool:
    """Return whether a retry may succeed.

    This depends on the type and the status code of the exception. If it has no status code, `reason` is
    searched for one.
    """
    status = getattr(error, "code", getattr(error, "status", reason))
    return isinstance(error, TimeoutError | ConnectionError) or bool(re.search(_TRANSIENT, str(status)))


def printable(text: str) -> str:
    """Return text as one line that is safe to print, with unprintable characters escaped.

    This escapes control characters, line breaks, marks that reverse the direction of text, and bytes in paths
    that are not valid UTF-8.
    """

    def escape(char: str) -> str:
        if "\udc80" <= char <= "\udcff":  # Python's representation of a byte that is not UTF-8
            return f"\\x{ord(char) - 0xDC00:02x}"
        return char.encode("unicode_escape").decode()

    return "".join(char if char.isprintable() else escape(char) for char in text)

"""Exceptions, exit codes, one-line error messages and did-you-mean suggestions."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

EXIT_RESUMABLE = 75  # exit code (EX_TEMPFAIL): re-running the same command resumes
EXIT_USER_ERROR = 2  # exit code: manual intervention is required first
EXIT_INTERRUPTED = 130  # exit code: Ctrl-C, as shells report it
_BUCKET_CLIENTS = ("gcsfs", "aiohttp", "google")  # packages whose exceptions are failures of a bucket
# Failures that may pass by themselves: no answer, or an overloaded server.
_PASSING = r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED)\b|\b(?:429|50[0-4])\b"


class UserError(ValueError):
    """Something the user wrote is wrong; the message is one line and names the way out."""

    exit_code = EXIT_USER_ERROR


class UnreachableError(UserError):
    """A place does not answer, which may pass by itself."""

    exit_code = EXIT_RESUMABLE


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop, and has saved what it had; the message is one line."""


class DecodeError(Exception):
    """An example cannot be read; the message is the reason, without the file's name."""


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turns whatever a decoder raises on a damaged file into a `DecodeError`: they raise anything."""
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodeError(" ".join(reason.split())) from error


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON document holds.

    Raises:
      ValueError: it is not valid, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def system_failure(error: BaseException) -> str:
    """Return what the operating system or a bucket's client says in an exception; "" for other kinds of
    exceptions, which are bugs."""
    if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _BUCKET_CLIENTS:
        return ""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:300]


@contextlib.contextmanager
def os_errors_as(to_error: Callable[[Exception, str], UserError]) -> Iterator[None]:
    """Raise `to_error(error, reason)` in the place of what the operating system or a bucket refuses.

    Other exceptions are bugs and pass, and so does a closed standard output.
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
    """Return whether a failure may pass by itself; `reason` is searched where the exception has no code."""
    code = getattr(error, "code", getattr(error, "status", reason))
    return isinstance(error, TimeoutError | ConnectionError) or bool(re.search(_PASSING, str(code)))


def printable(text: str) -> str:
    """Return text as one line that is safe to print: every unprintable character becomes its escape.

    Escape sequences of terminals, line breaks, marks that reverse the direction of text, and bytes of a path
    that are not UTF-8 are among them.
    """

    def shown(c: str) -> str:
        if c.isprintable():
            return c
        if "\udc80" <= c <= "\udcff":  # a byte that is not UTF-8, as Python keeps it
            return f"\\x{ord(c) - 0xDC00:02x}"
        return c.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return ' Did you mean ...?' with the nearest of `words`, or list them all if none is near."""
    words = sorted(words)
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    if near:
        return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
    return " Known: " + ", ".join(words) + "."


def unknown_choice(what: str, word: str, words: Iterable[str]) -> UserError:
    """The error for a word that is none of `words`; `what` is the kind of thing that they name."""
    return UserError(f"unknown {what} {word!r}.{did_you_mean(word, words)}")


def check_choice(what: str, word: str, words: Collection[str]) -> str:
    """The word itself, if it is one of `words`; raises `unknown` otherwise."""
    if word not in words:
        raise unknown_choice(what, word, words)
    return word

"""How things go wrong: exceptions, exit codes, and the words that help to mend a mistake."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Collection, Iterable, Iterator

RESUMABLE = 75  # exit code (EX_TEMPFAIL): nothing needs mending, the same command goes on
MISTAKE = 2  # exit code: a person has to change something first


class UserError(ValueError):
    """Something the user wrote is wrong; the message is one line and names the way out."""

    exit_code = MISTAKE


class UnreachableError(UserError):
    """A place does not answer, which may pass by itself."""

    exit_code = RESUMABLE


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


@contextlib.contextmanager
def exit_in_one_line() -> Iterator[None]:
    """For commands: a user's mistake becomes one line and its exit code, a run that stopped another."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except Stopped as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(RESUMABLE) from stop


def printable(text: str) -> str:
    """Return a name or path as one line of plain text: control characters and undecodable bytes escaped."""

    def shown(c: str) -> str:
        if c.isprintable():
            return c
        if "\udc80" <= c <= "\udcff":  # a byte that is not UTF-8, as Python keeps it
            return f"\\x{ord(c) - 0xDC00:02x}"
        return c.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the nearest of `words`, or all of them if none is near."""
    words = sorted(words)
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    if near:
        return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
    return " Known: " + ", ".join(words) + "."


def unknown(what: str, word: str, words: Iterable[str]) -> UserError:
    """The error for a word that is none of `words`; `what` is the kind of thing that they name."""
    return UserError(f"unknown {what} {word!r}.{did_you_mean(word, words)}")


def known(what: str, word: str, words: Collection[str]) -> str:
    """The word itself, if it is one of `words`; raises `unknown` otherwise."""
    if word not in words:
        raise unknown(what, word, words)
    return word

"""Exceptions, exit codes, one-line error messages and did-you-mean suggestions."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

RESUMABLE = 75  # exit code (EX_TEMPFAIL): re-running the same command resumes
MISTAKE = 2  # exit code: manual intervention is required first
INTERRUPTED = 130  # exit code: Ctrl-C, as shells report it
_BUCKET_CLIENTS = ("gcsfs", "aiohttp", "google")  # packages whose exceptions are failures of a bucket
# Failures that may pass by themselves: no answer, or an overloaded server.
_PASSING = r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED)\b|\b(?:429|50[0-4])\b"


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
def translating(to_error: Callable[[Exception, str], UserError]) -> Iterator[None]:
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


def may_pass(error: BaseException, reason: str = "") -> bool:
    """Return whether a failure may pass by itself; `reason` is searched where the exception has no code."""
    code = getattr(error, "code", getattr(error, "status", reason))
    return isinstance(error, TimeoutError | ConnectionError) or bool(re.search(_PASSING, str(code)))


@contextlib.contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Run the body of a command: an expected failure becomes one line on stderr and an exit code.

    Expected are `UserError`, `Stopped`, Ctrl-C, a standard output that cannot be written, and what the
    operating system or a bucket refuses. Any other exception is a bug and keeps its traceback.
    """
    _protect_output()
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now, while a failure can be reported
    except BrokenPipeError:  # the reader of the output has ended, and expects no more
        os._exit(1)
    except Stopped as stop:
        _print_error(str(stop))
        raise SystemExit(RESUMABLE) from stop
    except KeyboardInterrupt as interrupt:
        _print_error("interrupted")
        raise SystemExit(INTERRUPTED) from interrupt
    except UserError as error:
        _print_error(f"error: {error}")
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        if not (reason := system_failure(error)):
            raise
        where = getattr(error, "filename", None)
        kind = UnreachableError if may_pass(error) else UserError
        failure = kind(f"{where} cannot be used: {reason}" if where else reason)
        _print_error(f"error: {failure}")
        raise SystemExit(failure.exit_code) from failure


def _without_closed_loops(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a hook that leaves out what TensorStore's reads raise which end after one of them has failed."""

    def unraisablehook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return unraisablehook


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # nowhere to print it; the exit code remains
        print(printable(line), file=sys.stderr, flush=True)


class _Output(io.FileIO):
    """Standard output that reports its first failure as an error of the user's and then drops the rest.

    A terminal that is gone is no failure: SIGHUP comes with it, and a run saves before it ends.
    """

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream, self._failed = stream, False  # the stream would close the file when it is collected

    def write(self, data: Any) -> int:
        if self._failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            if error.errno == errno.EIO:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(
                f"standard output cannot be written: {error.strerror}; redirect it and re-run the command"
            ) from error


class _OutputBuffer(io.BufferedWriter):
    """The buffer before an `_Output`."""


def _protect_output() -> None:
    """Make sys.stdout report failures as `_Output` does, and print any text in any encoding."""
    stream = sys.stdout
    if stream is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    elif type(stream) is io.TextIOWrapper and not isinstance(stream.buffer, _OutputBuffer | _Output):
        output = _Output(stream)
        buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with python -u
        sys.stdout = io.TextIOWrapper(
            _OutputBuffer(output) if buffered else output,
            stream.encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )


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


def unknown(what: str, word: str, words: Iterable[str]) -> UserError:
    """The error for a word that is none of `words`; `what` is the kind of thing that they name."""
    return UserError(f"unknown {what} {word!r}.{did_you_mean(word, words)}")


def known(what: str, word: str, words: Collection[str]) -> str:
    """The word itself, if it is one of `words`; raises `unknown` otherwise."""
    if word not in words:
        raise unknown(what, word, words)
    return word

"""How things go wrong: exceptions, exit codes, and the words that help to mend a mistake."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any

RESUMABLE = 75  # exit code (EX_TEMPFAIL): nothing needs mending, the same command goes on
MISTAKE = 2  # exit code: a person has to change something first
INTERRUPTED = 130  # exit code: Ctrl-C, as shells report it


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
    """Run the body of a command: an expected failure becomes one line on stderr and an exit code.

    Expected are a user's mistake, a run that stopped, Ctrl-C, and a standard output that cannot be written.
    """
    _protect_output()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now, while a failure can be reported
    except BrokenPipeError:  # the reader of the output has ended, and expects no more
        os._exit(1)
    except UserError as error:
        _print_error(f"error: {error}")
        raise SystemExit(error.exit_code) from error
    except Stopped as stop:
        _print_error(str(stop))
        raise SystemExit(RESUMABLE) from stop
    except KeyboardInterrupt as interrupt:
        _print_error("interrupted")
        raise SystemExit(INTERRUPTED) from interrupt


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # nowhere to print it; the exit code remains
        print(line, file=sys.stderr, flush=True)


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
